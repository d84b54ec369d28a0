"""Conversions without a model: Hugging Face files -> torch_dist and back, tensor by tensor.

Modules are built on meta: they say which tensors a rank has, under which keys of a checkpoint. Import makes the values of one parameter when
torch's writer comes to its entry; export reads the boxes of one Hugging Face tensor when the file writer comes to it. What waits in memory is
one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import importer, parallel
from .architecture import Architecture
from .errors import CoverageError, listing
from .exporter import contributions, narrowed
from .held import Held, held
from .io.pieces import Piece, by_home, home, pieces
from .io.slices import SMALL, shared
from .io.stored import StoredTensors
from .moves import Move
from .relations import Index


class Memory:
    """Blocks of memory for tensors that follow each other: a new block for each would be zeroed page by page each time. Small tensors have two,
    in turns, so that the one before may still be looked at."""

    def __init__(self):
        self._blocks, self._turn = [np.empty(0, np.uint8)] * 3, 0

    def tensor(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """A tensor at a block's front, in place of another; its values are what lies there."""
        import torch

        size = math.prod(shape) * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype)
        self._turn = 1 - self._turn
        block = 2 if size > SMALL else self._turn
        if size > self._blocks[block].nbytes:
            self._blocks[block] = np.empty(0, np.uint8)  # give it back first
            self._blocks[block] = np.empty(size, np.uint8)
        return torch.frombuffer(memoryview(self._blocks[block])[:size], dtype=dtype).view(shape)


class Filled:
    """Values of the pieces of chunks on meta, from a Hugging Face checkpoint: each parameter is read when the first of its pieces is asked
    for. Raises CheckpointError, CoverageError."""

    def __init__(self, chunks: list, source: importer.Source, architecture: Architecture):
        self._source, self._listed = source, importer.listed_copies(source, architecture)
        self._held = {home(item.param): item for item in held(chunks, architecture)}
        self._memory, self._whole = Memory(), None
        self._now: int | None = None

    def __call__(self, piece: Piece) -> Any:
        import torch

        place = home(piece.view)
        if place != self._now:
            item = self._item(piece, place)
            self._whole = self._memory.tensor(tuple(item.param.shape), item.param.dtype)
            importer.fill(self._whole, item.moves, self._source, self._listed)
            self._now = place
        flat, view = self._whole.view(-1), piece.view
        if not view.is_contiguous():
            return flat.as_strided(view.shape, view.stride(), view.storage_offset()).contiguous().clone()
        first = view.storage_offset() * flat.element_size()
        memory = memoryview(flat.view(torch.uint8).numpy())[first : first + view.nbytes]
        return torch.frombuffer(memory, dtype=view.dtype).view(view.shape)  # memory of its own size is what torch.save writes

    def _item(self, piece: Piece, place: int) -> Held:
        if place not in self._held:
            raise CoverageError(f"{piece.key}: megatron-core saves what is no parameter of the model; its values are not known")
        return self._held[place]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one move's values come out of a checkpoint: `parts` are (their place among the values, key, first element of the box in the stored
    tensor); shape and dtype are the values', which lie at `src` of the Hugging Face tensor, `flipped` or not."""

    src: Index
    flipped: bool
    shape: tuple[int, ...]
    dtype: Any
    parts: tuple[tuple[tuple[slice, ...], str, tuple[int, ...]], ...]


