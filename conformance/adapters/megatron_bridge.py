"""An adapter for NVIDIA's Megatron-Bridge, through its public surface alone. What it found: docs/bridges/megatron-bridge.md."""

from __future__ import annotations

from pathlib import Path

from .common import HOST, impossible, parallel_settings, peer

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
# Kernels that a machine without a GPU has not; arithmetic that they fuse is done unfused.
_UNFUSED = ("apply_rope_fusion", "gradient_accumulation_fusion")


class MegatronBridge:
    """See shardproof.conformance.api.Adapter for every member."""

    name = "megatron-bridge"
    host = HOST
    preload = ("megatron.bridge",)

    def family_of(self, config) -> str | None:
        return next((FAMILIES[a] for a in config.get("architectures") or () if a in FAMILIES), None)

    def possible(self, config, plan: str) -> str | None:
        return impossible(config, plan)

    def build(self, folder: Path, plan: str, *, with_ddp: bool) -> list:
        provider = _bridge(folder).to_megatron_provider()
        _configure(provider, plan)
        return provider.provide_distributed_model(wrap_with_ddp=with_ddp, ddp_config=_ddp_config() if with_ddp else None)

    def export_weights(self, model: list, folder: Path):
        for name, weight in _bridge(folder).export_hf_weights(model, cpu=True, show_progress=False):
            yield name, weight.clone()  # cpu=True copies what lies on a GPU; here it may be the parameter itself

    def save_hf(self, model: list, folder: Path, out: Path) -> None:
        _bridge(folder).save_hf_pretrained(model, str(out), show_progress=False)


def _bridge(folder: Path):
    return peer("megatron.bridge", "megatron-bridge").AutoBridge.from_hf_pretrained(str(folder))


def _configure(provider, plan: str) -> None:
    """A plan and the CPU's limits as the provider's settings, as its documentation has users set them before finalize()."""
    for name, value in parallel_settings(plan).items():
        setattr(provider, name, value)
    for name in _UNFUSED:
        setattr(provider, name, False)
    provider.should_pad_vocab = True  # a toy's vocabulary does not divide by tp
    if provider.virtual_pipeline_model_parallel_size:
        # Its training configuration sets these for interleaved stages; batched messages are silently wrong there in megatron-core.
        provider.overlap_p2p_comm, provider.batch_p2p_comm = True, False
    provider.finalize()


def _ddp_config():
    from megatron.core.distributed import DistributedDataParallelConfig

    return DistributedDataParallelConfig()


ADAPTER = MegatronBridge()
