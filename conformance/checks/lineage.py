"""lineage.*: every Megatron element is the Hugging Face element it should be, at any plan; padding is fill."""

import numpy as np

from ..api import LawBroken
from ..plans import SINGLE
from .base import Check, every_plan, several_ranks


def once(lab, case):
    """Every Hugging Face element is in the model exactly once, whatever ranks hold it; the rest is zero padding."""
    code, whole = lab.lineage(case.toy, case.plan)
    numbers = np.concatenate([n.reshape(-1) for n in whole.values()])
    if (numbers < 0).any() or (numbers > code.total).any():
        bad = int(numbers[(numbers < 0) | (numbers > code.total)][0])
        raise LawBroken(f"a Megatron element holds {bad}: the value of no Hugging Face element")
    count = np.bincount(numbers, minlength=code.total + 1)[1:]
    wrong = np.flatnonzero(count != 1)
    if len(wrong):
        raise LawBroken(
            f"{len(wrong)} elements are not taken once; first {code.where(int(wrong[0]) + 1)}, taken {int(count[wrong[0]])} times"
        )


def same(lab, case):
    """An element's source does not depend on the plan: megatron-core's own view of the global tensors is that of one rank."""
    code, whole = lab.lineage(case.toy, case.plan)
    _, one = lab.lineage(case.toy, SINGLE)
    if set(whole) != set(one):
        raise LawBroken(f"global tensors differ from the single rank's: {sorted(set(whole) ^ set(one))[:4]}")
    for key, want in one.items():
        common = tuple(slice(0, min(a, b)) for a, b in zip(want.shape, whole[key].shape, strict=True))
        got, want = whole[key], want
        if (got[common] != want[common]).any():
            at = tuple(int(i) for i in np.argwhere(got[common] != want[common])[0])
            raise LawBroken(f"{key}{list(at)}: want {code.where(int(want[at]))}, got {code.where(int(got[at]))}")
        padding = got.copy()
        padding[common] = 0
        if padding.any():
            raise LawBroken(f"{key}: padding beyond {list(want.shape)} is not zero")


CHECKS = [
    Check("lineage.once", once, every_plan, direction="import", gpu=True),
    Check("lineage.same", same, several_ranks, direction="import", gpu=True),
]
