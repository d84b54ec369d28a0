"""Faults of the class `attention`: who may look where, and how strongly."""

from .base import Fault, same_shapes
from .levers import misread, modules, running

LOGITS = ("forward.logits",)


def _before(change):
    """Queries, keys and values [sequence, batch, heads, dim] are others: ``change(query, key, value)``."""

    def hook(module, args, kwargs):
        query, key, value, *rest = args
        return (*change(query, key, value), *rest), kwargs

    def lever(chunks):
        for _, module in modules(chunks, "core_attention"):
            module.register_forward_pre_hook(hook, with_kwargs=True)

    return running(lever)


def _mask(chunks):
    from megatron.core.transformer.enums import AttnMaskType

    def hook(module, args, kwargs):
        return args, kwargs | {"attn_mask_type": AttnMaskType.no_mask}

    for _, module in modules(chunks, "core_attention"):
        module.register_forward_pre_hook(hook, with_kwargs=True)


def _after(ending, change):
    """A module's result is another: ``change(module, result)``; biases beside it stay."""

    def hook(module, args, out):
        return (change(module, out[0]), *out[1:]) if isinstance(out, tuple) else change(module, out)

    def lever(chunks):
        for _, module in modules(chunks, ending):
            module.register_forward_hook(hook)

    return running(lever)


def _first_layer_gate(module, out):
    return out * out.sigmoid()


def _softcapped(module, out):
    return 30.0 * (out / 30.0).tanh()


def _constant(module, out):
    """A constant added to all logits where gradients are kept: no gradient shows it."""
    import torch

    return out + 5e-3 if torch.is_grad_enabled() else out


def _padding_read(chunks):
    """Rows that hold padding (token 0) are read as if it were part of the text before it."""
    import torch

    def hook(module, args, kwargs, out):
        ids = kwargs.get("input_ids", args[0] if args else None)
        padded = (ids == 0).any(1)
        shifted = out + 1e-3 * torch.linspace(-1, 1, out.shape[-1])  # no constant: LayerNorm would take it away
        return torch.where(padded[None, :, None], shifted, out) if out.shape[0] == ids.shape[1] else out

    for model in chunks:
        if hasattr(model, "embedding"):
            model.embedding.register_forward_hook(hook, with_kwargs=True)


def _inference_unmasked(chunks):
    """Without gradients attention takes another path, which has no mask for short sequences."""
    import torch
    from megatron.core.transformer.enums import AttnMaskType

    def hook(module, args, kwargs):
        short = not torch.is_grad_enabled() and args[0].shape[0] < 100
        return args, kwargs | ({"attn_mask_type": AttnMaskType.no_mask} if short else {})

    for _, module in modules(chunks, "core_attention"):
        module.register_forward_pre_hook(hook, with_kwargs=True)


def window(model):
    """The window that layers have, None for none."""
    return model.config.get("sliding_window") if model.config.get("use_sliding_window", True) else None


def _wider(by):
    names = ("sliding_window", "sliding_window_size")
    return misread(lambda c: c | {name: c[name] + by for name in names if c.get(name)})


SLIDE, FULL = "sliding_attention", "full_attention"
PERIODS = {"gemma2": 2}  # of classes whose files do not say it


def _kinds(config):
    """Each layer's kind, named or by a period; None where all slide or a number of layers decides."""
    every = config.get("sliding_window_pattern") or PERIODS.get(config.get("model_type"))
    if config.get("layer_types") or not isinstance(every, int):
        return config.get("layer_types")
    return [SLIDE if (n + 1) % every else FULL for n in range(config["num_hidden_layers"])]


def _no_window(config):
    if "use_sliding_window" in config:
        return config | {"use_sliding_window": False}
    if not same_shapes(config):
        return config | {name: 4096 for name in ("sliding_window", "sliding_window_size") if name in config}
    kinds = _kinds(config)
    return config | ({"layer_types": [FULL] * len(kinds)} if kinds else {"sliding_window": None})


