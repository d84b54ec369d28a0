"""Llama 2, 3, 3.1, 3.2 and the Llama-Nemotron Nano models: RMSNorm, grouped-query attention, SwiGLU, llama3 rope scaling."""

from ..architecture import Decoder, Family
from ..blocks import GQA, MLP, Norm
from ..config import copy
from ..config_rules import activation, biases, rope
from ._shared import SIZES, derived_head_dim

LLAMA = Family(
    name="llama",
    title="Llama 2 / 3 / 3.1 / 3.2, Llama-Nemotron Nano",
    architectures=("LlamaForCausalLM",),
    model_types=("llama",),
    config=(
        *SIZES,
        copy(
            "num_key_value_heads",
            "num_query_groups",
            default=lambda v: v["num_attention_heads"],
            null=lambda v: v["num_attention_heads"],
        ),
        copy("head_dim", "kv_channels", default=derived_head_dim, null=derived_head_dim),
        copy("max_position_embeddings", "seq_length", default=2048),
        copy("rms_norm_eps", "layernorm_epsilon", kind=float, default=1e-6),
        activation("silu"),
        biases(),
        rope(),
    ),
    decoder=Decoder("model.layers.{i}", GQA(), MLP(), Norm("input_layernorm"), Norm("post_attention_layernorm")),
    final_norm=Norm("model.norm"),
)
