"""Toy configs from published ones: structure kept (head ratio, tying, rope kind, window, biases), sizes small and telling.

Toys obey rules that `lint` enforces: pairwise distinct sizes, head_dim decoupled from hidden/heads, at least two groups and two heads a
group, an odd number of layers, a vocabulary that needs padding, a window shorter than the sequence. Geometries beside `default` copy
coincidences of production on purpose, and name them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from .experts import moe_fields

VOCAB = 131  # prime: never a multiple of any padding
LAYERS = 5  # odd: no pipeline of 2 or 4 stages divides it
HEAD_DIM = 8
WINDOW = 7  # keys a query may see; the suite's sequences are longer
ORIGINAL_CONTEXT = 8192  # megatron-core's llama3 scaling knows no other
NORM_OVER_HIDDEN = {"olmoe"}  # transformers sizes the query norm by hidden_size: no head_dim of its own is possible


def toy_config(published: Mapping[str, Any], geometry: str = "default") -> dict[str, Any]:
    """A toy's config.json from a published one. Raises KeyError for an unknown geometry, ValueError for a config without heads.

    Geometries: default; ``square`` (projections H x H, head_dim derived); ``even`` (4 layers: pipelines divide evenly); ``mha`` (every head
    its own group); ``mqa`` (one group); ``tied`` / ``untied`` (the other way of tying than published); ``windows`` (the upper layers slide,
    where the config has the switch); ``rescaled`` (llama3 rope of another original context and other factors than megatron-core knows).
    """
    return GEOMETRIES[geometry](_default(published), published)


def _default(published: Mapping[str, Any]) -> dict[str, Any]:
    config = copy.deepcopy(dict(published))
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    if heads % groups:
        raise ValueError(f"{heads} heads over {groups} groups: no toy keeps that ratio")
    config |= _heads(heads // groups, mha=groups == heads)
    config |= {"vocab_size": VOCAB, "num_hidden_layers": LAYERS, "head_dim": HEAD_DIM}
    config["hidden_size"] = hidden = _hidden(config)
    config["intermediate_size"] = 2 * hidden + 12 + 4 * ((2 * hidden + 12) % 8 == 0)
    config |= moe_fields(config)
    config = _cut(config, LAYERS)
    config.pop("quantization_config", None)  # a toy's files hold plain floats
    if config["model_type"] in NORM_OVER_HIDDEN:
        config = _square(config, published) | {"intermediate_size": config["intermediate_size"]}
    if (config.get("rope_scaling") or {}).get("rope_type") != "yarn":  # whose original context stays, and must stay the smaller
        config["max_position_embeddings"] = min(config.get("max_position_embeddings", 2048), 2048)
    if config.get("sliding_window") is not None:
        config["sliding_window"] = WINDOW
    if config.get("max_window_layers") is not None:
        config["max_window_layers"] = 2
    for key in ("rope_scaling", "rope_parameters"):
        if (config.get(key) or {}).get("rope_type") == "llama3":
            config[key]["original_max_position_embeddings"] = ORIGINAL_CONTEXT
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if config.get(key) is not None:
            config[key] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}[key]
    config.pop("dtype", None)
    config["torch_dtype"] = "float32"
    return config


def _heads(ratio: int, *, mha: bool) -> dict[str, int]:
    """Heads with the published number of heads a group, divisible by 4 ranks; two groups where that is possible, so that four
    tensor-parallel ranks have fewer groups than ranks."""
    if mha:
        return {"num_attention_heads": 4, "num_key_value_heads": 4}
    groups = 2 if ratio % 2 == 0 and ratio != 2 else 4
    return {"num_attention_heads": groups * ratio, "num_key_value_heads": groups}


def _hidden(config: Mapping[str, int]) -> int:
    """A multiple of heads (transformers asks for it) near 48 that equals no other size."""
    heads = config["num_attention_heads"]
    taken = {heads * HEAD_DIM, config["num_key_value_heads"] * HEAD_DIM, HEAD_DIM * heads // config["num_key_value_heads"]}
    step = max(3, 48 // heads)
    while step * heads in taken or step == HEAD_DIM:
        step += 1
    return step * heads


def _cut(config: dict, layers: int) -> dict:
    """The config with that many layers, lists of one entry a layer cut to them."""
    before = config["num_hidden_layers"]
    config = config | {"num_hidden_layers": layers}
    if config.get("layer_types"):
        config["layer_types"] = (config["layer_types"] * layers)[:layers] if before < layers else config["layer_types"][:layers]
    return config


def _even(config: dict, published: Mapping) -> dict:
    return _cut(config, 4)


def _square(config: dict, published: Mapping) -> dict:
    width = config["num_attention_heads"] * HEAD_DIM
    derived = {"head_dim"} - set(published)  # left to be derived where the published file leaves it so
    mlp = {"intermediate_size": width} if "moe_intermediate_size" in config or not moe_fields(config) else {}
    return {key: value for key, value in config.items() if key not in derived} | {"hidden_size": width} | mlp


def _with(**fields: Any) -> Callable[[dict, Mapping], dict]:
    return lambda config, published: config | fields


def _mha(config: dict, published: Mapping) -> dict:
    return config | {"num_key_value_heads": config["num_attention_heads"]}


def _windows(config: dict, published: Mapping) -> dict:
    return config | {"use_sliding_window": True, "sliding_window": WINDOW} if "use_sliding_window" in config else config


def _rescaled(config: dict, published: Mapping) -> dict:
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type") != "llama3":
        return config
    return config | {
        "rope_scaling": scaling | {"original_max_position_embeddings": 64, "low_freq_factor": 1.5, "high_freq_factor": 3.0}
    }


GEOMETRIES: dict[str, Callable[[dict, Mapping], dict]] = {
    "default": _with(),
    "square": _square,
    "even": _even,
    "mha": _mha,
    "mqa": _with(num_key_value_heads=1),
    "tied": _with(tie_word_embeddings=True),
    "untied": _with(tie_word_embeddings=False),
    "windows": _windows,
    "rescaled": _rescaled,
}
# Coincidences a geometry wants; the lint refuses any other.
COINCIDENCES = {
    "square": {"sizes", "head_dim"},
    "mha": {"heads", "sizes"},
    "mqa": {"groups", "sizes"},
    "even": {"layers"},
}