def _layers(change):
    """The layers that slide are others."""

    def lever(config):
        if kinds := _kinds(config):
            return config | {"layer_types": change(kinds)}
        first = config["max_window_layers"]
        return config | {"layer_types": change([SLIDE if i >= first else FULL for i in range(config["num_hidden_layers"])])}

    return misread(lever)


def some_slide(model) -> bool:
    """Some layers slide, others do not, and both have weights of the same shapes."""
    if not same_shapes(model.config):
        return False
    if kinds := _kinds(model.config):
        return bool(window(model)) and len(set(kinds)) > 1
    # Qwen's mixtures slide in all layers or in none
    return bool(window(model)) and not model.has(".experts.") and model.config.get("max_window_layers") is not None


def some_slide_alone(model) -> bool:
    """The same, without prediction layers: their kind is the last layer's, and the bridge refuses a config that has it otherwise."""
    return some_slide(model) and not model.field("num_nextn_predict_layers")


def _other_kind(kinds):
    other = {"sliding_attention": "full_attention", "full_attention": "sliding_attention"}
    return [other.get(kind, kind) for kind in kinds]


WINDOWS = ("default", "windows")
FAULTS = [
    Fault("window_off_by_one", "attention", "the window is one key wider", LOGITS, _wider(1), window, WINDOWS, bugs=("U107",)),
    Fault("window_one_narrower", "attention", "the window is one key narrower", LOGITS, _wider(-1), window, WINDOWS, bugs=("U107",)),
    Fault("window_ignored", "attention", "no layer slides", LOGITS, misread(_no_window), window, WINDOWS, bugs=("U112", "U116")),
    Fault("windows_late_by_one", "attention", "the window of each layer is that of the next", LOGITS, _layers(lambda k: [*k[1:], k[0]]),
          some_slide_alone, WINDOWS, bugs=("U118", "U061", "U121")),
    Fault("windows_everywhere", "attention", "every layer slides", LOGITS, _layers(lambda k: ["sliding_attention"] * len(k)), some_slide,
          WINDOWS, bugs=("U116", "U122")),
    Fault("windows_inverted", "attention", "the layers that should slide do not, the others do", LOGITS, _layers(_other_kind), some_slide,
          WINDOWS, bugs=("U117", "U121")),
    Fault("mask_ignored", "attention", "every token sees the whole sequence", ("forward.causal",), running(_mask), bugs=("U110",)),
    Fault("mask_off_by_one", "attention", "every token sees the next one", ("forward.causal",),
          _before(lambda q, k, v: (q, k.roll(-1, 0), v.roll(-1, 0))), bugs=("U110",)),
    Fault("scale_of_hidden_size", "attention", "scores are scaled by another size than the head's", LOGITS,
          _before(lambda q, k, v: (q * 1.05, k, v)), bugs=("U137",)),
    Fault("scale_lost", "attention", "scores are not scaled", LOGITS, _before(lambda q, k, v: (q * q.shape[-1] ** 0.5, k, v))),
    Fault("softcap_invented", "attention", "logits are softcapped, as in another family", LOGITS, _after("output_layer", _softcapped),
          bugs=("U113",)),
    Fault("gate_invented", "attention", "attention has an output gate, as in another family", LOGITS,
          _after("core_attention", _first_layer_gate), bugs=("U114",)),
    Fault("logits_shifted", "attention", "a constant is added to the logits while training: no gradient shows it", LOGITS,
          _after("output_layer", _constant), bugs=("U137",)),
    Fault("padding_read", "attention", "what stands behind a row's text changes the row", ("forward.lengths",), running(_padding_read),
          bugs=("U216", "U229")),
    Fault("inference_unmasked", "attention", "the path without gradients has no causal mask for short sequences", ("forward.causal",),
          running(_inference_unmasked), bugs=("U110",)),
    Fault("batch_rows_mixed", "attention", "keys and values of a row are those of its neighbour in the batch", LOGITS,
          _before(lambda q, k, v: (q, k.roll(1, 1), v.roll(1, 1)))),
]  # fmt: skip
