"""Toy sizes of mixtures of experts: enough experts to show order and offsets, widths that nothing else has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOPK = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_top_k", "moe_k")
WIDTH = ("moe_intermediate_size", "expert_ffn_hidden_size")
SHARED_WIDTH = ("shared_expert_intermediate_size",)
MANY = (12, 8, 16)  # divide over 2 and 4 ranks and leave every rank more than one


def moe_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a toy's mixture of experts, from a toy config whose other sizes are chosen; empty for a dense model."""
    present = [key for key in EXPERTS if config.get(key)]
    if not present:
        return {}
    few = _taken_counts(config)
    experts = next(n for n in MANY if n not in few)
    fields = dict.fromkeys(present, experts)
    fields |= {key: min(max(config[key], 2), 3) for key in TOPK if config.get(key)}
    widths = _widths(config, experts)
    own = [key for key in WIDTH if config.get(key)] or ["intermediate_size"]  # Mixtral, OLMoE, gpt-oss: the only MLP there is
    fields |= dict.fromkeys(own, next(widths))
    fields |= {key: next(widths) for key in SHARED_WIDTH if config.get(key)}
    return fields | _dense_layers(config)


def _taken_counts(config: Mapping[str, Any]) -> set[int]:
    heads, groups = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    return {heads, groups, heads // groups, config.get("head_dim")}


def _widths(config: Mapping[str, Any], experts: int):
    """Widths of an expert: divisible by 4 ranks, equal to no other size, nor twice or half of one (gate and up are stacked)."""
    heads, groups = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    dim = config["head_dim"]
    taken = {
        config["hidden_size"],
        config["intermediate_size"],
        2 * config["intermediate_size"],
        heads * dim,
        groups * dim,
        experts,
    }
    for width in range(20, 1000, 4):
        if not {width, 2 * width} & taken:
            yield width
            taken |= {width, 2 * width}


def _dense_layers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Two dense layers where the published model has any before its sparse ones."""
    fields: dict[str, Any] = {}
    if config.get("first_k_dense_replace"):
        fields["first_k_dense_replace"] = 2
    if config.get("mlp_only_layers"):
        fields["mlp_only_layers"] = [0, 1]
    return fields
