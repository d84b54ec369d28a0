"""scale.*: the proof on published configs at true size."""

from .. import plans
from ..api import LawBroken
from .base import Check, once_a_variant


def proof(lab, case):
    """At true size, under a large plan, every element moves once, and megatron-core itself builds the pieces that the moves fill."""
    config = case.toy.published
    plan = next(p for p in _candidates(config) if lab.adapter.possible(config, p) is None)
    if hole := lab.adapter.prove(config, plan):
        raise LawBroken(f"{plan}: {hole}")
    ranks = plans.ranks(plan)
    for rank in sorted({0, ranks // 2, ranks - 1}):
        if hole := lab.fake_task("build_on_meta", plan, rank, config=config):
            raise LawBroken(f"{plan}, rank {rank}: {hole}")


def _candidates(config):
    for tp in (8, 4, 2, 1):
        for pp in (8, 4, 2, 1):
            dense = f"tp{tp},pp{pp}" + (",sp" if tp > 1 else "")
            if plans.routed(config):
                yield from (f"{dense},ep{ep},etp1" for ep in (8, 4, 2))
            yield dense


CHECKS = [
    Check(
        "scale.proof",
        proof,
        once_a_variant,
        needs=(
            "prove",
            "build_on_meta",
        ),
    )
]
