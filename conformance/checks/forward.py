"""forward.*: logits equal transformers' in fp32 with loud weights."""

from .base import Check, close, every_plan


def logits(lab, case):
    """Logits equal transformers' within 1e-5 of the largest, on sequences longer than any window, through real ranks."""
    lab.note(close("logits", lab.measured(case.toy, case.plan)["logits"], lab.reference(case.toy)["logits"]))


def long(lab, case):
    """Past position 1000, where scaled rope shows, logits still equal transformers'."""
    shared = {"folder": str(lab.folder(case.toy)), "vocab": case.toy.config["vocab_size"]}
    want = lab.clean_task("long_reference", **shared)
    lab.note(close("logits at positions past 1000", lab.rank_task("long_logits", case.plan, **shared)[0], want))


def _where_rope_scales(toy, possible, first):
    """One rank; the family's first variant and those whose rope is scaled."""
    scaled = toy.config.get("rope_scaling") or (toy.config.get("rope_parameters") or {}).get("rope_type", "default") != "default"
    return possible[:1] if scaled or (first and toy.geometry == "default") else []


CHECKS = [
    Check("forward.logits", logits, every_plan, direction="import"),
    Check("forward.long", long, _where_rope_scales, direction="import"),
]
