"""Mixtral: Mistral's attention, eight experts in every layer, the weights of the chosen ones normalised."""

from __future__ import annotations

from ..architecture import Decoder, Family
from ..blocks import GQA, MLP, MoE, Norm
from ..config import constant, copy, fixed
from ..config_experts import experts_width, routed
from ..config_rules import activation, rope, window
from ._shared import SIZES_WITHOUT_MLP, derived_head_dim

MIXTRAL = Family(
    name="mixtral",
    title="Mixtral",
    architectures=("MixtralForCausalLM",),
    model_types=("mixtral",),
    config=(
        *SIZES_WITHOUT_MLP,
        copy("num_key_value_heads", "num_query_groups", default=8, null=lambda v: v["num_attention_heads"]),
        copy("head_dim", "kv_channels", default=derived_head_dim, null=derived_head_dim),
        copy("max_position_embeddings", "seq_length", default=131072),
        copy("rms_norm_eps", "layernorm_epsilon", kind=float, default=1e-5),
        activation("silu"),
        constant(add_bias_linear=False),
        window(absent=None),
        rope(base=1000000.0),
        *routed(absent=0.001, moe_router_pre_softmax=False, moe_layer_freq=1),
        experts_width(),
        fixed(
            "router_jitter_noise", 0.0, "transformers' training noise reaches the experts too, Megatron-Core's the router alone"
        ),
    ),
    decoder=Decoder(
        "model.layers.{i}",
        GQA(),
        MoE("block_sparse_moe", expert=MLP(prefix="", gate="w1", up="w3", down="w2")),
        Norm("input_layernorm"),
        Norm("post_attention_layernorm"),
    ),
    final_norm=Norm("model.norm"),
)
