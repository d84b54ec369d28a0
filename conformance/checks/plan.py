"""plan.*: all plans describe one model."""

from ..api import LawBroken
from ..plans import SINGLE
from .base import Check, bit_equal, close, same_names, several_ranks


def agreement(lab, case):
    """A plan's logits and exported weights are those of the single rank."""
    one, many = (lab.measured(case.toy, plan) for plan in (SINGLE, case.plan))
    lab.note(close("logits against the single rank", many["logits"], one["logits"]))
    same_names("exported tensors", many["weights"], one["weights"])
    for name, tensor in one["weights"].items():
        bit_equal(name, many["weights"][name], tensor)


def replicas(lab, case):
    """Ranks that hold the same piece of a parameter hold equal values: tensor-, data- and context-parallel replicas."""
    seen: dict[str, str] = {}
    for name, digest in lab.measured(case.toy, case.plan)["replicas"]:
        if seen.setdefault(name, digest) != digest:
            raise LawBroken(f"replicas of {name} differ between ranks")


CHECKS = [
    Check("plan.agreement", agreement, several_ranks),
    Check("plan.replicas", replicas, several_ranks, direction="import", gpu=True),
]
