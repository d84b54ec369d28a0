"""The plans that the suite runs, as text; a bridge reads them in its own way.

``splitA-B-...`` names the decoder layers of every virtual stage in model order. Toys have 5 layers, so every pipeline here is uneven; one with
more has the rest of them on its last stage.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial

from shardproof.toy_models.decoder import section_of
from shardproof.toy_models.experts import EXPERTS as EXPERT_COUNTS
from shardproof.toy_models.layers import layer_count

from .prediction import predicts

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
    "tp2,pp2,cp2,sp,split3-2",
)
EVEN = ("pp2", "pp2,vpp2", "tp2,pp2,vpp2")  # for toys whose layers divide
OTHERS = (SINGLE, "tp2,pp2,sp,split2-3")  # for a family's other published variants, and for geometries beside the default
STEPPED = (SINGLE, "tp2,sp", "cp2")  # for what depends on a token's position, wherever ranks have it
TRAINED = (SINGLE, "tp2,sp", "pp2,vpp2,split2-1-1-1")  # for laws that take steps

# Models with experts: megatron-core trains them under tensor parallelism with sequence parallelism only.
EXPERTS = (
    SINGLE,
    "tp2,sp",
    "cp2",
    "pp2,split3-2",
    "pp2,vpp2,split2-1-1-1",
    "ep4",
    "ep2,etp2",
    "tp2,sp,ep2,etp1",
    "pp2,ep2,split2-3",
)
EXPERTS_NIGHTLY = (
    *EXPERTS,
    "ep2",
    "etp2",
    "tp2,sp,ep2",
    "tp2,sp,ep4,etp1",
    "dp2",
    "dp4,ep2",
    "etp4",
    "tp2,sp,etp1",
    "tp4,sp",
    "tp4,sp,ep2,etp2",
    "tp4,sp,ep4,etp1",
    "cp2,ep2",
    "tp2,cp2,sp,ep2,etp1",
    "pp3,split2-2-1",
    "pp2,vpp2,ep2,split1-2-1-1",
    "tp2,pp2,sp,ep2,etp1,split3-2",
    "tp2,pp2,cp2,sp,ep4,etp1,split2-3",
)
EXPERTS_OTHERS = (SINGLE, "tp2,pp2,sp,ep2,etp1,split2-3")
EXPERTS_TRAINED = (SINGLE, "tp2,sp,ep2,etp1", "pp2,vpp2,split2-1-1-1")
EXPERTS_EVEN = ("pp2", "pp2,ep2", "tp2,pp2,vpp2,sp")

ALONE = "pp2,split5-0"  # a stage with prediction layers and no other, for models that have them

GPU = (
    SINGLE,
    "tp2,sp",
    "pp2,split3-2",
    "cp2",
    "tp2,pp2,split2-3",
    "tp4,sp",
    "tp2,pp2,cp2,sp,split3-2",
)  # real ranks, as many as devices
EXPERTS_GPU = (SINGLE, "tp2,sp", "ep2", "pp2,ep2,split2-3", "tp2,sp,ep2,etp1", "ep4", "tp2,pp2,sp,ep2,etp1,split3-2")


def large(config: Mapping, profile: str) -> list[list[str]]:
    """Layouts of a published model at true size: of each list the first that a bridge can carry.

    A deep uneven pipeline; virtual stages with more tensor-parallel ranks than groups where the heads allow it, and experts cut otherwise than
    the rest; nightly as many experts' ranks and replicas as a large run has, and prediction layers on a stage of their own.
    """
    wanted = [
        _spread((8, 4, 2, 1), (8, 4, 2), (16, 8, 4, 2), ",etp1"),
        _spread((16, 8, 4, 2, 1), (4, 2), (16, 8, 4, 2), "", vpp=2, cp=2),
    ]
    if profile == "nightly":
        wanted.append(_spread((8, 4, 2, 1), (16, 12, 8, 4), (128, 64, 32, 16, 8), ",etp1"))
        wanted.append(_spread((2, 1), (2, 1), (8, 4), ",etp2", dp=16))
        wanted.append(_spread((4, 2, 1), (8, 4), (8, 4), ",etp1", alone=True) if predicts(config) else [])
    layers = config["num_hidden_layers"]
    return [[text for make in found if (text := make(layers, routed(config)))] for found in wanted if found]


def _spread(tps, pps, eps, etp, *, vpp=1, cp=1, dp=1, alone=False):
    """Functions of (layers, whether there are experts) that write a plan, the largest first; None where it has too few layers."""

    def write(tp, pp, ep, layers, experts):
        stages = pp * vpp - alone
        if layers < stages or (ep is None) == experts:
            return None
        base, extra = divmod(layers, stages)
        split = [base + (s < extra) for s in range(stages)] + [0] * alone
        words = [f"tp{tp}", f"pp{pp}", f"vpp{vpp}" * (vpp > 1), f"cp{cp}" * (cp > 1), f"dp{dp}" * (dp > 1), "sp" * (tp > 1)]
        words += [f"ep{ep}{etp}" if experts else "", f"split{'-'.join(map(str, split))}"]
        return ",".join(filter(None, words))

    return [partial(write, tp, pp, ep) for tp in tps for ep in (*eps, None) for pp in pps]


def on_gpus(config: Mapping) -> tuple[str, ...]:
    """The plans of the GPU tier; one that needs more devices than there are reads not-run."""
    return EXPERTS_GPU if routed(config) else GPU


def wanted(config: Mapping, geometry: str, profile: str, *, first: bool) -> tuple[str, ...]:
    """The plans of a toy; one that it cannot carry gives no case. first: whether it is its family's first variant, which gets all."""
    return tuple(stretched(plan, layer_count(section_of(config))) for plan in _wanted(config, geometry, profile, first))


