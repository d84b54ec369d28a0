"""Megatron -> Hugging Face: the inverse moves, streamed one HF tensor at a time from whatever ranks hold its pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from . import parallel
from .architecture import Architecture
from .errors import CoverageError, listing
from .held import Held, held


def weight(param) -> Any:
    """The parameter itself."""
    return param.detach()


def gradient(param) -> Any:
    """The parameter's gradient (DistributedDataParallel's main_grad, else .grad). Raises CoverageError where there is none."""
    grad = getattr(param, "main_grad", None)
    grad = param.grad if grad is None else grad
    if grad is None:
        raise CoverageError(f"a parameter of shape {list(param.shape)} has no gradient; run backward first")
    return grad.detach()


class Export:
    """An export about to happen: `entries` says what will come, iterating streams it.

    Making it is collective (ranks agree on names and dtypes), and so is iterating: every rank must take the stream to its end. Each
    element comes from exactly one rank (replicas stay silent) and travels as bytes, so values are bit-exact. Peak memory is one HF
    tensor. Raises CoverageError where the ranks together do not hold a tensor.
    """

    def __init__(self, model, architecture: Architecture, *, value: Callable[[Any], Any] = weight, cpu: bool = True):
        self._value, self._cpu = value, cpu
        mine = _contributions(held(model, architecture))
        dtypes = _directory(mine, value)
        owners = {s.name: t.name for t in architecture.tensors() if not t.alias for s in t.sources}
        if lacking := {t for t in owners.values() if t not in dtypes}:
            raise CoverageError(f"no rank holds {listing(lacking)}; is this the whole model, under the plan parallel_state runs?")
        self._by_source = {s.name: item for item in mine for s in item.tensor.sources}
        self.entries = {name: (shape, dtypes[owners[name]]) for name, shape in architecture.hf_shapes().items()}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Yield (HF name, whole tensor) in checkpoint order, on every rank."""
        for name, (shape, dtype) in self.entries.items():
            yield name, _assemble(name, shape, self._by_source.get(name), dtype, self._value, self._cpu)


def _contributions(items: list[Held]) -> list[Held]:
    """What this rank gives: data-, context-parallel and tensor-parallel replicas leave it to rank 0 of their group."""
    at = parallel.coordinates()
    if at.dp or at.cp:
        return []
    return [i for i in items if not i.tensor.alias and (i.tensor.shard.kind != "replicated" or at.tp == 0)]


def _directory(items: list[Held], value) -> dict[str, Any]:
    """Megatron name -> dtype of what its holders give, agreed by all ranks."""
    out: dict[str, Any] = {}
    for part in parallel.all_gather_object({i.tensor.name: value(i.param).dtype for i in items}):
        out |= part
    return out


def _assemble(name: str, shape: tuple[int, ...], item: Held | None, dtype, value, cpu: bool):
    import torch

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    whole = torch.zeros(shape, dtype=dtype, device=device)
    if item is not None:
        piece = value(item.param)
        for move in item.moves:
            if move.source == name:
                whole[move.src] = piece[move.dst]
    parallel.join_bytes(whole)
    return whole.cpu() if cpu else whole
