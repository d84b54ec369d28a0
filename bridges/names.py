"""Roles -> Megatron parameter names, per layer spec. Families and blocks speak of roles only.

The pre-attention and pre-MLP norms move between modules: Transformer Engine's spec fuses them into the next linear layer.
"""

from __future__ import annotations

_SHARED = {
    "embedding": "embedding.word_embeddings",
    "head": "output_layer",
    "final_norm": "decoder.final_layernorm.{}",
    "attention.qkv": "self_attention.linear_qkv",
    "attention.out": "self_attention.linear_proj",
    "attention.q_norm": "self_attention.q_layernorm.{}",
    "attention.k_norm": "self_attention.k_layernorm.{}",
    "mlp.fc1": "mlp.linear_fc1",
    "mlp.fc2": "mlp.linear_fc2",
}
_NORMS = {
    "transformer_engine": {
        "attention.norm": "self_attention.linear_qkv.layer_norm_{}",
        "mlp.norm": "mlp.linear_fc1.layer_norm_{}",
    },
    "local": {"attention.norm": "input_layernorm.{}", "mlp.norm": "pre_mlp_layernorm.{}"},
}
SPECS = tuple(_NORMS)


def parameter(role: str, part: str, spec: str, layer: int | None = None) -> str:
    """Name of a role's ``weight`` or ``bias`` with the *global* layer number, for ``transformer_impl`` = `spec`."""
    module = (_SHARED | _NORMS[spec])[role]
    name = module.format(part) if "{}" in module else f"{module}.{part}"
    return name if layer is None else f"decoder.layers.{layer}.{name}"
