"""An adapter for mbridge, through its public surface alone. What it found: docs/bridges/mbridge.md."""

from __future__ import annotations

import weakref
from pathlib import Path

from .common import HOST, config_of, dtype_of, impossible, parallel_settings, peer

# What AutoBridge.list_supported_models() gives in 0.15.1, less the models that see.
MODEL_TYPES = ("deepseek_v3", "glm4_moe", "llama", "mimo", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
VOCAB_PADDING = 128  # megatron-core's own default; mbridge pads no vocabulary unless told to
_BRIDGES: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # first chunk -> the bridge that built it, which exports it too


class MBridge:
    """See shardproof.conformance.api.Adapter for every member.

    mbridge has no gradients, FLOPs, Megatron checkpoints or way back from a model to config.json: those laws are not claimed.
    """

    name = "mbridge"
    host = HOST
    preload = ("mbridge",)

    def family_of(self, config) -> str | None:
        kind = config.get("model_type")
        return kind if kind in MODEL_TYPES else None

    def possible(self, config, plan: str) -> str | None:
        return impossible(config, plan)

    def build(self, folder: Path, plan: str, *, with_ddp: bool) -> list:
        import torch

        dtype = dtype_of(config_of(folder))  # mbridge takes bfloat16 unless told
        bridge = peer("mbridge", "mbridge").AutoBridge.from_pretrained(
            str(folder), dtype=dtype, make_vocab_size_divisible_by=VOCAB_PADDING
        )
        settings = parallel_settings(plan)  # the sizes it reads from parallel_state; the rest it has to be told
        bridge.set_extra_args(**{key: settings[key] for key in _TOLD if key in settings})
        chunks = bridge.get_model(
            weight_path=str(folder),
            wrap_with_ddp=with_ddp,
            bf16=dtype is torch.bfloat16,
            fp16=dtype is torch.float16,
            # Whole gradients on every rank: the suite's plain SGD step knows no distributed optimiser.
            ddp_config={"use_distributed_optimizer": False},
        )
        _BRIDGES[chunks[0]] = bridge
        return chunks

    def export_weights(self, model: list, folder: Path):
        return _BRIDGES[model[0]].export_weights(model)

    def save_hf(self, model: list, folder: Path, out: Path) -> None:
        _BRIDGES[model[0]].save_weights(model, str(out))


_TOLD = ("sequence_parallel", "pipeline_model_parallel_layout")
ADAPTER = MBridge()
