"""Declared lineage: tables that people review, saying which Hugging Face element each Megatron element is.

::

    decoder.layers.self_attention.linear_qkv.weight [5, 64, 48]
        [i, 0:16] = model.layers.{i}.self_attn.q_proj.weight[0:16]
        [i, 16:24] = model.layers.{i}.self_attn.k_proj.weight[0:8]

A key is megatron-core's own, with the global shape, padding left out. ``i`` and ``j`` run over an axis (``i=1:3`` over a part of it), slices that
take a whole axis at the end may be missing, ``.T`` exchanges the last two axes.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace

import numpy as np

from .coding import Code

HEADER = "# Which Hugging Face element each Megatron element is. Written by --snapshot-update, read by lineage.declared.\n"
_LETTERS = "ijkl"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Run:
    """A box of a Megatron tensor and where it comes from: slices of both sides as text; the source's name may hold {i}, {j}."""

    to: tuple[str, ...]
    name: str
    source: tuple[str, ...]
    transposed: bool = False

    def __str__(self) -> str:
        return f"{_brackets(self.to) or '[:]'} = {self.name}{_brackets(self.source)}{'.T' if self.transposed else ''}"


def trimmed(numbers: np.ndarray) -> np.ndarray:
    """Without the padding: zeros that end an axis."""
    for axis in range(numbers.ndim):
        used = np.flatnonzero(numbers.any(axis=tuple(a for a in range(numbers.ndim) if a != axis)))
        numbers = numbers[(slice(None),) * axis + (slice(0, used[-1] + 1 if len(used) else 0),)]
    return numbers


# ----------------------------------------------------------------------------------------------------------------- writing
def table(whole: dict[str, np.ndarray], code: Code) -> str:
    """The text of a model's lineage: {key: numbers [global shape]}."""
    lines = []
    for key, numbers in sorted(whole.items()):
        numbers = trimmed(numbers)
        lines.append(f"{key} {list(numbers.shape)}")
        lines += [f"    {run}" for run in describe(numbers, code)]
    return HEADER + "\n".join(lines) + "\n"


def describe(numbers: np.ndarray, code: Code, depth: int = 0) -> list[Run]:
    """Runs that make up a tensor, axis by axis: equal slabs of a first axis (layers, experts) are told once."""
    if numbers.ndim <= 2:
        flat = _boxes(numbers.reshape(-1, numbers.shape[-1]), code, is_row=numbers.ndim < 2)
        if numbers.ndim < 2 or len(flat) < len(numbers):
            return flat
        return min(flat, _stacked(numbers, code, depth), key=len)
    return _stacked(numbers, code, depth)


def _stacked(numbers: np.ndarray, code: Code, depth: int) -> list[Run]:
    slabs, out, start = [describe(slab, code, depth + 1) for slab in numbers], [], 0
    while start < len(slabs):
        end, common = start + 1, None
        while end < len(slabs) and (wider := _common(slabs[start : end + 1], start, _LETTERS[depth])) is not None:
            end, common = end + 1, wider
        letter = _LETTERS[depth] if (start, end) == (0, len(slabs)) else f"{_LETTERS[depth]}={start}:{end}"
        where = letter if common else str(start)
        out += [replace(run, to=(where, *run.to)) for run in common or slabs[start]]
        start = end
    return out


def _common(slabs: list[list[Run]], first: int, letter: str) -> list[Run] | None:
    """Runs that hold for all slabs with {letter} in the place of what counts with them; None where there are none."""
    if len({len(runs) for runs in slabs}) != 1:
        return None
    out = []
    for runs in zip(*slabs, strict=True):
        texts = ["\n".join((run.name, *run.source)) for run in runs]
        parts = [re.split(r"(?<=[.\n])(\d+)(?=[.\n]|$)", text) for text in texts]
        if len({(run.to, run.transposed) for run in runs}) != 1 or len({len(p) for p in parts}) != 1:
            return None
        text = ""
        for column in zip(*parts, strict=True):
            if len(set(column)) == 1:
                text += column[0]
            elif all(c.isdecimal() and int(c) - int(column[0]) == n for n, c in enumerate(column)):
                shift = int(column[0]) - first
                text += "{" + letter + (f"{shift:+d}" if shift else "") + "}"
            else:
                return None
        name, *source = text.split("\n")
        out.append(replace(runs[0], name=name, source=tuple(source)))
    return out


def _boxes(numbers: np.ndarray, code: Code, *, is_row: bool) -> list[Run]:
    """Runs of a matrix: consecutive rows whose pieces count on alike."""
    starts, out, row = np.asarray(code.starts), [], 0
    rows = [_pieces(line, starts) for line in numbers]
    while row < len(rows):
        end, step = row + 1, None
        while end < len(rows) and [p[:2] + p[3:] for p in rows[end]] == [p[:2] + p[3:] for p in rows[row]]:
            steps = {b[2] - a[2] for a, b in zip(rows[end - 1], rows[end], strict=True)}
            if len(steps) != 1 or step not in (None, *steps):
                break
            (step,) = steps
            end += 1
        for begin, stop, base, stride, which in rows[row]:
            if which >= 0:
                to = (_slice(begin, stop, 1, numbers.shape[1]),)
                to = to if is_row else (_slice(row, end, 1, len(numbers)), *to)
                out.append(_run(to, code, which, base, (end - row, step or 0), (stop - begin, stride)))
        row = end
    return out


