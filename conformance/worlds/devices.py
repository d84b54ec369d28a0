"""GPUs of this machine, asked for in a way that starts no CUDA in this process."""

from __future__ import annotations

import os
from functools import cache


@cache
def gpus() -> int:
    """Number of CUDA devices, 0 without any (or where the CPU is presented as one)."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch

    return torch.cuda.device_count() if torch.version.cuda else 0
