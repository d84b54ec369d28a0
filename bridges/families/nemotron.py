"""Nemotron-4 and Minitron: LayerNorm1p with biases, squared ReLU without a gate, rope on half of every head."""

from ..architecture import Decoder, Family
from ..blocks import GQA, MLP, Norm
from ..config import copy, fixed
from ..config_rules import activation, biases, rope
from ._shared import SIZES, derived_head_dim


def layernorm1p(module: str) -> Norm:
    """Both sides store gamma - 1 and add 1 in the forward pass, so the weight is carried unchanged."""
    return Norm(module, kind="LayerNorm", zero_centered=True)


NEMOTRON = Family(
    name="nemotron",
    title="Nemotron-4, Minitron, Nemotron-Mini",
    architectures=("NemotronForCausalLM",),
    model_types=("nemotron",),
    config=(
        *SIZES,
        copy("num_key_value_heads", "num_query_groups"),
        copy("head_dim", "kv_channels", default=derived_head_dim, null=derived_head_dim),
        copy("max_position_embeddings", "seq_length", default=4096),
        copy("norm_eps", "layernorm_epsilon", kind=float, default=1e-5),
        activation("relu2"),
        biases(),
        rope(partial=0.5),
        fixed("rope_percent", 0.5, "transformers reads partial_rotary_factor and takes 0.5 where it is absent"),
    ),
    decoder=Decoder(
        "model.layers.{i}", GQA(), MLP(gate=None), layernorm1p("input_layernorm"), layernorm1p("post_attention_layernorm")
    ),
    final_norm=layernorm1p("model.norm"),
)
