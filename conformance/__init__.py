"""A conformance suite for bridges between Hugging Face transformers and Megatron-Core.

``run_conformance`` and ``parametrize_with_checks`` are found here; nothing is imported before it is asked for, since ranks import this package.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_WHERE = {
    "Result": "run",
    "run_conformance": "run",
    "parametrize_with_checks": "parametrize",
    "Adapter": "api",
    "LawBroken": "api",
    "NotRun": "api",
    "Verdict": "api",
    "load_adapter": "api",
}
__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
