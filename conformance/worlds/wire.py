"""Bytes between the parent and its ranks, which may have other versions of Python, torch and numpy.

Tensors and arrays travel by value, not as shared-memory descriptors: a rank may be gone before its result is read, and
every descriptor would stay open in both processes. They travel as bytes with a type's name, not in a library's own pickle
format. Only the elements that a tensor shows are sent, not the storage behind it.
"""

from __future__ import annotations

import io
import pickle
import sys


def dumps(value, prefix: bytes = b"") -> bytes:
    """`prefix`, then the pickle of `value`; each torch tensor inside as its own bytes, bit for bit, detached, on the CPU.

    Shared storage and attributes set on tensors are not kept; a Parameter comes back as a Parameter. Raises what
    pickle raises for what cannot travel.
    """
    buffer = io.BytesIO()
    buffer.write(prefix)
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


def loads(data: bytes | memoryview):
    """The value in a pickle made by `dumps`, its prefix cut off."""
    return pickle.loads(data)


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj):
        numpy = sys.modules.get("numpy")
        if numpy is not None and type(obj) is numpy.ndarray and obj.dtype.kind in "biufc":
            return _rebuild_array, (pickle.PickleBuffer(numpy.ascontiguousarray(obj).reshape(-1)), obj.dtype.str, obj.shape)
        torch = sys.modules.get("torch")  # no torch, no tensors: the parent need not import it to send a request
        if torch is None or type(obj) not in (torch.Tensor, torch.nn.Parameter):
            return NotImplemented
        if obj.layout != torch.strided or obj.is_quantized:
            return NotImplemented
        parameter = isinstance(obj, torch.nn.Parameter)
        form = (str(obj.dtype).removeprefix("torch."), tuple(obj.shape), obj.requires_grad, parameter)
        if obj.device.type == "meta":
            return _rebuild_tensor, (None, *form)
        flat = obj.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        raw = pickle.PickleBuffer(flat.view(torch.uint8).numpy()) if flat.numel() else b""
        return _rebuild_tensor, (raw, *form)


def _rebuild_array(raw, dtype: str, shape: tuple[int, ...]):
    import numpy

    whole = numpy.frombuffer(raw, dtype=dtype) if len(raw) else numpy.empty(0, dtype)
    return (whole if whole.flags.writeable else whole.copy()).reshape(shape)


def _rebuild_tensor(raw, dtype_name: str, shape: tuple[int, ...], requires_grad: bool, parameter: bool):
    import torch

    dtype = getattr(torch, dtype_name)
    if raw is None:
        tensor = torch.empty(shape, dtype=dtype, device="meta")
    elif len(raw) == 0:
        tensor = torch.empty(shape, dtype=dtype)
    else:
        tensor = torch.frombuffer(raw, dtype=torch.uint8).view(dtype).reshape(shape)
    return torch.nn.Parameter(tensor, requires_grad) if parameter else tensor.requires_grad_(requires_grad)
