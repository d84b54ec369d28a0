"""Shrinking: the smallest case that still fails alike, over plan first, then geometry. Numbers are left alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from . import plans
from .diagnose import verdict

_PARTS = ("tp", "pp", "vpp", "cp", "ep", "etp", "dp", "sp")


def smaller(lab, case) -> str | None:
    """The id of the smallest case, by ranks, then parts of the plan, then coincidences of the geometry, that breaks the same law; None
    where the case itself is the smallest. Candidates on which the bridge crashes, or that it refuses, are passed over."""
    for candidate in candidates(case):
        try:
            if lab.adapter.possible(candidate.toy.config, candidate.plan) is None and verdict(lab, candidate) is not None:
                return candidate.id
        except Exception:  # another failure than the one that is being made smaller
            continue
    return None


def candidates(case) -> Iterator:
    """Cases smaller than this one, the smallest first."""
    toys = [case.toy] if case.toy.geometry == "default" else [replace(case.toy, geometry="default"), case.toy]
    for text in [*simpler(case.plan), case.plan]:
        for toy in toys:
            if (toy, text) != (case.toy, case.plan):
                yield replace(case, toy=toy, plan=text)


def simpler(plan: str) -> list[str]:
    """Plans made of some of a plan's parts, fewest ranks and parts first; the split of layers goes with its pipeline."""
    sizes, sp = plans.sizes(plan), "sp" in plan.split(",")
    split = re.search(r"split([\d-]+)", plan)
    parts = [key for key in _PARTS if key in sizes and sizes[key] > 1] + (["sp"] if sp else [])
    found = {plans.SINGLE: 1}
    for mask in range(1, 2 ** len(parts) - 1):
        kept = {part for bit, part in enumerate(parts) if mask >> bit & 1}
        if text := _plan(kept, sizes, split and split[1]):
            found[text] = plans.ranks(text)
    return sorted((t for t in found if t != plan), key=lambda t: (found[t], len(t.split(",")), t))


def _plan(kept: set[str], sizes: dict[str, int], split: str | None) -> str | None:
    """The plan with these parts, or None where one needs another that is gone."""
    if ("sp" in kept and "tp" not in kept) or ("vpp" in kept and "pp" not in kept):
        return None
    words = [f"{key}{sizes[key]}" for key in _PARTS if key in kept and key != "sp"]
    if "pp" in kept and split:
        layers = [int(n) for n in split.split("-")]
        stages = sizes["pp"] * (sizes["vpp"] if "vpp" in kept else 1)
        if len(layers) != stages:  # virtual stages gone: a rank keeps its layers
            layers = [sum(layers[stage :: sizes["pp"]]) for stage in range(sizes["pp"])]
        split = "split" + "-".join(map(str, layers))
    words += [word for word, wanted in (("sp", "sp" in kept), (split, "pp" in kept and split)) if wanted]
    return ",".join(words)
