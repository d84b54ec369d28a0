"""roundtrip.*: bit-exact both ways."""

from ..measure import FACTOR
from .base import Check, bit_equal, disk, every_plan, same_names


def bits(lab, case):
    """What was imported is exported bit for bit, from every plan; all ranks export the same."""
    _compare(lab, case, "weights", 1.0)
    digests = lab.measured(case.toy, case.plan, case.dtype)["digests"]
    if len(set(digests)) != 1:
        same_names(
            "ranks that agree with rank 0 on the export",
            {r: 1 for r, d in enumerate(digests) if d == digests[0]},
            dict.fromkeys(range(len(digests))),
        )


def perturbed(lab, case):
    """After every Megatron weight changed, the export is the changed weights, not the source's."""
    _compare(lab, case, "perturbed", FACTOR)


def _compare(lab, case, which, factor):
    want = disk(lab.folder(case.toy, case.dtype))
    got = lab.measured(case.toy, case.plan, case.dtype)[which]
    same_names("exported tensors", got, want)
    for name, tensor in want.items():
        bit_equal(f"{which} {name}", got[name], tensor * factor if factor != 1.0 else tensor)


CHECKS = [
    Check("roundtrip.bits", bits, every_plan, gpu=True),
    Check("roundtrip.bits16", bits, lambda toy, possible, first: possible[:2] if first else [], dtypes=("bf16",)),
    Check("roundtrip.perturbed", perturbed, every_plan, direction="export", gpu=True),
]
