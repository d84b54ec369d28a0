"""Geometries as texts: ``heads6-groups3-dim12``, so that a drawn toy has a case id and the id gives the toy back."""

from __future__ import annotations

import re
from collections.abc import Mapping

# In this order; each means what it says, `width` the rows of an expert's gate, `mlp` those of a dense one's.
KEYS = ("heads", "groups", "dim", "hidden", "mlp", "layers", "vocab", "window", "experts", "topk", "width")
PART = re.compile(r"([a-z]+)([1-9][0-9]*)")


class UnknownGeometry(KeyError):
    """A geometry's text that means nothing, and what would."""

    __str__ = Exception.__str__  # KeyError would quote it


def parse(text: str) -> dict[str, int]:
    """The sizes that a text asks for. Raises UnknownGeometry for text that is no geometry, naming what there is and the right spelling."""
    parts = [PART.fullmatch(part) for part in text.split("-")]
    unknown = next((t for t, m in zip(text.split("-"), parts, strict=True) if m is None or m[1] not in KEYS), None)
    if unknown is not None:
        raise UnknownGeometry(
            f"{text!r} is no geometry: {unknown!r} is neither a named one nor a size; sizes are {', '.join(KEYS)}, e.g. heads6-dim12"
        )
    sizes = {m[1]: int(m[2]) for m in parts if m}
    if spell(sizes) != text:
        raise UnknownGeometry(f"geometry {text!r} is spelled {spell(sizes)!r}: each size once, in the order {', '.join(KEYS)}")
    return sizes


def spell(sizes: Mapping[str, int]) -> str:
    """The one text of these sizes."""
    return "-".join(f"{key}{sizes[key]}" for key in KEYS if key in sizes)
