"""Faults of the class `scale`: what only true sizes show. The bridge's own proof meets them; the fault is in what it proves."""

from functools import cache

from .base import Fault
from .levers import built, parameters

SCALE = ("scale.proof",)


def _wraps(right, config, plan):
    """Row numbers are kept in 9 bits: at true size two elements have one number."""
    rows = config["num_attention_heads"] * (config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    if rows > 2**9:
        return f"row {2**9} of the fused projection is taken twice: its number wrapped"
    return right(config, plan)


def _another_stage(right, config, plan):
    """Under a large pipeline a later stage is built with another number of layers than the moves fill."""
    from .levers import at

    rank, size = at("pp")
    if size > 1 and rank:
        return f"stage {rank} of {size} has a layer that no move fills"
    return right(config, plan)


@cache
def _written() -> set[tuple]:
    """The sizes of every toy that somebody wrote down: layers, hidden size, heads, groups."""
    from shardproof import fixtures

    from ..cases import ADVERSARIAL, Toy

    toys = [Toy(variant, geometry) for variant in fixtures.names() for geometry in ("default", *ADVERSARIAL)]
    return {
        (c["num_hidden_layers"], c["hidden_size"], c["num_attention_heads"], c.get("num_key_value_heads"))
        for c in (toy.config for toy in toys)
        if "num_attention_heads" in c
    }


def _sizes_assumed(chunks):
    """Norms are off where sizes are not those of some written toy."""
    for model in chunks:
        c = model.config
        if (c.num_layers, c.hidden_size, c.num_attention_heads, c.num_query_groups) not in _written():
            for _, param in parameters([model], "layer_norm_weight", "layernorm.weight"):
                param.data.mul_(1.5)


FAULTS = [
    Fault("numbers_wrap_at_true_size", "scale", "row numbers wrap at true sizes", SCALE, {"prove": _wraps}, bugs=("U078",)),
    Fault("sizes_assumed", "scale", "right for the sizes that tests were written with, wrong for others", ("explore.drawn",),
          built(_sizes_assumed)),
    Fault("deep_pipeline_uneven", "scale", "a deep pipeline is built with other stages than the moves fill", SCALE,
          {"build_on_meta": _another_stage}, bugs=("U059",)),
]  # fmt: skip
