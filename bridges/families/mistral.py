"""Mistral 7B and Mistral Small (text): Llama's blocks with a sliding window (v0.1) or none."""

from ..architecture import Decoder, Family
from ..blocks import GQA, MLP, Norm
from ..config import constant, copy
from ..config_rules import activation, rope, window
from ._shared import SIZES, derived_head_dim

MISTRAL = Family(
    name="mistral",
    title="Mistral 7B, Mistral Small",
    architectures=("MistralForCausalLM",),
    model_types=("mistral",),
    config=(
        *SIZES,
        copy("num_key_value_heads", "num_query_groups", default=8),
        copy("head_dim", "kv_channels", default=derived_head_dim, null=derived_head_dim),
        copy("max_position_embeddings", "seq_length", default=131072),
        copy("rms_norm_eps", "layernorm_epsilon", kind=float, default=1e-6),
        activation("silu"),
        constant(add_bias_linear=False),
        window(),
        rope(),
    ),
    decoder=Decoder("model.layers.{i}", GQA(), MLP(), Norm("input_layernorm"), Norm("post_attention_layernorm")),
    final_norm=Norm("model.norm"),
)