class Whole:
    """Whole Hugging Face tensors out of a torch_dist checkpoint, one at a time, each in the memory of the one before.

    chunks: this rank's, on meta; making it is collective: ranks tell each other what they know. `entries`: name -> (shape, dtype), in checkpoint
    order. stored: dtypes of tensors that Megatron keeps in fp32 whatever the model's. Raises CoverageError where the checkpoint's keys are not this
    model's.
    """

    def __init__(self, chunks: list, tensors: StoredTensors, architecture: Architecture, stored: Mapping[str, Any]):
        self._tensors, self._memory = tensors, Memory()
        self._recipes: dict[str, list[Recipe]] = {}
        mine = contributions(held(chunks, architecture))
        found = by_home(pieces(chunks)[0])
        failed, made = None, {}
        try:
            self._check([piece for item in mine for piece in found.get(home(item.param), ())])
            made = _recipes(mine, found)
        except CoverageError as wrong:
            failed = wrong
        for problem, part in parallel.all_gather_object((failed, made)):
            if problem:
                raise problem
            for name, recipes in part.items():
                self._recipes.setdefault(name, []).extend(recipes)
        sources = architecture.hf_sources()
        if lacking := [s.name for s in sources if s.name not in self._recipes]:
            raise CoverageError(f"no rank's model has {listing(lacking)}; is this the whole model?")
        self.entries = {s.name: (s.disk_shape, stored.get(s.name, self._recipes[s.name][0].dtype)) for s in sources}

    def __call__(self, name: str) -> Any:
        """The tensor; its memory is used again by the next call (a small one's by the one after that). Raises CheckpointError where a part is
        lacking."""
        import torch

        whole = self._memory.tensor(*self.entries[name])
        for recipe in self._recipes[name]:
            target = whole[recipe.src]
            straight = not recipe.flipped and target.dtype == recipe.dtype
            values = target if straight else torch.empty(recipe.shape, dtype=recipe.dtype)
            for place, key, first in recipe.parts:
                part = values[place]
                self._tensors.read(key, first, part[(None,) * (len(first) - part.dim())])
            if not straight:
                target.copy_(narrowed(values.T if recipe.flipped else values, target.dtype))
        return whole

    def _check(self, found: list[Piece]) -> None:
        folder, sizes = self._tensors.folder, self._tensors.sizes
        wanted = {piece.key for piece in found}
        if missing := sorted(wanted - set(sizes)):
            others = listing(sorted(set(sizes) - wanted)) or "nothing else"
            raise CoverageError(
                f"{folder} has no {listing(missing)}, where this model is kept; it has {others}; is it another model's checkpoint?"
            )
        for piece in found:
            if sizes[piece.key] != piece.size and not piece.flexible:
                raise CoverageError(
                    f"{folder}: {piece.key} is {list(sizes[piece.key])}, this model's is {list(piece.size)}; is the config of another model?"
                )


def _recipes(mine: list[Held], found: dict[int, list[Piece]]) -> dict[str, list[Recipe]]:
    out: dict[str, list[Recipe]] = {}
    for item in mine:
        placed = [(_start(piece, item), piece) for piece in found.get(home(item.param), ())]
        for move in item.moves:
            if move.source is not None:
                out.setdefault(move.source, []).append(_recipe(move, item, placed))
    return out


def _recipe(move: Move, item: Held, placed: list[tuple[list[int], Piece]]) -> Recipe:
    first, shape = [part.start for part in move.dst], tuple(part.stop - part.start for part in move.dst)
    parts = []
    for start, piece in placed:
        if both := shared(first, shape, start, piece.view.shape):
            place, inside = both
            lead = len(piece.offset) - len(start)
            at = [o + part.start for o, part in zip(piece.offset[lead:], inside, strict=True)]
            parts.append((place, piece.key, (*piece.offset[:lead], *at)))
    got = sum(math.prod(part.stop - part.start for part in place) for place, _, _ in parts)
    if got != math.prod(shape):
        raise CoverageError(
            f"{item.tensor.name}: megatron-core saves {got} of {math.prod(shape)} elements that hold {move.source}"
        )
    return Recipe(move.src, move.flipped, shape, item.param.dtype, tuple(parts))


def _start(piece: Piece, item: Held) -> list[int]:
    """Where a piece begins in its parameter. Raises CoverageError for a piece that is no box of it."""
    view, strides = piece.view, item.param.stride()
    left, start = view.storage_offset(), []
    for stride in strides:
        at, left = divmod(left, stride) if stride else (0, left)
        start.append(at)
    if (
        left
        or view.dim() != len(strides)
        or any(n > 1 and a != b for n, a, b in zip(view.shape, view.stride(), strides, strict=True))
    ):
        raise CoverageError(f"{piece.key}: what megatron-core saves is no box of {item.tensor.name}")
    return start
