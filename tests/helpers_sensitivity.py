"""Bridges that are wrong about one field of config.json, for test_sensitivity; no test of its own.

Each is the reference bridge that reads another config.json than the one it was given: ``helpers_sensitivity:NAME``.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from shardproof.bridges.adapter import ReferenceAdapter


class Misled(ReferenceAdapter):
    """The reference bridge, reading what `edit` makes of a config."""

    def __init__(self, edit):
        self.edit = edit

    def build(self, folder, plan, *, with_ddp):
        with tempfile.TemporaryDirectory() as other:
            for path in Path(folder).iterdir():
                if path.name != "config.json":
                    os.link(path, Path(other) / path.name)
            config = json.loads((Path(folder) / "config.json").read_text())
            (Path(other) / "config.json").write_text(json.dumps(self.edit(config)))
            return super().build(Path(other), plan, with_ddp=with_ddp)

    def snapshot(self, config):
        return super().snapshot(self.edit(dict(config)))


class Wordless(ReferenceAdapter):
    """Refuses what the reference bridge refuses, without a word about why."""

    def build(self, folder, plan, *, with_ddp):
        try:
            return super().build(folder, plan, with_ddp=with_ddp)
        except Exception:
            raise ValueError("this model is not supported") from None


class Silent(ReferenceAdapter):
    """Does not say that it knows use_cache."""

    def declared(self, config):
        return [field for field in super().declared(config) if field != "use_cache"]


class Dropping(ReferenceAdapter):
    """Builds models that drop a tenth of the attention in training, whatever config.json says."""

    def build(self, folder, plan, *, with_ddp):
        chunks = super().build(folder, plan, with_ddp=with_ddp)
        for module in chunks[0].modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.1
        return chunks


def _ignoring_unknown(config: dict) -> dict:
    known = ReferenceAdapter().declared({"model_type": config.get("model_type"), "architectures": config.get("architectures")})
    return {key: value for key, value in config.items() if key in known}


def _without(*names: str):
    return lambda config: {key: value for key, value in config.items() if key not in names}


def _with(**fields):
    return lambda config: config | fields


def _first_theta(config: dict) -> dict:
    """The outer rope_theta wins over the one in rope_parameters, where transformers takes the inner one."""
    inner = config.get("rope_parameters") or {}
    if "rope_theta" in config and "rope_theta" in inner:
        config["rope_parameters"] = inner | {"rope_theta": config["rope_theta"]}
    return config


def _null_is_absent(config: dict) -> dict:
    """Takes null for the family's usual value, also where transformers refuses it."""
    return config | {"num_hidden_layers": config["num_hidden_layers"] or 3, "hidden_act": config["hidden_act"] or "gelu"}


def _cache_moves_eps(config: dict) -> dict:
    return config | {"rms_norm_eps": 0.02} if config.get("use_cache") is False else config


def _scaling(change):
    """Another rope_scaling object, where there is one."""
    return lambda config: config | {"rope_scaling": change(config["rope_scaling"])} if config.get("rope_scaling") else config


EDITS = {
    **{
        f"BLIND_TO_{name.upper()}": _without(name)
        for name in ("hidden_act", "norm_eps", "partial_rotary_factor", "max_window_layers")
    },
    **{
        f"BLIND_TO_{name.upper()}": _without(name)
        for name in ("layer_types", "head_dim", "tie_word_embeddings", "sliding_window")
    },
    "BLIND_TO_BIASES": _without("attention_bias", "mlp_bias"),
    "ONE_GROUP_MORE_OR_LESS": lambda config: config | {"num_key_value_heads": 4},
    "WINDOW_ONE_WIDER": lambda config: config | {"sliding_window": (config.get("sliding_window") or 0) + 1},
    "BASE_CUT_TO_A_WHOLE_NUMBER": lambda config: config | {"rope_theta": int(config.get("rope_theta") or 10000)},
    "CONTEXT_ALWAYS_8192": _scaling(lambda rope: rope | {"original_max_position_embeddings": 8192}),
    "LINEAR_FACTOR_ROUNDED": _scaling(lambda rope: rope | {"factor": round(rope.get("factor") or 1)}),
    "EPS_IGNORED": _with(rms_norm_eps=1e-6),
    "WINDOWS_IGNORED": _with(use_sliding_window=False),
    "DROPOUT_IGNORED": _with(attention_dropout=0.0),
    "DROPOUT_HALVED": lambda config: config | {"attention_dropout": config.get("attention_dropout", 0.0) / 2},
    "DTYPE_IGNORED": lambda config: _without("dtype")(config) | {"torch_dtype": "float32"},
    "NEW_ROPE_IGNORED": _without("rope_parameters"),
    "OLD_SCALING_IGNORED": _without("rope_scaling"),
    "FIRST_THETA": _first_theta,
    "UNKNOWN_IGNORED": _ignoring_unknown,
    "NULL_IS_ABSENT": _null_is_absent,
    "CACHE_MOVES_EPS": _cache_moves_eps,
    "OTHER_DEFAULT": lambda config: {"rms_norm_eps": 1e-5} | config,
    "OTHER_WINDOW_DEFAULT": lambda config: {"sliding_window": 4097} | config,
}
RIGHT, WORDLESS, SILENT, DROPPING = ReferenceAdapter(), Wordless(), Silent(), Dropping()


def __getattr__(name: str):
    if name in EDITS:
        return Misled(EDITS[name])
    raise AttributeError(name)
