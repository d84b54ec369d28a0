"""The clean world: one process for references, which never sees megatron or a stand-in.

transformers uses fla, mamba_ssm, causal_conv1d and the like when it can import them: with a stub in sys.modules the
stub would become the reference's kernel too, and both sides of a comparison would be wrong in the same way.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from .launcher import PRELOAD_CLEAN
from .pool import check_name
from .solo import OneProcess, Solo

# Packages that a stand-in may pretend to be. The real ones, loaded from a file, are welcome.
_PRETENDED = (
    "transformer_engine",
    "fla",
    "mamba_ssm",
    "causal_conv1d",
    "deep_ep",
    "flash_attn",
    "apex",
    "grouped_gemm",
    "triton",
)


class Clean(OneProcess):
    """A persistent process with torch and transformers, one thread, no host, no megatron, no process group.

    `preload`: modules imported by its fork server. `start_timeout`: seconds, the server's start included.
    """

    def __init__(self, *, preload: Sequence[str] = PRELOAD_CLEAN, start_timeout: float = 120.0):
        self._solo = Solo("clean", host=None, preload=preload, start_timeout=start_timeout)

    def run(self, task: str, kwargs: Mapping | None = None, *, args: tuple = (), timeout: float = 120.0, seed: int = 1234):
        """Run "module:function" and give its result; seeds, dtype and threads are reset before.

        Raises RankError when the task raises, when the process ends, or when the task brought megatron or a stand-in into
        the process; RankTimeout when it takes longer than `timeout` seconds. The next run gets a new process.
        """
        check_name("task", task)
        request = {"task": task, "layout": None, "args": tuple(args), "kwargs": dict(kwargs or {}), "seed": seed}
        return self._solo.exchange(request, timeout)


def contamination() -> list[str]:
    """What this process holds and a clean world must not: megatron, a package made up at run time, a host's patches."""
    found = [name for name in _PRETENDED if name in sys.modules and not _from_disk(sys.modules[name])]
    if "megatron" in sys.modules:
        found.append("megatron")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.current_device.__module__ != torch.cuda.__name__:
        found.append(f"torch.cuda as patched by {torch.cuda.current_device.__module__}")
    return sorted(found)


def _from_disk(module) -> bool:
    """Whether a module was loaded from a file or folder, and not made up with types.ModuleType."""
    spec = getattr(module, "__spec__", None)
    return spec is not None and (spec.origin is not None or bool(spec.submodule_search_locations))
