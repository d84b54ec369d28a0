"""The lint of weights: what is quiet hides mistakes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

NEAR_ONE = 0.02  # how far a norm's weights are from one on average, at least
FEW = 4  # tensors of fewer elements may be alike by chance, in 16 bits


def lint_weights(state: Mapping[str, Any]) -> list[str]:
    """Quiet tensors of a state dict {name: tensor}, as sentences; empty when every mistake would show.

    Rules: constant (bias zero, norm one, anything else), not finite, norm near one, two tensors or two stacked experts that hold the same
    numbers, in whatever order. Whole numbers (tables, positions) are not looked at, save that a table of choices is not constant.
    """
    found = [f"{rule}: {name} {text}" for name, tensor in state.items() for rule, text in _alone(name, tensor)]
    return found + list(_alike(state))


def _alone(name: str, tensor) -> Iterator[tuple[str, str]]:
    if tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
        zero = "is zero" if not tensor.any() else f"is {tensor.flatten()[0].item():g} everywhere"
        yield "bias" if name.endswith("bias") else "constant", zero
    if not tensor.is_floating_point():
        return
    if not bool(tensor.isfinite().all()):
        yield "finite", "has values that are not finite"
    if tensor.ndim == 1 and "norm" in name and not name.endswith("bias") and (tensor.float() - 1).abs().mean() < NEAR_ONE:
        yield "norm", "is near one: losing it would not show"


def _alike(state: Mapping[str, Any]) -> Iterator[str]:
    """Tensors with the same numbers: one could stand for the other."""
    import torch

    seen: dict[tuple, tuple[str, Any]] = {}
    for name, tensor in _pieces(state):
        other, values = seen.setdefault((tensor.numel(), tensor.dtype, *map(float, tensor.aminmax())), (name, tensor))
        if other != name and torch.equal(*(numbers.flatten().sort().values for numbers in (values, tensor))):
            yield f"alike: {other} and {name} hold the same numbers"


def _pieces(state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every float tensor; of stacked experts each expert."""
    for name, tensor in state.items():
        if not tensor.is_floating_point() or tensor.numel() < FEW:
            continue
        if "experts" in name and tensor.ndim == 3:
            yield from ((f"{name}[{e}]", tensor[e]) for e in range(tensor.shape[0]))
        else:
            yield name, tensor
