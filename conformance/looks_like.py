"""What a wrong lineage looks like: the pattern behind two arrays of element numbers, in words a converter's author knows."""

from __future__ import annotations

import re

import numpy as np

from .coding import Code

_COUNTED = re.compile(r"(layers|layer|h|blocks|experts)\.(\d+)\.")


def looks_like(want: np.ndarray, got: np.ndarray, code: Code) -> str | None:
    """A phrase for how `got` differs from `want` (numbers of one Megatron tensor, same shape), or None where it fits no known pattern."""
    if want.shape != got.shape or not (want != got).any():
        return None
    for pattern in (_filled, _from_elsewhere, _swapped_sources, _transposed, _rows, _columns):
        if found := pattern(want, got, code):
            return found
    return None


def explained(key: str, want: np.ndarray, got: np.ndarray, code: Code) -> str | None:
    """A sentence naming the first element of `key` that differs, on both sides, and what it looks like; None where nothing differs."""
    differs = want != got
    if not differs.any():
        return None
    at = tuple(int(i) for i in np.argwhere(differs)[0])
    text = f"{key}{list(at)}: want {code.where(int(want[at]))}, got {code.where(int(got[at]))}"
    text += f"; {int(differs.sum())} of {want.size} elements differ"
    pattern = looks_like(want, got, code)
    return text + (f"; looks like: {pattern}" if pattern else "")


# ------------------------------------------------------------------------------------------------------ by where it comes from
def _filled(want, got, code) -> str | None:
    if not got[want != got].any():
        return "never filled, left at zero" if not got.any() else "part of it never filled, left at zero"
    return "not zero where padding should be" if not want[want != got].any() else None


def _names(numbers: np.ndarray, code: Code) -> list[tuple[str, int]]:
    """(tensor, place inside it) of each number; ("", 0) for fill and strangers."""
    which = np.searchsorted(np.asarray(code.starts), numbers, side="right") - 1
    real = (numbers > 0) & (numbers <= code.total)
    return [(code.names[w], int(n) - code.starts[w]) if ok else ("", 0) for n, w, ok in zip(numbers, which, real, strict=True)]


