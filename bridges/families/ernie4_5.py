"""ERNIE 4.5 (dense): Llama's blocks, rotary embeddings over neighbouring dimensions, one flag for all biases."""

from ..architecture import Decoder, Family
from ..blocks import GQA, MLP, Norm
from ..config import constant, copy
from ..config_rules import activation, biases, rope
from ._shared import SIZES_TIED, derived_head_dim

ERNIE4_5 = Family(
    name="ernie4_5",
    title="ERNIE 4.5 (dense)",
    architectures=("Ernie4_5ForCausalLM",),
    model_types=("ernie4_5",),
    config=(
        *SIZES_TIED,
        copy("num_key_value_heads", "num_query_groups", default=2, null=lambda v: v["num_attention_heads"]),
        copy("head_dim", "kv_channels", default=128, null=derived_head_dim),
        copy("max_position_embeddings", "seq_length", default=131072),
        copy("rms_norm_eps", "layernorm_epsilon", kind=float, default=1e-5),
        activation("silu"),
        rope(base=500000.0),
        constant(rotary_interleaved=True),
        biases(attention="use_bias", mlp="use_bias"),
    ),
    decoder=Decoder("model.layers.{i}", GQA(), MLP(), Norm("input_layernorm"), Norm("post_attention_layernorm")),
    final_norm=Norm("model.norm"),
)
