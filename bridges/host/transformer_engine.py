"""Assembles the ``transformer_engine`` stand-in, so that megatron-core's own TE classes run and name parameters as in production.

The modules are in `te_modules` and `attention`. Names of TE's that megatron imports and that have no meaning here (fused
operations, recipes) exist and refuse to be used. What is not defined makes megatron fall back to torch: the fused optimizers.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import sys
import types
from importlib.machinery import ModuleSpec
from typing import Any

import torch

from . import attention, te_modules

VERSION = "2.20.2"
"""The release of Transformer Engine whose surface this is."""

_log = logging.getLogger(__name__)


def real_version() -> str | None:
    """The version of the real transformer_engine, or None where it cannot be imported (then nothing of it stays imported)."""
    if importlib.util.find_spec("transformer_engine") is None:
        return None
    try:
        package = importlib.import_module("transformer_engine")
        importlib.import_module("transformer_engine.pytorch")  # its __init__ only warns when the extension is missing
        return str(package.__version__)
    except Exception as error:  # a missing library shows as OSError, RuntimeError, FileNotFoundError, AssertionError ...
        _log.warning("transformer_engine is installed and cannot be imported (%r): the stand-in takes its place", error)
        for name in [n for n in sys.modules if n.split(".")[0] in ("transformer_engine", "transformer_engine_torch")]:
            del sys.modules[name]
        return None


def install() -> None:
    """Put the stand-in into ``sys.modules``. It stays there: megatron imports it lazily too.

    It carries a module spec and no distribution metadata, so that ``importlib.util.find_spec`` does not raise and the checks
    that ask for an installed distribution (accelerate's) go on answering no. Nothing in transformers' models asks.
    """
    _module("transformer_engine", __version__=VERSION)
    _module("transformer_engine.common")
    _module("transformer_engine.common.recipe", **_recipes())
    _module("transformer_engine.pytorch", **_MODULES, **_PRECISION)
    _module("transformer_engine.pytorch.ops", **{name: _absent(name) for name in _FUSED_OPERATIONS})
    _module("transformer_engine.pytorch.fp8", FP8GlobalStateManager=FP8GlobalStateManager, **_PRECISION)
    _module("transformer_engine.pytorch.distributed", **_distributed())
    _module("transformer_engine.pytorch.tensor", QuantizedTensor=type("QuantizedTensor", (torch.Tensor,), {}))
    _module("transformer_engine.pytorch.module")
    base = {"TransformerEngineBaseModule": te_modules.TransformerEngineBaseModule, "get_dummy_wgrad": _dummy_wgrad}
    _module("transformer_engine.pytorch.module.base", **base)
    _module("transformer_engine.pytorch.router", **dict.fromkeys(_ROUTER_KERNELS))


def _module(name: str, **attributes: Any) -> None:
    module = types.ModuleType(name, "Pure-torch stand-in, part of shardproof.bridges.host.")
    module.__spec__ = ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    module.__dict__.update(attributes)
    sys.modules[name] = module
    parent, _, leaf = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], leaf, module)


_MODULES = {
    "Linear": te_modules.Linear,
    "LayerNormLinear": te_modules.LayerNormLinear,
    "LayerNorm": te_modules.LayerNorm,
    "RMSNorm": te_modules.RMSNorm,
    "GroupedLinear": te_modules.GroupedLinear,
    "DotProductAttention": attention.DotProductAttention,
}
_FUSED_OPERATIONS = (
    "Sequential", "SwiGLU", "GEGLU", "ReGLU", "GELU", "ReLU", "SiLU", "LayerNorm", "RMSNorm", "BasicLinear", "Bias",
    "ReduceScatter", "AllReduce", "MakeExtraOutput", "FusibleOperation",
)  # fmt: skip
_ROUTER_KERNELS = ("fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss", "fused_topk_with_score_function")
_RECIPES = (
    "DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling", "NVFP4BlockScaling", "CustomRecipe",
    "Recipe",
)  # fmt: skip


def _absent(name: str) -> type:
    """A class that can be imported and named, and says what it is when it is used."""

    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"{name} is not part of the transformer_engine stand-in: use the real one, on a GPU")

    return type(name, (), {"__init__": refuse})


def _recipes() -> dict[str, Any]:
    # plain classes: megatron asks isinstance(recipe, ...) and never makes one unless fp8 or fp4 is configured
    recipes: dict[str, Any] = {name: type(name, (), {}) for name in _RECIPES}
    recipes["Format"] = types.SimpleNamespace(E4M3="e4m3", HYBRID="hybrid")
    return recipes


def _full_precision(*args: Any, enabled: bool = True, **kwargs: Any) -> contextlib.AbstractContextManager[None]:
    """fp8 and fp4 contexts: nothing when off, and an error when on; ignoring it would pass bf16 off as fp8."""
    if args[0] if args else enabled:
        raise NotImplementedError("fp8 and fp4 are not part of the transformer_engine stand-in: switch them off, or use a GPU")
    return contextlib.nullcontext()


_PRECISION = dict.fromkeys(("fp8_autocast", "fp8_model_init", "autocast", "quantized_model_init"), _full_precision)


class FP8GlobalStateManager:
    """``transformer_engine.pytorch.fp8.FP8GlobalStateManager`` with fp8 off."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False

    @staticmethod
    def get_fp8_recipe() -> None:
        return None

    @staticmethod
    def reset() -> None:
        pass


def _distributed() -> dict[str, Any]:
    return {
        "CudaRNGStatesTracker": _absent("CudaRNGStatesTracker (use_te_rng_tracker)"),
        "activation_recompute_forward": lambda *args, **kwargs: contextlib.nullcontext(),
        "checkpoint": None,
        "get_all_rng_states": lambda: {},
        "is_fp8_activation_recompute_enabled": lambda: False,
    }


def _dummy_wgrad(shape: Any, dtype: torch.dtype, zero: bool = False) -> torch.Tensor:
    return (torch.zeros if zero else torch.empty)(shape, dtype=dtype, device="cuda")