def _pairs(want, got, code) -> list[tuple[tuple[str, int], tuple[str, int]]]:
    """Sources of differing elements, as (wanted, got); at most some thousands, spread evenly."""
    at = np.flatnonzero((want != got).reshape(-1))
    at = at[:: max(1, len(at) // 4000)]
    return list(zip(_names(want.reshape(-1)[at], code), _names(got.reshape(-1)[at], code), strict=True))


def _from_elsewhere(want, got, code) -> str | None:
    """The same place of another layer or another expert."""
    shifts: dict[str, set[int]] = {}
    for (wanted, place), (given, other) in _pairs(want, got, code):
        if place != other or _COUNTED.sub(r"\1.#.", wanted) != _COUNTED.sub(r"\1.#.", given):
            return None
        for a, b in zip(_COUNTED.finditer(wanted), _COUNTED.finditer(given), strict=True):
            kind = "expert" if a[1] == "experts" else "layer"
            shifts.setdefault(kind, set()).add(int(b[2]) - int(a[2]))
    moved = {kind: by - {0} for kind, by in shifts.items() if by - {0}}
    if len(moved) != 1:
        return None
    ((kind, by),) = moved.items()
    letter = "i" if kind == "layer" else "j"
    return f"from {kind} {letter}{next(iter(by)):+d}" if len(by) == 1 else f"{kind}s in another order"


def _swapped_sources(want, got, code) -> str | None:
    """Two tensors in each other's place."""
    seen = set()
    for (wanted, place), (given, other) in _pairs(want, got, code):
        if not wanted or not given or place != other:
            return None
        seen.add((_last(wanted, given), _last(given, wanted)))
    if len(seen) == 2 and {(b, a) for a, b in seen} == seen:
        return "{} and {} swapped".format(*sorted(next(iter(seen))))
    if len(seen) == 1 and (pair := next(iter(seen)))[0] != pair[1]:
        return f"{pair[1]} in the place of {pair[0]}"
    return None


def _last(name: str, other: str) -> str:
    """The part of a tensor's name that another's lacks: gate, up, q_proj."""
    parts, others = name.split("."), other.split(".")
    own = next((a for a, b in zip(parts, others, strict=False) if a != b), parts[-1])
    return {"gate_proj": "gate", "up_proj": "up"}.get(own, own)


# ------------------------------------------------------------------------------------------------------------ by its order
def _transposed(want, got, code) -> str | None:
    square = want.ndim >= 2 and want.shape[-1] == want.shape[-2]
    return "transposed" if square and (got == want.swapaxes(-1, -2)).all() else None


def _rows(want, got, code) -> str | None:
    if want.ndim < 1:
        return None
    rows = want.ndim > 1
    a, b = (_first_block(x, want != got, 2 if rows else 1) for x in (want, got))
    order = _order(a if rows else a[:, None], b if rows else b[:, None])
    return order if order is None else _named(order, "rows" if rows else "elements", _groups(a, code))


def _columns(want, got, code) -> str | None:
    if want.ndim < 2:
        return None
    a, b = (_first_block(x, want != got, 2) for x in (want, got))
    order = _order(a.T, b.T)
    return order if order is None else _named(order, "columns", 1)


def _first_block(numbers: np.ndarray, differs: np.ndarray, dims: int) -> np.ndarray:
    """The matrix or vector (of a layer, of an expert) in which the first difference is."""
    lead = numbers.ndim - dims
    return numbers[tuple(np.argwhere(differs)[0][:lead])] if lead > 0 else numbers


def _order(want: np.ndarray, got: np.ndarray) -> np.ndarray | None:
    """order[r]: the row of `want` that row r of `got` is; None where got's rows are no permutation of want's."""
    places = {row.tobytes(): i for i, row in enumerate(np.ascontiguousarray(want))}
    order = [places.get(row.tobytes(), -1) for row in np.ascontiguousarray(got)]
    return np.asarray(order) if sorted(order) == list(range(len(want))) else None


def _groups(block: np.ndarray, code: Code) -> int:
    """How many times the first source comes back after another one: the groups of a fused projection."""
    names = [name for name, _ in _names(block.reshape(len(block), -1)[:, 0], code)]
    return max(1, sum(name == names[0] and (i == 0 or names[i - 1] != names[0]) for i, name in enumerate(names)))


def _named(order: np.ndarray, what: str, groups: int) -> str:
    count = len(order)
    start = np.arange(count)
    if (order == (start + order[0]) % count).all():
        if groups > 1 and order[0] % (count // groups) == 0:
            return f"groups or heads in another order: groups shifted by {order[0] // (count // groups)}"
        shift = int(order[0]) if order[0] <= count // 2 else int(order[0]) - count
        return f"{what} shifted by {shift}"
    if (order == start[::-1]).all():
        return f"{what} reversed"
    size = _block(order)
    blocks = order[::size] // size
    if size == 1 and (pairs := _interleaved(order)) and count in (2 * pairs[0], 2 * pairs[1]):
        return f"{what} interleaved: halves and pairs exchanged, as rotary layouts differ"
    if found := _interleaved(blocks):
        return f"blocks of TP shards interleaved: {found[1]} shards of {found[0]} parts, {what} in blocks of {size}"
    if groups > 1 and count % groups == 0 and (order // (count // groups) == start // (count // groups)).all():
        return f"heads permuted within a group: blocks of {size} {what}"
    if size > 1:
        return f"blocks of {size} {what} permuted" + (": groups or heads in another order" if groups > 1 else "")
    return f"{what} permuted"


def _block(order: np.ndarray) -> int:
    """The largest number of neighbours that stay together."""
    count = len(order)
    sizes = [n for n in range(count // 2, 0, -1) if count % n == 0]
    return next(
        n
        for n in sizes
        if (order.reshape(-1, n) - order.reshape(-1, n)[:, :1] == np.arange(n)).all() and not (order[::n] % n).any()
    )


def _interleaved(blocks: np.ndarray) -> tuple[int, int] | None:
    """(a, b) where the order is a x b blocks read the other way round."""
    count = len(blocks)
    for a in range(2, count // 2 + 1):
        if count % a == 0 and (blocks == np.arange(count).reshape(a, -1).T.reshape(-1)).all():
            return a, count // a
    return None
