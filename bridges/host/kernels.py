"""Shows stand-ins of ``fla``, ``mamba_ssm``, ``causal_conv1d`` and ``deep_ep`` to megatron-core, and to nobody else.

transformers too picks these packages up when it can import them. A stand-in it could see would become the reference's kernel,
and the subject would be compared with itself. So they never enter ``sys.modules``: while megatron's few importing modules are
imported, ``__import__`` answers for these names when it is megatron that asks.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import deep_ep, recurrences

VERSION = "0.0.0+stand.in"
"""Lower than any real one, so that megatron's inference paths, which ask for a minimum, say they are not supported."""

CONSUMERS = {
    "causal_conv1d": "megatron.core.ssm.mamba_mixer",
    "mamba_ssm": "megatron.core.ssm.mamba_mixer",
    "fla": "megatron.core.ssm.gated_delta_net",
    "deep_ep": "megatron.core.transformer.moe.fused_a2a",
}
"""Package -> the megatron module that imports it, at its own import."""


def install(*, hidden: bool = False) -> dict[str, str]:
    """Give megatron a stand-in of each absent package, of all where devices are hidden; returns package -> "stand-in" or the real version.

    Imports megatron's state-space and dispatcher modules. Raises RuntimeError if one of them was imported before.
    """
    absent = {name for name in CONSUMERS if hidden or importlib.util.find_spec(name) is None}
    for name in sorted(absent):
        if CONSUMERS[name] in sys.modules:
            raise RuntimeError(
                f"{CONSUMERS[name]} has already been imported without {name}: "
                "call shardproof.bridges.host.install() before the first import of megatron.core"
            )
    if absent:
        with _shown_to_megatron({name: module for name, module in _modules().items() if name.split(".")[0] in absent}):
            for consumer in sorted({CONSUMERS[name] for name in absent}):
                importlib.import_module(consumer)
            _remember_versions(absent)
    return {name: "stand-in" if name in absent else _real_version(name) for name in CONSUMERS}


@contextmanager
def _shown_to_megatron(modules: dict[str, types.ModuleType]) -> Iterator[None]:
    """Answer ``import fla...`` and the like from ``modules``, if the importing module is megatron's."""
    real = builtins.__import__

    def shown(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        importer = (globals or {}).get("__name__", "")
        if level == 0 and name in modules and importer.startswith("megatron."):
            return modules[name] if fromlist else modules[name.split(".")[0]]
        return real(name, globals, locals, fromlist, level)

    builtins.__import__ = shown
    try:
        yield
    finally:
        builtins.__import__ = real


def _remember_versions(absent: set[str]) -> None:
    """Let megatron read the stand-ins' versions now: it asks for them late, and keeps the answer."""
    from megatron.core import utils

    if "mamba_ssm" in absent:
        utils.get_mamba_version()
    if "causal_conv1d" in absent:
        utils.get_causal_conv1d_version()


def _real_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "present"


def _modules() -> dict[str, types.ModuleType]:
    ssd = {name: getattr(recurrences, name) for name in ("mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined")}
    contents: dict[str, dict[str, Any]] = {
        "causal_conv1d": {"causal_conv1d_fn": recurrences.causal_conv1d_fn, "causal_conv1d_update": _inference_only},
        "causal_conv1d.causal_conv1d_varlen": {"causal_conv1d_varlen_states": _inference_only},
        "mamba_ssm": {},
        "mamba_ssm.ops": {},
        "mamba_ssm.ops.triton": {},
        "mamba_ssm.ops.triton.layernorm_gated": {"RMSNorm": recurrences.RMSNormGated},
        "mamba_ssm.ops.triton.ssd_combined": ssd,
        "deep_ep": {"Buffer": deep_ep.Buffer},
        "deep_ep.utils": {"EventHandle": deep_ep.Finished, "EventOverlap": deep_ep.Finished},
        "fla": {},
        "fla.modules": {},
        "fla.modules.convolution": {"causal_conv1d": recurrences.fla_conv1d},
        "fla.modules.l2norm": {"l2norm": recurrences.l2norm},
        "fla.ops": {},
        "fla.ops.gated_delta_rule": {"chunk_gated_delta_rule": recurrences.chunk_gated_delta_rule},
    }
    modules: dict[str, types.ModuleType] = {}
    for name, attributes in contents.items():
        modules[name] = types.ModuleType(name, "Stand-in, part of shardproof.bridges.host.")
        modules[name].__dict__.update(attributes, __version__=VERSION)
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(modules[parent], leaf, modules[name])
    return modules


def _inference_only(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError("an inference kernel: not part of the stand-ins, use the real package on a GPU")
