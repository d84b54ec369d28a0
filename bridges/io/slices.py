"""Slices of tensors in files: which byte runs a selection covers, and reading them straight into memory.

No file is mapped: mapped pages count as the process's own and page faults cost more than the copy. A run is read by ``preadv`` into the
place where it is wanted.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError

Shape, Slices = Sequence[int], tuple[slice, ...]
SMALL = 16 * 2**20  # bytes of a tensor of which a second one may wait in memory


def runs(shape: tuple[int, ...], where: tuple[Any, ...]) -> tuple[np.ndarray, int, tuple[int, ...]]:
    """(first elements of the runs, elements of each run, shape of what is selected) of a selection from a row-major tensor.

    where: a slice (of positive step) or number an axis; axes that it leaves out are taken whole. Runs are in the order of the selection's
    elements.
    """
    axes = [_axis(size, part) for size, part in zip(shape, (*where, *[slice(None)] * (len(shape) - len(where))), strict=True)]
    length, stride, firsts = 1, 1, np.zeros(1, dtype=np.int64)
    joined = True  # whether all axes behind are taken whole, so that this one goes on with the run
    for size, (start, count, step, _) in zip(reversed(shape), reversed(axes), strict=True):
        if joined and (step == 1 or count == 1):
            firsts, length = firsts + start * stride, length * count
            joined = count == size
        else:
            begins = (start + step * np.arange(count, dtype=np.int64)) * stride
            firsts = (begins[:, None] + firsts[None, :]).reshape(-1)
            joined = False
        stride *= size
    return firsts, length, tuple(count for _, count, _, kept in axes if kept)


def _axis(size: int, part: Any) -> tuple[int, int, int, bool]:
    """(first, count, step, whether the axis stays)."""
    if not isinstance(part, slice):
        return range(size)[part], 1, 1, False
    taken = range(size)[part]
    return taken.start, len(taken), taken.step, True


def shared(first: Shape, shape: Shape, other_first: Shape, other_shape: Shape) -> tuple[Slices, Slices] | None:
    """(slices of one box, slices of the other) of what two boxes of one tensor share; None where they share nothing."""
    here, there = [], []
    for a, n, b, m in zip(first, shape, other_first, other_shape, strict=True):
        low, high = max(a, b), min(a + n, b + m)
        if low >= high:
            return None
        here.append(slice(low - a, high - a))
        there.append(slice(low - b, high - b))
    return tuple(here), tuple(there)


class Reader:
    """One open file. `path` names it in errors. Use `fill`; `close` when done."""

    def __init__(self, path: Path):
        self.path = path
        self._handle = os.open(path, os.O_RDONLY)

    def fill(self, memory: memoryview, offset: int) -> None:
        """Read as many bytes as `memory` has from `offset` on. Raises CheckpointError where the file ends before."""
        while memory:
            try:
                got = os.preadv(self._handle, [memory], offset)
            except OSError as broken:
                raise CheckpointError(f"{self.path} cannot be read ({broken.strerror}); copy or download it again") from None
            if not got:
                raise CheckpointError(f"{self.path} is truncated: it ends {len(memory)} bytes early; download it again")
            memory, offset = memory[got:], offset + got

    def fill_runs(self, memory: memoryview, base: int, firsts: np.ndarray, nbytes: int) -> None:
        """Read runs of `nbytes` bytes that begin `firsts` bytes after `base`, one after another."""
        for number, first in enumerate(firsts.tolist()):
            self.fill(memory[number * nbytes : (number + 1) * nbytes], base + first)

    def close(self) -> None:
        """Close the file."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __del__(self):
        self.close()


def as_memory(tensor: Any) -> memoryview:
    """The bytes of a contiguous CPU tensor, to read from and to write to, without a copy."""
    import torch

    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")
