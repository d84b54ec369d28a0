"""Which changes of a config.json are worth making: every field perturbed, nulled, removed, contradicted. No torch, no transformers.

A change that no model feels proves nothing, so values are chosen by a field's name first (another activation, a window shorter than the
sequence, a context that the sequence exceeds) and by its type where the name says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

LENGTH = 40  # tokens of the sequence that shows an effect: longer than the windows and contexts below
LONG = 200  # tokens where a field is about positions: rounding of angles drifts with them
WINDOW, CONTEXT = 5, 16
REMOVED = type("Removed", (), {"__repr__": lambda self: "removed"})()
UNKNOWN = "x_unknown_field"
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2", "tanh")
SLIDE, FULL = "sliding_attention", "full_attention"

# Fields that say one thing in several spellings, or at several levels: a refusal may name any of them.
TOGETHER = (
    ("dtype", "torch_dtype"),
    ("rope_scaling", "rope_parameters", "rope_theta", "rope_type", "rope type", "rope parameters", "partial_rotary_factor"),
    ("use_sliding_window", "sliding_window", "sliding_window_size", "max_window_layers", "layer_types"),
    ("architecture", "architectures", "model_type"),
)


@dataclass(frozen=True)
class Change:
    """One change of a config.json.

    what: in words, unique within a config. fields: what is changed, nested ones with dots. config: the config after it. long: whether it
    takes a long sequence whatever its fields.
    """

    what: str
    fields: tuple[str, ...]
    config: dict[str, Any]
    long: bool = False

    @property
    def top(self) -> tuple[str, ...]:
        """The fields of config.json that are touched, without what lies inside them."""
        return tuple(dict.fromkeys(field.split(".")[0] for field in self.fields))

    @property
    def length(self) -> int:
        """Tokens of the sequence that shows the change."""
        return LONG if self.long or any(re.search("rope|rotary|position_embeddings", field) for field in self.fields) else LENGTH

    @property
    def kin(self) -> list[str]:
        """The touched fields and those that say the same in other words: another change of these may undo this one."""
        return [*self.top, *(word for group in TOGETHER if set(self.top) & set(group) for word in group if word not in self.top)]

    def named_in(self, message: str) -> bool:
        """Whether a message names a changed field: the field, a part or another spelling of it, or the value it was given."""
        words = {*self.kin, *(inner for field in self.fields for inner in field.split(".")[1:] if len(inner) > 4)}
        words |= {word for group in TOGETHER if words & set(group) for word in group}
        words |= {value for field in self.top if isinstance(value := self.config.get(field), str) and len(value) > 3}
        return any(word in message for word in words)


def changes(config: Mapping[str, Any], held: Mapping[str, Any], aliases: Mapping[str, str], only: Iterable[str] | None = None):
    """Every `Change` of a config.json worth making, in a fixed order.

    held: the fields that transformers knows beside the file's, with the value it holds (None: it only asks for them). aliases: other names
    of a field -> the name it is held under. only: fields to look at; None for all.
    """
    made = [*_each_field(config, held), *_aliased(config, aliases), *_rotary(config), *_windows(config, held), *_together(config)]
    wanted = None if only is None else {*only, UNKNOWN}  # a field that nobody knows is asked about everywhere
    seen, out = {_text(config)}, []
    for what, fields in made:
        change = Change(what, tuple(fields), changed(config, fields))
        if (wanted is None or wanted & set(change.top)) and (text := _text(change.config)) not in seen:
            seen.add(text)
            out.append(change)
    return out


def changed(config: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """A config with fields set, or removed where the value is REMOVED; a name ``a.b`` is field b of the object a."""
    out = dict(config)
    for name, value in fields.items():
        outer, _, inner = name.partition(".")
        if inner:
            value = changed(out[outer], {inner: value})
        if value is REMOVED:
            out.pop(outer, None)
        else:
            out[outer] = value
    return out


def _text(config: Mapping[str, Any]) -> str:
    """What tells two configs apart: 1, 1.0 and true are three values."""
    return repr(sorted(config.items()))


# ------------------------------------------------------------------------------------------------------------ field by field
Made = Iterator[tuple[str, dict[str, Any]]]


def _each_field(config: Mapping, held: Mapping) -> Made:
    for name, value in config.items():
        yield from _one_field(name, value, config)
        yield f"{name} removed", {name: REMOVED}
        for inner, part in value.items() if isinstance(value, Mapping) else ():
            yield from _one_field(f"{name}.{inner}", part, config)
            yield f"{name}.{inner} removed", {f"{name}.{inner}": REMOVED}
        if isinstance(value, Mapping):
            yield f"{name} with an unknown field", {f"{name}.{UNKNOWN}": 3}
    for name, value in held.items():
        if name not in config:
            yield from _one_field(name, value, config)
    yield "an unknown field", {UNKNOWN: 3}


def _one_field(name: str, value: Any, config: Mapping) -> Made:
    for other in others(name.rpartition(".")[2], value, config):
        yield f"{name} = {_short(other)}", {name: other}
    yield f"{name} = null", {name: None}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def others(name: str, value: Any, config: Mapping[str, Any]) -> list:
    """Other values of a field, by its name, else by the type of the one it has."""
    make = next((make for pattern, make in BY_NAME if re.fullmatch(pattern, name)), _by_type)
    return [x for x in make(value, config) if x != value or type(x) is not type(value)]


def _by_type(value: Any, config: Mapping) -> tuple:
    if isinstance(value, bool):
        return (not value,)
    if isinstance(value, int):
        return (value + 1,)
    if isinstance(value, float):
        return (1.37 * value if value else 0.13,)
    if isinstance(value, str):
        return (f"{value}_x",)
    if isinstance(value, list):
        return (value[::-1], value[:-1], *_inside(value, config)) if value else ([1],)
    return ({},) if isinstance(value, Mapping) else (3, True)


def _inside(value: list, config: Mapping) -> Iterator[list]:
    """Of a list of objects of objects (a layer's blocks): each field of the first entry changed."""
    first = value[0]
    for part, held in first.items() if isinstance(first, Mapping) else ():
        for name, one in held.items() if isinstance(held, Mapping) else ():
            for other in others(name, one, config):
                yield [{**first, part: {**held, name: other}}, *value[1:]]


def _heads(config: Mapping) -> int:
    return config.get("num_attention_heads", 4)


def _layers(config: Mapping) -> int:
    return config.get("num_hidden_layers", 5)


def _groups(value: Any, config: Mapping) -> tuple:
    return (_heads(config), 1, next(n for n in (3, 5, 7) if _heads(config) % n))


def _experts(config: Mapping) -> int:
    return next(
        (config[k] for k in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts") if config.get(k)), 8
    )


def _kinds(value: Any, config: Mapping) -> tuple:
    n = _layers(config)
    mixed = [SLIDE if i % 2 else FULL for i in range(n)]
    return (mixed, [SLIDE] * n, [FULL] * n, [FULL] * (n - 1), ["no_such_attention"] * n)


def _inner(value: Any, config: Mapping) -> tuple:
    """A nested config that says something else than the outer one."""
    return ({"tie_word_embeddings": not config.get("tie_word_embeddings", False), "rms_norm_eps": 0.02},)


def _times(factor: float, value: Any) -> Any:
    return [factor * one for one in value] if isinstance(value, list) else factor * value


def _rope_types(value: Any, config: Mapping) -> tuple:
    return ("default", "linear", "dynamic", "llama3", "no_such_rope")


def _fixed(*values: Any) -> Callable[[Any, Mapping], tuple]:
    return lambda value, config: values


# Field names (regular expressions, without their outer levels) -> (value, config) -> other values.
BY_NAME: tuple[tuple[str, Callable[[Any, Mapping], tuple]], ...] = (
    ("hidden_size|n_embd|d_model", lambda v, c: (v + _heads(c),)),
    ("num_attention_heads|n_head", lambda v, c: (2 * v,)),
    ("num_key_value_heads|num_query_groups", _groups),
    ("head_dim|kv_channels", _fixed(12, 7)),
    ("(q|kv)_lora_rank|(qk_nope|qk_rope|v)_head_dim", lambda v, c: ((v or 24) + 4,)),  # some versions take even sizes only
    ("num_hidden_layers|n_layer", _fixed(3)),
    ("vocab_size", _fixed(157)),
    (".*intermediate_size|ffn_hidden_size", lambda v, c: ((v or 0) + 4,)),
    ("num_experts|num_local_experts|n_routed_experts|moe_num_experts", lambda v, c: ((v or 8) + 4,)),
    ("num_experts_per_tok(en)?|experts_per_token|moe_(top_?)?k", lambda v, c: ((v or 2) + 1, 1, _experts(c) + 1)),
    ("mlp_only_layers", _fixed([1], [0, 2])),
    ("max_position_embeddings", _fixed(CONTEXT, 4099)),
    ("original_max_position_embeddings", _fixed(CONTEXT, 64)),
    ("sliding_window|attention_chunk_size", _fixed(WINDOW, 1)),
    ("max_window_layers", _fixed(0, 3)),
    ("layer_types", _kinds),
    ("rope_theta|rotary_base", lambda v, c: (60.5, _times(1.37, v or 10000.0))),
    ("partial_rotary_factor|rope_percent|rotary_pct", _fixed(0.5, 0.25)),
    ("rope_type|type", _rope_types),
    ("factor|(low|high)_freq_factor", lambda v, c: (3.5 * (v or 1.0),)),
    ("rope_scaling|rope_parameters", _fixed({})),  # its kinds: _rotary
    (".*(eps|epsilon)", _fixed(0.02)),
    (".*(dropout|jitter|pdrop).*", _fixed(0.1)),
    ("hidden_act.*|activation_function", _fixed(*ACTIVATIONS, "no_such_activation")),
    (".*softcap(ping)?", _fixed(3.0)),  # far below the scale of what is capped, rounding would be all that is left of it
    ("clip_qkv", _fixed(0.5)),
    ("(torch_)?dtype", _fixed("bfloat16", "no_such_dtype")),
    ("architectures", _fixed([], ["LlamaForCausalLM"], ["NoSuchModelForCausalLM"])),
    ("model_type", _fixed("llama", "qwen2", "no_such_type")),
    ("quantization_config", _fixed({"quant_method": "fp8", "weight_block_size": [128, 128]})),
    ("text_config|decoder", _inner),
    (".*_token_id", lambda v, c: ([7, 5],) if isinstance(v, list) else (7,)),
    ("is_causal", _fixed(False)),
)


# ------------------------------------------------------------------------------------------------------------ fields together
def _aliased(config: Mapping, aliases: Mapping[str, str]) -> Made:
    """A field under another name beside it, with another value; renaming it is config.spelling's."""
    for one, other in aliases.items():
        for name, second in ((one, other), (other, one)):
            if name in config and second not in config:
                for value in others(name, config[name], config)[:1]:
                    yield f"{second} = {_short(value)} beside {name}", {second: value, name: config[name]}


def _together(config: Mapping) -> Made:
    """Pairs that cannot both be true."""
    dtype = {"dtype": "bfloat16", "torch_dtype": "float32"}
    yield "dtype against torch_dtype", dtype
    if config.get("num_hidden_layers"):
        n = _layers(config)
        yield "one layer_types too many", {"num_hidden_layers": n, "layer_types": [FULL] * (n + 1)}


def rope_kinds(config: Mapping[str, Any]) -> dict[str, dict]:
    """Kind -> rope parameters without the base, telling on LENGTH positions with a context of CONTEXT."""
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    half = (config.get("head_dim") or 8) // 2
    long = {"short_factor": [1.0] * half, "long_factor": [3.0] * half}
    original = {"original_max_position_embeddings": CONTEXT}
    kinds = {"linear": {"factor": 3.5}, "dynamic": {"factor": 4.0}, "yarn": {"factor": 4.0, **original}}
    kinds |= {"llama3": llama3 | original, "longrope": long | original, "no_such_rope": {"factor": 4.0}}
    return {kind: {"rope_type": kind, **rest} for kind, rest in kinds.items()}


def _rotary(config: Mapping) -> Made:
    """Kinds of rope, in a context that the sequence exceeds; and the two spellings against each other."""
    if "rope_theta" not in config and "rope_parameters" not in config:
        return
    kinds, theta = rope_kinds(config), 20000.5
    own, new = ("rope_parameters", True) if "rope_parameters" in config else ("rope_scaling", False)
    for kind, rest in kinds.items():
        rest = rest | ({"rope_theta": theta} if new else {})
        yield f"{own} of kind {kind}, context {CONTEXT}", {own: rest, "max_position_embeddings": CONTEXT}
    linear, llama3 = kinds["linear"], kinds["llama3"]
    old = {"rope_theta": REMOVED, "rope_scaling": REMOVED}
    yield f"rope_parameters linear, rope_theta {theta}", {**old, "rope_parameters": linear | {"rope_theta": theta}}
    yield f"rope_parameters llama3, rope_theta {theta}", {**old, "rope_parameters": llama3 | {"rope_theta": theta}}
    yield "rope_parameters without rope_theta", {**old, "rope_parameters": {"rope_type": "default"}}
    yield "rope_parameters by kind of layer", {**old, "rope_parameters": {FULL: {"rope_type": "default", "rope_theta": theta}}}
    part = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 0.25}
    yield "partial_rotary_factor in two places", {**old, "partial_rotary_factor": 0.5, "rope_parameters": part}
    yield "partial_rotary_factor inside", {**old, "rope_parameters": part}
    rest = {"rope_scaling": REMOVED, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    yield "rope_theta in two places", {"rope_theta": 60.5, **rest}
    both = {"rope_scaling": linear, "rope_parameters": llama3 | {"rope_theta": theta}}
    yield "rope_scaling against rope_parameters", {"rope_theta": 60.5, **both}
    yield "type against rope_type", {"rope_scaling": {"type": "linear", **llama3}, "rope_parameters": REMOVED}
    yield "rope_scaling without its type", {"rope_scaling": {"factor": 4.0}, "rope_parameters": REMOVED}
    yield "rope_scaling without its factor", {"rope_scaling": {"rope_type": "linear"}, "rope_parameters": REMOVED}
    outside = {"original_max_position_embeddings": CONTEXT, "rope_parameters": REMOVED}
    yield "original context in two places", {"rope_scaling": llama3 | {"original_max_position_embeddings": 64}, **outside}


def _windows(config: Mapping, held: Mapping) -> Made:
    """What the window's fields say where it is switched on, and where they contradict each other."""
    if "sliding_window" not in config and "sliding_window" not in held:
        return
    known = {*config, *held}
    n = _layers(config)
    on: dict[str, Any] = {"sliding_window": WINDOW}
    if "use_sliding_window" in known:
        on |= {"use_sliding_window": True}
        yield "windows on", on
        yield "windows on, without a size", on | {"sliding_window": REMOVED}
        yield "windows on, size null", on | {"sliding_window": None}
        for edge in (0, n, 99, None, "2", REMOVED) if "max_window_layers" in known else ():
            yield f"windows on, max_window_layers {edge!r}", on | {"max_window_layers": edge}
        kinds = [SLIDE] + [FULL] * (n - 1)
        yield "windows off against layer_types", on | {"use_sliding_window": False, "layer_types": [SLIDE] * n}
        yield "max_window_layers against layer_types", on | {"max_window_layers": 1, "layer_types": kinds}
    for kinds in _kinds(None, config) if "layer_types" in known else ():
        yield f"windows on, layer_types {_short(kinds)}", on | {"layer_types": kinds}
    yield f"window of {LENGTH - 1}", on | {"sliding_window": LENGTH - 1}
    yield "window of 0", on | {"sliding_window": 0}


# ------------------------------------------------------------------------------------------------------------------ spellings
def spellings(config: Mapping[str, Any], written: Mapping[str, Mapping], aliases: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Name -> the same model's config.json in another spelling; `written`: what transformers itself writes for it, by name."""
    out = {name: dict(text) for name, text in written.items()}
    out["the other of dtype and torch_dtype"] = _renamed(config, "torch_dtype", "dtype")
    rope = config.get("rope_parameters")
    if rope is None and "rope_theta" in config:
        part = {k: config[k] for k in ("rope_theta", "partial_rotary_factor") if k in config}
        inside = {"rope_type": "default", **(config.get("rope_scaling") or {}), **part}
        rest = {k: v for k, v in config.items() if k not in ("rope_scaling", *part)}
        out["rope_parameters for rope_theta and rope_scaling"] = rest | {"rope_parameters": inside}
    if isinstance(rope, Mapping) and "rope_theta" in rope:
        outside = {k: rope[k] for k in ("rope_theta", "partial_rotary_factor") if k in rope}
        scaling = {k: v for k, v in rope.items() if k not in outside}
        rest = {k: v for k, v in config.items() if k != "rope_parameters"}
        out["rope_theta and rope_scaling for rope_parameters"] = rest | outside | {"rope_scaling": scaling}
    if isinstance(config.get("rope_scaling"), Mapping):
        out["type for rope_type"] = dict(config) | {"rope_scaling": _renamed(config["rope_scaling"], "rope_type", "type")}
    for one, other in aliases.items():
        out[f"{one} and {other}"] = _renamed(config, one, other)
    return {name: text for name, text in out.items() if text != dict(config)}


def absences(config: Mapping[str, Any], held: Mapping[str, Any], only: Iterable[str] | None = None) -> list[Change]:
    """Every field removed, and every field null, as the config is and with its windows on (where a default size would show)."""
    on = {"use_sliding_window": True, "max_window_layers": 0} if "use_sliding_window" in {*config, *held} else {}
    out = []
    for name in (*config, *(name for name in held if name not in config)):
        if only is None or name in only:
            for where, more in (("", {}), (", windows on", on))[: 1 + bool(on)]:
                base = {**config, **more}
                out.append(Change(f"{name} removed{where}", (name,), changed(base, {name: REMOVED})))
                out.append(Change(f"{name} = null{where}", (name,), changed(base, {name: None})))
    return out


def _renamed(config: Mapping, one: str, other: str) -> dict:
    """The field `one` called `other`, or the other way round; in its place."""
    names = {one: other, other: one} if (one in config) != (other in config) else {}
    return {names.get(name, name): value for name, value in config.items()}


def new_kinds(config: Mapping[str, Any], earlier: Iterable[Mapping[str, Any]]) -> list[str]:
    """Fields whose value is of a kind that no earlier config has: absent, null, a flag or word of another value, an object of other
    fields. Numbers are alike unless zero. What only says where a file comes from is left out."""
    earlier = list(earlier)
    skipped = {"transformers_version", "_name_or_path", "architectures", "torch_dtype", "dtype", "pretraining_tp"}
    names = [n for n in dict.fromkeys((*config, *(n for other in earlier for n in other))) if not n.endswith("_token_id")]
    return [
        name for name in names if name not in skipped and _kind(config, name) not in [_kind(other, name) for other in earlier]
    ]


def _kind(config: Mapping, name: str) -> Any:
    value = config.get(name, REMOVED)
    if isinstance(value, Mapping):
        return tuple(sorted((key, repr(_kind(value, key))) for key in value))
    if isinstance(value, bool | str) or value is None or value is REMOVED:
        return repr(value)
    return f"{type(value).__name__} {bool(value)}" if isinstance(value, list) else f"number {bool(value)}"
