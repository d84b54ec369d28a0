"""What adapters share: plans in megatron-core's own words, and what the CPU world asks of a model's settings."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..plans import sizes

HOST = "shardproof.bridges.host:install"  # a name, not an import: the ranks call it, in the bridge's own environment


def peer(module: str, distribution: str):
    """Import a bridge's module. Raises ImportError naming the package to install where it is absent."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as absent:
        if absent.name is None or not (module + ".").startswith(absent.name + "."):
            raise  # the bridge is there and lacks something else
        raise ImportError(
            f"{distribution} is not installed in this interpreter; install it, or name its environment: "
            f"--bridge 'exec:ENV/bin/python shardproof.conformance.adapters.{module.replace('.', '_')}:ADAPTER'"
        ) from absent


def config_of(folder: Path) -> dict[str, Any]:
    """A model folder's config.json."""
    return json.loads((folder / "config.json").read_text())


def dtype_of(config: Mapping[str, Any]):
    """The torch dtype that config.json names."""
    import torch

    return getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")


def stages(plan: str) -> list[list[str]] | None:
    """megatron-core's pipeline_model_parallel_layout of a plan's split, stage by stage in model order; None without a split.

    The first stage also holds the embedding, the last one the loss.
    """
    found = re.search(r"split(\d+(?:-\d+)*)", plan)
    if found is None:
        return None
    layout = [["decoder"] * int(count) for count in found[1].split("-")]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout


def parallel_settings(plan: str) -> dict[str, Any]:
    """A plan as fields of megatron-core's TransformerConfig."""
    size = sizes(plan)
    fields: dict[str, Any] = {
        "tensor_model_parallel_size": size.get("tp", 1),
        "pipeline_model_parallel_size": size.get("pp", 1),
        "virtual_pipeline_model_parallel_size": size.get("vpp"),
        "context_parallel_size": size.get("cp", 1),
        "sequence_parallel": "sp" in plan.split(","),
        "expert_model_parallel_size": size.get("ep", 1),
    }
    if "etp" in size:
        fields["expert_tensor_parallel_size"] = size["etp"]
    if (layout := stages(plan)) is not None:
        fields["pipeline_model_parallel_layout"] = layout
    return fields


def impossible(config: Mapping[str, Any], plan: str) -> str | None:
    """Why megatron-core itself cannot run a model of this config under the plan, or None."""
    size = sizes(plan)
    tp, pieces = size.get("tp", 1), size.get("pp", 1) * size.get("vpp", 1)
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    groups, experts = config.get("num_key_value_heads") or heads, _experts(config)
    if heads % tp:
        return f"{heads} attention heads do not divide by tp {tp}"
    if groups % tp and tp % groups:
        return f"{groups} query groups and tp {tp}: one must be a multiple of the other"
    if (layout := stages(plan)) is None and layers % pieces:
        return f"{layers} layers do not divide over {pieces} pipeline stages"
    if layout is not None and sum(stage.count("decoder") for stage in layout) != layers:
        return f"the split does not hold the model's {layers} layers"
    if experts is None and ("ep" in size or "etp" in size):
        return "the model has no experts"
    if experts is not None and tp > 1 and "sp" not in plan.split(","):
        return "megatron-core trains experts under tensor parallelism with sequence parallelism only"
    if experts is not None and experts % size.get("ep", 1):
        return f"{experts} experts do not divide by ep {size['ep']}"
    return None


def _experts(config: Mapping[str, Any]) -> int | None:
    return next((config[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if config.get(key)), None)
