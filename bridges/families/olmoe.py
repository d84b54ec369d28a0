"""OLMoE: experts in every layer, an RMSNorm over all query heads together and one over all key heads, head_dim always hidden / heads."""

from __future__ import annotations

from ..architecture import Decoder, Family
from ..blocks import GQA, MoE, Norm
from ..config import copy, fixed
from ..config_experts import experts_width, normalised_weights, routed
from ..config_rules import activation, biases, head_dim_derived, rope
from ._shared import SIZES_WITHOUT_MLP

OLMOE = Family(
    name="olmoe",
    title="OLMoE",
    architectures=("OlmoeForCausalLM",),
    model_types=("olmoe",),
    config=(
        *SIZES_WITHOUT_MLP,
        copy(
            "num_key_value_heads",
            "num_query_groups",
            default=lambda v: v["num_attention_heads"],
            null=lambda v: v["num_attention_heads"],
        ),
        head_dim_derived(),
        copy("max_position_embeddings", "seq_length", default=4096),
        copy("rms_norm_eps", "layernorm_epsilon", kind=float, default=1e-5),
        activation("silu"),
        biases(mlp=None),
        fixed("clip_qkv", None, "Megatron-Core clips QK logits, not projections"),
        rope(),
        *routed(absent=0.01, moe_layer_freq=1),
        experts_width(),
        normalised_weights(absent=False),
    ),
    decoder=Decoder(
        "model.layers.{i}",
        GQA(qk_norm="full_width"),
        MoE(),
        Norm("input_layernorm"),
        Norm("post_attention_layernorm"),
    ),
    final_norm=Norm("model.norm"),
)
