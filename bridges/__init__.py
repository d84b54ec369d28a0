"""Reference bridges between Hugging Face transformers and Megatron-Core checkpoints.

``from shardproof.bridges import AutoBridge``. Importing this package imports neither torch nor megatron.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "AutoBridge": "auto",
    "ConversionTask": "auto",
    "Architecture": "architecture",
    "Family": "architecture",
    "ParallelPlan": "plan",
    "Provider": "provider",
    "find_family": "families",
    "register_bridge": "families",
    "BridgeError": "errors",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "CoverageError": "errors",
    "PlanError": "errors",
    "UnknownArchitectureError": "errors",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
