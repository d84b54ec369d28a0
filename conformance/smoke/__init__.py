"""Smoke: tells a wrong adapter from a wrong bridge, before the suite runs.

It walks through the Adapter protocol on one toy, step by step, and judges only what the protocol promises: members, types, ranks, names,
whole tensors, repeatability. It compares no value with transformers: that is the suite's work. Where it finds nothing wrong, a verdict of
the suite is about the bridge.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .bench import Outcome

__all__ = ["smoke"]


def smoke(bridge: str, *, family: str | None = None, toy: str | None = None) -> list[Outcome]:
    """Walk through all steps for an adapter's name (as for --bridge); one outcome a step, in order.

    family, toy: use a toy of this family, or one whose name contains this. A step whose requisites failed is skipped.
    """
    from .bench import Bench  # not above: ranks import this package for its tasks
    from .steps import STEPS

    with Bench(bridge, family=family, toy=toy) as bench:
        return [bench.take(step) for step in STEPS]
