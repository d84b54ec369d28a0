"""The plans that the suite runs, as text; a bridge reads them in its own way.

``splitA-B-...`` names the decoder layers of every virtual stage in model order. Toys have 5 layers, so every pipeline here is uneven.
"""

from __future__ import annotations

import re

SINGLE = "tp1"
DEFAULT = (
    SINGLE,
    "tp2",
    "tp2,sp",
    "cp2",
    "pp2,split3-2",
    "pp2,vpp2,split2-1-1-1",
    "pp3,split2-2-1",
    "tp2,pp2,split2-3",
    "tp4",
)
NIGHTLY = (
    *DEFAULT,
    "dp2",
    "tp4,sp",
    "tp2,cp2,sp",
    "pp4,split1-2-1-1",
    "tp2,pp2,vpp2,sp,split1-2-1-1",
    "pp2,cp2,split2-3",
)
EVEN = ("pp2", "pp2,vpp2", "tp2,pp2,vpp2")  # for toys whose layers divide


def sizes(plan: str) -> dict[str, int]:
    """The parallel sizes in a plan's text: {"tp": 2, "pp": 2, ...}; sp and split are none."""
    return {key: int(size) for key, size in re.findall(r"\b(tp|pp|vpp|cp|ep|etp|dp)(\d+)", plan)}


def ranks(plan: str) -> int:
    """Ranks a plan needs."""
    size = sizes(plan)
    return size.get("tp", 1) * size.get("pp", 1) * size.get("cp", 1) * size.get("dp", 1)


def layout(plan: str) -> dict[str, int]:
    """What parallel_state is initialised with (data parallelism is what is left of the world)."""
    return {key: size for key, size in sizes(plan).items() if key != "dp"}
