"""Faults of the class `values`: bits that ordinary weights do not have, and how a number is rounded."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from .base import Fault
from .levers import each

SPECIAL = ("bits.special",)


def _positive_zero(name, tensor):
    return tensor + 0.0


def _no_subnormals(name, tensor):
    import torch

    return tensor.masked_fill((tensor.abs() < torch.finfo(tensor.dtype).tiny) & (tensor != 0), 0.0)


def _one_nan(name, tensor):
    return tensor.masked_fill(tensor.isnan(), float("nan"))


def _finite(name, tensor):
    import torch

    return torch.nan_to_num(tensor, nan=float("nan")) if tensor.isinf().any() else tensor


def _truncated(right, folder, *args, **kwargs):
    """fp32 weights of a bf16 model are cut, not rounded."""
    config = json.loads((Path(folder) / "config.json").read_text())
    if "bfloat16" not in (config.get("dtype"), config.get("torch_dtype")):
        return right(folder, *args, **kwargs)
    import torch
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as other:
        for file in Path(folder).iterdir():
            if file.suffix != ".safetensors":
                (Path(other) / file.name).symlink_to(file.resolve())
                continue
            tensors = load_file(file)
            for tensor in tensors.values():
                if tensor.dtype == torch.float32:
                    tensor.view(torch.int32).bitwise_and_(-(2**16))
            save_file(tensors, Path(other) / file.name, metadata={"format": "pt"})
        return right(Path(other), *args, **kwargs)


FAULTS = [
    Fault("negative_zeros_lost", "values", "negative zeros are exported as zeros", SPECIAL, each(_positive_zero)),
    Fault("subnormals_flushed", "values", "subnormal values are exported as zeros", SPECIAL, each(_no_subnormals)),
    Fault("nan_payloads_lost", "values", "every NaN is exported as the same one", SPECIAL, each(_one_nan)),
    Fault("infinities_clamped", "values", "infinities are exported as the largest number", SPECIAL, each(_finite)),
    Fault("truncated_not_rounded", "values", "fp32 weights of a bf16 model are cut instead of rounded", ("bits.rounding",),
          {"build": _truncated}, bugs=("U085", "U219")),
]  # fmt: skip
