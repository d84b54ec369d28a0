"""names.*: the two worlds' names cover each other."""

from ..api import LawBroken
from .base import Check, disk, every_plan, same_names


def coverage(lab, case):
    """Every Hugging Face tensor is consumed and produced exactly once, under its own name, shape and dtype, from every plan."""
    want = {n: (tuple(t.shape), t.dtype) for n, t in disk(lab.folder(case.toy)).items()}
    if doubled := lab.measured(case.toy, case.plan)["doubled"]:
        raise LawBroken(f"{len(doubled)} tensors are exported more than once: {doubled[:4]}")
    got = {n: (tuple(t.shape), t.dtype) for n, t in lab.measured(case.toy, case.plan)["weights"].items()}
    same_names("exported tensors", got, want)
    same_names("exported (name, shape, dtype)", dict.fromkeys(got.items()), dict.fromkeys(want.items()))


CHECKS = [Check("names.coverage", coverage, every_plan, gpu=True)]
