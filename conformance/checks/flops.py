"""flops.*: the formula is what a counter counts, and behaves as sizes do."""

from shardproof.toy_models.experts import EXPERTS as EXPERT_COUNTS
from shardproof.toy_models.experts import TOPK
from shardproof.toy_models.experts import WIDTH as EXPERT_WIDTH

from ..api import LawBroken
from .base import Check, once_a_variant, single

_SIZES = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "head_dim")
_MLP_SIZES = (*EXPERT_WIDTH, *EXPERT_COUNTS, *TOPK, "intermediate_size")  # the last only where experts have no width of their own


def counted(lab, case):
    """The formula equals the FLOPs that torch counts on transformers' eager forward pass, exactly, at two lengths and batches."""
    for seq_len, batch in ((24, 1), (17, 3)):
        want = lab.clean_task("counted_flops", config=case.toy.config, seq_len=seq_len, batch=batch)
        got = lab.adapter.flops(case.toy.config, seq_len, batch)
        if got != want:
            raise LawBroken(f"{batch} x {seq_len} tokens: formula {got}, counted {want} (difference {got - want})")


def monotone(lab, case):
    """FLOPs grow with every size, and layers add up: each layer costs the same."""
    config, flops = dict(case.toy.published), lab.adapter.flops
    config["head_dim"] = (
        config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    )  # else it would shrink as heads grow
    base = flops(config, 64, 1)
    own = any(config.get(key) for key in EXPERT_WIDTH)
    for key in _SIZES + (_MLP_SIZES[:-1] if own else _MLP_SIZES):
        if config.get(key) and not flops(config | {key: 2 * config[key]}, 64, 1) > base:
            raise LawBroken(f"doubling {key} does not raise the FLOPs of {case.toy.variant}")
    heads, groups = config["num_attention_heads"], config.get("num_key_value_heads")
    if groups and groups < heads and not flops(config | {"num_key_value_heads": heads}, 64, 1) > base:
        raise LawBroken("a key-value head for every query head does not raise the FLOPs")
    if not flops(config, 65, 1) > base or flops(config, 64, 2) != 2 * base:
        raise LawBroken("FLOPs must grow with the sequence and be linear in the batch")
    layers, flat = config["num_hidden_layers"], {k: v for k, v in config.items() if k != "layer_types"}
    one, two, three = (flops(flat | {"num_hidden_layers": layers + n}, 64, 1) for n in range(3))
    if two - one != three - two:
        raise LawBroken(f"layers do not add up: {two - one} then {three - two}")


CHECKS = [
    Check("flops.counted", counted, single, needs=("flops",)),
    Check("flops.monotone", monotone, once_a_variant, needs=("flops",)),
]
