"""An adapter for NVIDIA's Megatron-Bridge, through its public surface alone. What it found: docs/bridges/megatron-bridge.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .common import HOST, config_of, impossible, parallel_settings, peer

# Architectures of its AutoBridge.list_supported_models() in 0.6.2 that the suite has configs of: text models.
FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "NemotronForCausalLM": "nemotron",
    "OlmoeForCausalLM": "olmoe",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
# Kernels that a machine without a GPU has not; what they fuse is done step by step.
_UNFUSED = ("apply_rope_fusion", "gradient_accumulation_fusion", "moe_permute_fusion")
# Tensors with a row a token.
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


class MegatronBridge:
    """See shardproof.conformance.api.Adapter for every member."""

    name = "megatron-bridge"
    host = HOST
    preload = ("megatron.bridge",)

    def __init__(self, *, trim: bool = False):
        """trim: cut the padding rows of the vocabulary off what it exports, to see what else there is."""
        self.trim = trim

    def family_of(self, config) -> str | None:
        return next((FAMILIES[a] for a in config.get("architectures") or () if a in FAMILIES), None)

    def possible(self, config, plan: str) -> str | None:
        return impossible(config, plan)

    def build(self, folder: Path, plan: str, *, with_ddp: bool) -> list:
        provider = _bridge(folder).to_megatron_provider()
        _configure(provider, plan)
        return provider.provide_distributed_model(wrap_with_ddp=with_ddp, ddp_config=_ddp_config() if with_ddp else None)

    def export_weights(self, model: list, folder: Path):
        rows = config_of(folder)["vocab_size"] if self.trim else None
        for name, weight in _bridge(folder).export_hf_weights(model, cpu=True, show_progress=False):
            weight = weight[:rows] if name in _VOCABULARY else weight
            yield name, weight.clone()  # cpu=True copies what lies on a GPU; here it may be the parameter itself

    def save_hf(self, model: list, folder: Path, out: Path) -> None:
        _bridge(folder).save_hf_pretrained(model, str(out), show_progress=False)

    def save_megatron(self, model: list, folder: Path, out: Path) -> None:
        _bridge(folder).save_megatron_model(model, str(out))

    def load_megatron(self, folder: Path, saved: Path, plan: str) -> list:
        return _bridge(folder).load_megatron_model(str(saved), mp_overrides=_plan_settings(plan))


def _bridge(folder: Path):
    return peer("megatron.bridge", "megatron-bridge").AutoBridge.from_hf_pretrained(str(folder))


def _configure(provider, plan: str) -> None:
    """A plan and the CPU's limits as the provider's settings, as its documentation has users set them before finalize()."""
    for name, value in (_plan_settings(plan) | dict.fromkeys(_UNFUSED, False)).items():
        setattr(provider, name, value)
    provider.should_pad_vocab = True  # a toy's vocabulary does not divide by tp
    provider.finalize()


def _plan_settings(plan: str) -> dict[str, Any]:
    settings = parallel_settings(plan)
    if settings["virtual_pipeline_model_parallel_size"]:
        # Its training configuration sets these for interleaved stages; batched messages are silently wrong there in megatron-core.
        settings |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    return settings


def _ddp_config():
    from megatron.core.distributed import DistributedDataParallelConfig

    return DistributedDataParallelConfig()


ADAPTER = MegatronBridge()
TRIMMED = MegatronBridge(trim=True)