def _pieces(line: np.ndarray, starts: np.ndarray) -> list[tuple[int, int, int, int, int]]:
    """(begin, end, first number, stride, source tensor or -1 for fill) of the parts of a row that count on evenly."""
    which = np.where(line == 0, -1, np.searchsorted(starts, line, side="right") - 1)
    steps = np.diff(line)
    if (which == which[0]).all() and (len(steps) == 0 or (steps == steps[0]).all()):
        return [(0, len(line), int(line[0]), int(steps[0]) if len(steps) else 0, int(which[0]))]
    out, begin = [], 0
    while begin < len(line):
        end, stride = begin + 1, 0
        if end < len(line) and which[end] == which[begin]:
            stride = int(steps[begin])
            while end < len(line) and which[end] == which[begin] and steps[end - 1] == stride:
                end += 1
        out.append((begin, end, int(line[begin]), stride, int(which[begin])))
        begin = end
    return out


def _run(to: tuple[str, ...], code: Code, which: int, base: int, rows: tuple[int, int], columns: tuple[int, int]) -> Run:
    """The source of a box as slices: rows and columns are (count, numbers from one to the next)."""
    shape, local = code.shapes[which], base - code.starts[which]
    place = np.unravel_index(local, shape)
    strides = [int(np.prod(shape[a + 1 :])) for a in range(len(shape))]
    axes = {}
    for count, step in (rows, columns):
        if count > 1:
            axis = next((a for a in range(len(shape)) if step % strides[a] == 0 and a not in axes), None)
            last = None if axis is None else place[axis] + (count - 1) * (step // strides[axis])
            if last is None or not 0 <= last < shape[axis]:
                return Run(to, f"{code.names[which]}.flat", (f"{local}{rows[1]:+d}*row{columns[1]:+d}*column",))
            axes[axis] = (int(place[axis]), count, step // strides[axis])
    source = []
    for axis, size in enumerate(shape):
        begin, count, step = axes.get(axis, (int(place[axis]), 1, 1))
        end = begin + count * step
        alone = axis not in axes and len(shape) > len(to)  # an axis that the box does not have
        source.append(str(begin) if alone else _slice(begin, end if end >= 0 else None, step, size))
    order = list(axes)
    return Run(to, code.names[which], tuple(source), transposed=len(order) == 2 and order[0] > order[1])


def _slice(begin: int, end: int | None, step: int, size: int) -> str:
    if (begin, end, step) == (0, size, 1):
        return ":"
    return f"{begin}:{'' if end is None else end}" + (f":{step}" if step != 1 else "")


def _brackets(slices: tuple[str, ...]) -> str:
    slices = list(slices)
    while slices and slices[-1] == ":":
        slices.pop()
    return f"[{', '.join(slices)}]" if slices else ""


# ----------------------------------------------------------------------------------------------------------------- reading
_LINE = re.compile(r"\s+(?:\[(?P<to>[^\]]*)\])? ?= (?P<name>[^\[\s]+?)(?:\[(?P<source>[^\]]*)\])?(?P<transposed>\.T)?$")


def parse(text: str, code: Code) -> dict[str, np.ndarray]:
    """{key: numbers} that a table declares for a coded checkpoint. Raises ValueError naming the line that makes no sense."""
    out: dict[str, np.ndarray] = {}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            if line and not line.startswith((" ", "#")):
                key, _, shape = line.partition(" ")
                out[key] = np.zeros([int(n) for n in shape.strip("[]").split(",")], dtype=np.int64)
            elif line.strip() and not line.startswith("#"):
                _declare(out[key], _LINE.match(line), code)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, UnboundLocalError) as wrong:
            raise ValueError(f"line {number}, {line.strip()!r}: {wrong}") from None
    return out


def _declare(target: np.ndarray, found: re.Match, code: Code) -> None:
    to = [part.strip() for part in (found["to"] or "").split(",") if part.strip()]
    ranges = {}
    for axis, part in enumerate(to):
        if part[0] in _LETTERS:
            letter, _, within = part.partition("=")
            begin, end = (int(n) for n in within.split(":")) if within else (0, target.shape[axis])
            ranges[letter] = range(begin, end)
    for values in itertools.product(*ranges.values()):
        known = dict(zip(ranges, values, strict=True))
        place = tuple(known[part[0]] if part[0] in known else _index(part) for part in to)
        name, source = (_filled(found[group] or "", known) for group in ("name", "source"))
        target[place] = _numbers(name, source, code, bool(found["transposed"]), target[place].shape)


def _numbers(name: str, source: str, code: Code, transposed: bool, shape: tuple[int, ...]) -> np.ndarray:
    if name.endswith(".flat"):
        base, row, column = (int(n) for n in re.match(r"(-?\d+)([+-]\d+)\*row([+-]\d+)\*column", source).groups())
        rows, columns = np.indices((1,) * (2 - len(shape)) + shape[-2:])
        local = base + row * rows + column * columns
        return (local + code.starts[code.names.index(name.removesuffix(".flat"))]).reshape(shape)
    which = code.names.index(name)
    numbers = np.arange(code.starts[which], code.starts[which + 1]).reshape(code.shapes[which])
    numbers = numbers[tuple(_index(part) for part in source.split(","))] if source else numbers
    return (numbers.swapaxes(-1, -2) if transposed else numbers).reshape(shape)


def _filled(text: str, known: dict[str, int]) -> str:
    def fill(found: re.Match) -> str:
        return str(known[found[1]] + int(found[2] or 0))

    return re.sub(r"\{([a-z])([+-]\d+)?\}", fill, text)


def _index(part: str) -> int | slice:
    numbers = [int(n) if n.strip() else None for n in part.split(":")]
    return numbers[0] if len(numbers) == 1 else slice(*numbers)
