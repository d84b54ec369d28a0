"""Planted faults: right bridges made wrong, to show that the suite tells the difference.

``plant(name, adapter)`` wraps any adapter; ``FAULT@ADAPTER`` is its name wherever an adapter is named. ``python -m
shardproof.conformance.faults`` runs every fault through every check and gives the kill matrix (docs/faults.md).
"""

from __future__ import annotations

from ..api import Adapter
from .base import Fault, Model, Planted


def faults() -> dict[str, Fault]:
    """Every fault by name, in the order of their classes."""
    from . import registry

    return registry.FAULTS


def plant(name: str, adapter: Adapter) -> Adapter:
    """An adapter with one planted fault. Raises ValueError for a name that is none."""
    found = faults()
    if name not in found:
        import difflib

        near = difflib.get_close_matches(name, found, 3)
        raise ValueError(
            f"no planted fault {name!r}; " + (f"did you mean {', '.join(near)}?" if near else f"there are {len(found)}")
        )
    return Planted(found[name], adapter)


__all__ = ["Fault", "Model", "Planted", "faults", "plant"]
