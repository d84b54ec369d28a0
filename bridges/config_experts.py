"""Config rules of softmax-routed experts."""

from __future__ import annotations

from typing import Any

from .config import REFUSED, Rule, constant, copy, typed
from .errors import ConfigError


def experts_count() -> Rule:
    """``num_experts`` or ``num_local_experts`` (transformers takes either for one class, and writes another than hub files have)
    -> ``num_moe_experts``."""
    keys = ("num_experts", "num_local_experts")

    def read(hf, v):
        given = {key: typed(key, hf[key], int) for key in keys if key in hf}
        if not given:
            raise ConfigError("config.json lacks the number of experts; add 'num_experts' or 'num_local_experts'")
        if len(set(given.values())) > 1:
            raise ConfigError(f"config fields {given} contradict; keep one")
        return {"num_moe_experts": next(iter(given.values()))}

    def write(v, hf):
        return {key: v["num_moe_experts"] for key in [k for k in keys if k in hf] or keys[:1]}

    return Rule(keys, ("num_moe_experts",), read, write)


def experts_width() -> Rule:
    """``intermediate_size`` -> ``moe_ffn_hidden_size`` where every layer has experts; also ``ffn_hidden_size``, which nothing then uses."""

    def read(hf, v):
        if hf.get("intermediate_size") is None:
            raise ConfigError("config.json lacks the required field 'intermediate_size', the experts' width; add it")
        width = typed("intermediate_size", hf["intermediate_size"], int)
        return {"moe_ffn_hidden_size": width, "ffn_hidden_size": width}

    fields = ("moe_ffn_hidden_size", "ffn_hidden_size")
    return Rule(("intermediate_size",), fields, read, lambda v, hf: {"intermediate_size": v["moe_ffn_hidden_size"]})


def normalised_weights(*, absent: bool) -> Rule:
    """``norm_topk_prob`` -> ``moe_router_pre_softmax``, its opposite: a softmax over the chosen experts alone is the softmax over all of
    them, renormalised."""

    def read(hf, v):
        return {"moe_router_pre_softmax": not typed("norm_topk_prob", hf.get("norm_topk_prob", absent), bool)}

    return Rule(
        ("norm_topk_prob",), ("moe_router_pre_softmax",), read, lambda v, hf: {"norm_topk_prob": not v["moe_router_pre_softmax"]}
    )


def sparse_layers() -> Rule:
    """``decoder_sparse_step``, ``mlp_only_layers`` (Qwen) -> ``moe_layer_freq``: 1 where every layer has experts, else a list with 1 or 0 a
    layer."""
    keys = ("decoder_sparse_step", "mlp_only_layers")

    def read(hf, v):
        step, dense = typed(keys[0], hf.get(keys[0], 1), int), hf.get(keys[1]) or []
        if not isinstance(dense, list) or any(not isinstance(n, int) or isinstance(n, bool) for n in dense):
            raise ConfigError(f"config field 'mlp_only_layers' is {dense!r}; expected a list of layer numbers")
        sparse = [int((n + 1) % step == 0 and n not in dense) for n in range(v["num_layers"])]
        return {"moe_layer_freq": 1 if all(sparse) else sparse}

    def write(v, hf):
        freq = v["moe_layer_freq"]
        each = freq if isinstance(freq, list) else [int(n % freq == 0) for n in range(v["num_layers"])]
        return {"decoder_sparse_step": 1, "mlp_only_layers": [n for n, sparse in enumerate(each) if not sparse]}

    return Rule(keys, ("moe_layer_freq",), read, write)


def balance_loss(*, absent: float) -> Rule:
    """``router_aux_loss_coef`` -> ``moe_aux_loss_coeff`` where ``output_router_logits`` is true, else 0: only then does transformers add the
    loss. It changes gradients and no logits; megatron-core takes it layer by layer, transformers over all layers together."""
    keys = ("router_aux_loss_coef", "output_router_logits")

    def read(hf, v):
        weight = float(typed(keys[0], hf.get(keys[0], absent), float))
        return {"moe_aux_loss_coeff": weight if typed(keys[1], hf.get(keys[1], False), bool) else 0.0}

    def write(v, hf):
        on = v["moe_aux_loss_coeff"]
        return {"router_aux_loss_coef": on, "output_router_logits": True} if on else {"output_router_logits": False}

    return Rule(keys, ("moe_aux_loss_coeff",), read, write)


def routed(*, absent: float, **settings: Any) -> tuple[Rule, ...]:
    """The rules that all softmax-routed families share: number and choice of experts, balance loss, and how megatron-core runs them.

    absent: the class's own ``router_aux_loss_coef``. The router's product and softmax are taken in fp32 (transformers: the softmax).
    """
    runs = {
        "moe_router_load_balancing_type": "aux_loss",
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": True,
    }
    return (
        experts_count(),
        copy("num_experts_per_tok", "moe_router_topk"),
        balance_loss(absent=absent),
        constant(**runs | settings),
    )


def every_layer_slides(*, width: int = 4096) -> Rule:
    """``use_sliding_window``, ``sliding_window`` of Qwen's mixtures -> ``window_size``: all layers slide or none."""

    def read(hf, v):
        on = typed("use_sliding_window", hf.get("use_sliding_window", False), bool)
        size = hf.get("sliding_window", width) if on else None
        return {"window_size": None if size is None else [typed("sliding_window", size, int) - 1, 0]}

    def write(v, hf):
        if v["window_size"] is None:
            return {"use_sliding_window": False, "sliding_window": REFUSED}
        return {"use_sliding_window": True, "sliding_window": v["window_size"][0] + 1}

    return Rule(("use_sliding_window", "sliding_window"), ("window_size",), read, write)
