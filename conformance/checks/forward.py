"""forward.*: logits equal transformers' in fp32 with loud weights."""

from .base import Check, close, every_plan, once_a_variant


def logits(lab, case):
    """Logits equal transformers' within 1e-5 of the largest, on sequences longer than any window, through real ranks."""
    lab.note(close("logits", lab.measured(case.toy, case.plan)["logits"], lab.reference(case.toy)["logits"]))


def long(lab, case):
    """Past position 1000, where scaled rope shows, logits still equal transformers'."""
    shared = {"folder": str(lab.folder(case.toy)), "vocab": case.toy.config["vocab_size"]}
    want = lab.clean_task("long_reference", **shared)
    lab.note(close("logits at positions past 1000", lab.rank_task("long_logits", case.plan, **shared)[0], want))


CHECKS = [
    Check("forward.logits", logits, every_plan, direction="import"),
    Check("forward.long", long, once_a_variant, direction="import"),
]