def stretched(plan: str, layers: int) -> str:
    """A plan for five layers as one for another number of them, from five on: the last stage that has some takes what there is more."""
    found = re.search(r"split([\d-]+)", plan)
    if not found:
        return plan
    stages = [int(number) for number in found[1].split("-")]
    last = max(at for at, number in enumerate(stages) if number)
    stages[last] += max(0, layers - sum(stages))
    return plan.replace(found[0], f"split{'-'.join(map(str, stages))}")


def _wanted(config: Mapping, geometry: str, profile: str, first: bool) -> tuple[str, ...]:
    dense, experts = (DEFAULT, NIGHTLY, EVEN, OTHERS), (EXPERTS, EXPERTS_NIGHTLY, EXPERTS_EVEN, EXPERTS_OTHERS)
    default, nightly, even, others = experts if routed(config) else dense
    if geometry == "even":
        return (SINGLE, *even)
    if geometry == "stepped":
        return STEPPED
    alone = (ALONE,) if predicts(config) else ()
    if profile == "nightly":
        return nightly + alone
    return default + alone if first and geometry == "default" else others


def build(config: Mapping) -> tuple[bool, ...]:
    """What a bridge needs machinery for in a model: experts, latent attention, prediction layers."""
    return routed(config), bool(config.get("kv_lora_rank")), predicts(config)


def routed(config: Mapping) -> bool:
    """Whether a config has routed experts."""
    return any(config.get(key) for key in EXPERT_COUNTS)


def sizes(plan: str) -> dict[str, int]:
    """The parallel sizes in a plan's text: {"tp": 2, "pp": 2, ...}; sp and split are none."""
    return {key: int(size) for key, size in re.findall(r"\b(tp|pp|vpp|cp|ep|etp|dp)(\d+)", plan)}


def ranks(plan: str) -> int:
    """Ranks a plan needs: experts live on the dense ranks of their pipeline stage, of which there must be a multiple."""
    size = sizes(plan)
    tp, pp, cp, ep, dp = (size.get(key, 1) for key in ("tp", "pp", "cp", "ep", "dp"))
    return pp * math.lcm(tp * cp * dp, size.get("etp", tp) * ep)


def layout(plan: str) -> dict[str, int]:
    """What parallel_state is initialised with (data parallelism is what is left of the world)."""
    return {key: size for key, size in sizes(plan).items() if key != "dp"}
