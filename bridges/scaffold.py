"""A new family's first draft, from its config.json and from the tensor names that transformers gives such a model.

The draft says what can be read off; whatever cannot is a TODO, and a red case of the suite.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config_common import BOOKKEEPING, NEUTRAL
from .errors import ConfigError

# What a rule owns -> (how a family file spells it, what it imports from config, config_rules, _shared). DEFAULT is transformers' class default,
# DEFAULT|OTHER the other where the class has none.
_HEADS = 'lambda v: v["num_attention_heads"]'
_RULES: dict[tuple[str, ...], tuple[str, str]] = {
    ("num_key_value_heads",): (
        f'copy("num_key_value_heads", "num_query_groups", default=DEFAULT|{_HEADS}, null={_HEADS})',
        "copy",
    ),
    ("head_dim",): (
        'copy("head_dim", "kv_channels", default=DEFAULT|derived_head_dim, null=derived_head_dim)',
        "copy derived_head_dim",
    ),
    ("max_position_embeddings",): ('copy("max_position_embeddings", "seq_length", default=DEFAULT)', "copy"),
    ("rms_norm_eps",): ('copy("rms_norm_eps", "layernorm_epsilon", kind=float, default=DEFAULT)', "copy"),
    ("norm_eps",): ('copy("norm_eps", "layernorm_epsilon", kind=float, default=DEFAULT)', "copy"),
    ("hidden_act",): ("activation(DEFAULT)", "activation"),
    ("attention_bias", "mlp_bias"): ("biases()", "biases"),
    ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"): ("windows_by_layer()", "windows_by_layer"),
    ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"): ("rope(base=DEFAULT)", "rope"),
}
_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "tie_word_embeddings")
_SIZES += ("attention_dropout", "dtype", "torch_dtype")
_FROM = {"copy": "config", "constant": "config", "derived_head_dim": "_shared", "SIZES": "_shared", "SIZES_TIED": "_shared"}
_PROBE = """
import copy, json, sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM
config = json.load(sys.stdin)
parsed = AutoConfig.for_model(**copy.deepcopy(config))
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(parsed)
tied = set(model.all_tied_weights_keys)
print(json.dumps({
    "tensors": {n: list(t.shape) for n, t in model.state_dict().items() if n not in tied},
    "defaults": json.loads(type(parsed)().to_json_string(use_diff=False)),
}))
"""


@dataclass
class Draft:
    """What the templates are filled with."""

    name: str
    title: str
    architectures: tuple[str, ...]
    model_type: str
    rules: list[str] = field(default_factory=list)
    unknown: list[tuple[str, str]] = field(default_factory=list)
    imports: set[str] = field(default_factory=set)
    sizes: str = "SIZES"
    layers: str = "model.layers"
    attention: str = "GQA()"
    mlp: str = "MLP()"
    norms: tuple[str, str] = ('Norm("input_layernorm")', 'Norm("post_attention_layernorm")')
    final_norm: str = 'Norm("model.norm")'
    leftover: list[str] = field(default_factory=list)

    def fields(self) -> dict[str, Any]:
        """All of it, imports sorted by the module that they come from."""
        homes = {
            home: sorted(i for i in self.imports if _FROM.get(i, "config_rules") == home)
            for home in ("config", "config_rules", "_shared")
        }
        return vars(self) | {
            "constant": self.name.upper(),
            "config_imports": homes["config"],
            "rule_imports": homes["config_rules"],
            "shared_imports": homes["_shared"],
        }


def draft(name: str, config: Mapping[str, Any], title: str) -> Draft:
    """The draft of a family. Raises ConfigError for a config without architectures, model_type or the sizes of a decoder."""
    for key in ("architectures", "model_type", *_SIZES[:5]):
        if not config.get(key):
            raise ConfigError(f"config field {key!r} is missing: a family is drafted from the config.json of a published decoder")
    known = probe(config)
    made = Draft(name, title, tuple(config["architectures"]), config["model_type"])
    made.sizes = "SIZES_TIED" if (known or {}).get("defaults", {}).get("tie_word_embeddings") else "SIZES"
    _config_rules(made, config, (known or {}).get("defaults", {}))
    if known:
        _names(made, known["tensors"], config)
    else:
        made.leftover.append("anything yet: transformers does not build this model, names are Llama's; see toy_models/reference")
    return made


def probe(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Tensor names and shapes of transformers' model, and its config class's defaults; None where transformers does not know it."""
    done = subprocess.run([sys.executable, "-c", _PROBE], input=json.dumps(dict(config)), capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def _config_rules(made: Draft, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    owned = {*_SIZES, *BOOKKEEPING, *NEUTRAL}
    made.imports.add(made.sizes)
    present = set(config) | {"num_key_value_heads", "head_dim", "rope_theta"}
    for keys, (text, imports) in _RULES.items():
        if present & set(keys):
            made.rules.append(_with_default(text, _class_default(keys[0], defaults, config)))
            made.imports |= set(imports.split())
            owned |= set(keys)
    made.unknown = [(key, _short(json.dumps(value))) for key, value in config.items() if key not in owned]
    if not present & {"attention_bias", "mlp_bias"}:
        made.rules.append("constant(add_bias_linear=False)")
        made.imports.add("constant")


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."


def _class_default(key: str, defaults: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    if key == "rope_theta":
        return (defaults.get("rope_parameters") or {}).get("rope_theta", 10000.0)
    return defaults.get(key, config.get(key))


def _with_default(text: str, default: Any) -> str:
    other = re.search(r"DEFAULT\|([^,]+)", text)
    if other:
        return text.replace(other[0], other[1] if default is None else json.dumps(default))
    return text.replace("DEFAULT", json.dumps(default))


def _names(made: Draft, tensors: Mapping[str, list[int]], config: Mapping[str, Any]) -> None:
    """Blocks and norms from one layer's names; what no block takes is left over."""
    layer = re.compile(r"(.+?\.layers)\.0\.(.+)")
    inside = {m[2]: shape for n, shape in tensors.items() if (m := layer.fullmatch(n))}
    made.layers = next((m[1] for n in tensors if (m := layer.fullmatch(n))), made.layers)
    taken = _attention(made, inside, config) | _mlp(made, inside)
    norms = [n.removesuffix(".weight") for n in inside if n.endswith("norm.weight") and n not in taken]
    if len(norms) == 2:
        made.norms = tuple(f'Norm("{n}")' for n in norms)
        taken |= {f"{n}.weight" for n in norms}
    outside = [n for n in tensors if not re.search(r"\.layers\.\d+\.", n)]
    final = [n for n in outside if n.endswith("norm.weight")]
    if len(final) == 1:
        made.final_norm = f'Norm("{final[0].removesuffix(".weight")}")'
    heads = {"model.embed_tokens.weight", "lm_head.weight", *final}
    made.leftover = [f"{made.layers}.*.{n}" for n in inside if n not in taken] + [n for n in outside if n not in heads]


def _attention(made: Draft, inside: Mapping[str, list[int]], config: Mapping[str, Any]) -> set[str]:
    prefix = next((n.removesuffix(".q_proj.weight") for n in inside if n.endswith(".q_proj.weight")), None)
    if prefix is None:
        return set()
    words = [] if prefix == "self_attn" else [f'"{prefix}"']
    taken = {f"{prefix}.{p}_proj.weight" for p in "qkvo"} & set(inside)
    if norm := inside.get(f"{prefix}.q_norm.weight"):
        per_head = norm[0] < inside[f"{prefix}.q_proj.weight"][0]
        words.append(f'qk_norm="{"per_head" if per_head else "full_width"}"')
        taken |= {f"{prefix}.{p}_norm.weight" for p in "qk"}
    if f"{prefix}.q_proj.bias" in inside and f"{prefix}.o_proj.bias" not in inside:
        words.append("qkv_bias=True")
        taken |= {f"{prefix}.{p}_proj.bias" for p in "qkv"}
    made.attention = f"GQA({', '.join(words)})"
    return taken


def _mlp(made: Draft, inside: Mapping[str, list[int]]) -> set[str]:
    down = next((n for n in inside if n.endswith(".down_proj.weight")), None)
    if down is None:
        return set()
    prefix = down.removesuffix(".down_proj.weight")
    words = [] if prefix == "mlp" else [f'"{prefix}"']
    if f"{prefix}.gate_proj.weight" not in inside:
        words.append("gate=None")
    made.mlp = f"MLP({', '.join(words)})"
    return {f"{prefix}.{p}_proj.weight" for p in ("gate", "up", "down")} & set(inside)


def render(template: str, made: Draft) -> str:
    """A template of bridges/templates filled with a draft."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(__file__).parent / "templates"
    env = Environment(
        loader=FileSystemLoader(folder),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    return env.get_template(template).render(made.fields())
