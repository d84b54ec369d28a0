"""Bytes between the parent and its ranks.

Tensors travel by value, not as shared-memory descriptors: a rank may be gone before its result is read, and every
descriptor would stay open in both processes. Only the elements that a tensor shows are sent, not the storage behind it.
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
        return _rebuild_tensor, (flat.view(torch.uint8).numpy() if flat.numel() else b"", *form)


def _rebuild_tensor(raw, dtype_name: str, shape: tuple[int, ...], requires_grad: bool, parameter: bool):
    import torch

    dtype = getattr(torch, dtype_name)
    if raw is None:
        tensor = torch.empty(shape, dtype=dtype, device="meta")
    elif len(raw) == 0:
        tensor = torch.empty(shape, dtype=dtype)
    else:
        tensor = torch.from_numpy(raw).view(dtype).reshape(shape)
    return torch.nn.Parameter(tensor, requires_grad) if parameter else tensor.requires_grad_(requires_grad)
