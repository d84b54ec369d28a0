"""The transformer_engine stand-in has not drifted from the real one: names, shapes, dtypes and parallel attributes agree.

Law: every entry of the state dict of 13 kinds of model, built at TP=2 by megatron-core's own TE classes, is the same over the
stand-in as over the Python of the release it stands for. Run as a script, this file builds them: ``KIND OUT [WHEEL_FOLDER]``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ATTRIBUTES = ("tensor_model_parallel", "partition_dim", "partition_stride", "sequence_parallel", "allreduce")
DENSE = {
    "num_layers": 2, "hidden_size": 64, "num_attention_heads": 8, "num_query_groups": 4, "kv_channels": 16,
    "ffn_hidden_size": 96,
}  # fmt: skip
MOE = {
    "num_moe_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 48, "moe_grouped_gemm": True,
    "moe_token_dispatcher_type": "alltoall", "moe_shared_expert_intermediate_size": 96, "moe_layer_freq": [0, 1],
    "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1,
}  # fmt: skip
MLA = {
    "num_layers": 2, "hidden_size": 64, "num_attention_heads": 8, "ffn_hidden_size": 96, "multi_latent_attention": True,
    "q_lora_rank": 48, "kv_lora_rank": 32, "qk_head_dim": 16, "qk_pos_emb_head_dim": 8, "v_head_dim": 12,
    "qk_layernorm": True, **MOE,
}  # fmt: skip
DSA = {
    "experimental_attention_variant": "dsa", "dsa_indexer_n_heads": 4, "dsa_indexer_head_dim": 16, "dsa_indexer_topk": 6,
    "dsa_indexer_loss_coeff": 0.0,
}  # fmt: skip
GDN = {
    "experimental_attention_variant": "gated_delta_net", "linear_attention_freq": 2, "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "attention_output_gate": True, "qk_layernorm": True, "layernorm_zero_centered_gamma": True,
}  # fmt: skip
SSM = {
    "num_layers": 5, "moe_layer_freq": 1, "is_hybrid_model": True, "mamba_state_dim": 16, "mamba_head_dim": 16,
    "mamba_num_groups": 2, "mamba_num_heads": 8,
}  # fmt: skip
WINDOW = {"layernorm_zero_centered_gamma": True, "window_size": (8, 0), "window_attn_skip_freq": 2, "softmax_type": "learnable"}
WITH_BIAS = {"add_bias_linear": True, "moe_shared_expert_intermediate_size": None, "moe_layer_freq": 1}
CASES = {  # name -> TransformerConfig fields
    "dense_qknorm": {**DENSE, "qk_layernorm": True},
    "dense_bias_ln": {**DENSE, "normalization": "LayerNorm", "add_bias_linear": True, "gated_linear_unit": False},
    "zero_centered_window_sink": {**DENSE, **WINDOW},
    "moe_grouped": {**DENSE, **MOE},
    "moe_grouped_bias": {**DENSE, **MOE, **WITH_BIAS},
    "moe_sequential": {**DENSE, **MOE, "moe_grouped_gemm": False},
    "moe_latent": {**DENSE, **MOE, "moe_latent_size": 32},
    "mla": MLA,
    "mla_noqlora": {**MLA, "q_lora_rank": None},
    "mla_down_fusion": {**MLA, "mla_down_proj_fusion": True},
    "dsa": {**MLA, **DSA},
    "gdn": {**DENSE, **MOE, **GDN},
    "hybrid": {**DENSE, **MOE, **SSM},
}


# ---------------------------------------------------------------------------------------------- in the subprocess
def build_all(kind: str, folder: str | None) -> dict:
    """Case -> entry -> [shape, dtype, parallel attributes], at TP=2 EP=2 on a fake process group of four."""
    from shardproof.bridges import host

    if kind == "real":
        from shardproof.bridges.host import te_pyonly

        te_pyonly.install(Path(folder))
    which = host.install().transformer_engine
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    sizes = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
    parallel_state.initialize_model_parallel(**sizes, create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(1)
    return {"transformer_engine": which, "cases": {name: entries(build(fields)) for name, fields in CASES.items()}}


def build(fields: dict):
    """One model on the CPU, by megatron-core's own TE specs."""
    import torch
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
        get_transformer_block_with_experimental_attention_variant_spec as variant_spec,
    )
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    common = {
        "tensor_model_parallel_size": 2, "sequence_parallel": True, "params_dtype": torch.bfloat16, "bf16": True,
        "pipeline_dtype": torch.bfloat16, "use_cpu_initialization": True, "perform_initialization": True,
        "transformer_impl": "transformer_engine", "normalization": "RMSNorm", "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu, "add_bias_linear": False, "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False, "apply_rope_fusion": False, "moe_router_load_balancing_type": "none",
    }  # fmt: skip
    config = (MLATransformerConfig if "multi_latent_attention" in fields else TransformerConfig)(**{**common, **fields})
    sizes = {"vocab_size": 128, "max_sequence_length": 64}
    with torch.device("cpu"):
        if config.is_hybrid_model:
            return HybridModel(config, hybrid_stack_spec, **sizes, hybrid_layer_pattern="M*-EM")
        if config.experimental_attention_variant:
            spec = variant_spec(config)
        else:
            spec = gpt_layer_specs.get_gpt_decoder_block_spec(config, use_transformer_engine=True)
        options = {"position_embedding_type": "rope", "share_embeddings_and_output_weights": False}
        return GPTModel(config, spec, **sizes, **options)


def entries(model) -> dict:
    """Name -> [shape, dtype, attributes] (None for an entry without a tensor)."""

    def one(value):
        if value is None:
            return None
        present = {name: getattr(value, name) for name in ATTRIBUTES if hasattr(value, name)}
        return [list(value.shape), str(value.dtype), present]

    return {name: one(value) for name, value in model.state_dict(keep_vars=True).items()}


# ---------------------------------------------------------------------------------------------- in the test
def differences(stand_in: dict, real: dict) -> list[str]:
    """One line for every entry that is not the same in both, named ``case: entry``."""
    lines = []
    for case in sorted(set(stand_in) | set(real)):
        ours, theirs = stand_in.get(case, {}), real.get(case, {})
        for name in sorted(set(ours) | set(theirs)):
            a, b = (side.get(name, "absent") for side in (ours, theirs))
            if a != b:
                lines.append(f"{case}: {name}: stand-in {a}, real {b}")
    return lines


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, dict]:
    """Both sides, each from its own subprocess. Without pip or a network this fails: the comparison is the point."""
    from shardproof.bridges.host import te_pyonly

    folder = te_pyonly.fetch(Path(os.environ.get("SHARDPROOF_TE_PYONLY") or Path(sys.prefix) / "te_pyonly"))
    out = tmp_path_factory.mktemp("names")

    def run(kind: str) -> dict:
        command = [sys.executable, __file__, kind, str(out / kind), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
        assert done.returncode == 0, f"{kind}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return json.loads((out / kind).read_text())

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(("stand-in", "real"), pool.map(run, ("stand-in", "real")), strict=True))


def test_without_the_wheel_it_fails_and_says_why(tmp_path, monkeypatch):
    """Law: no network is an error with pip's own words and a remedy, and leaves nothing that looks like a wheel."""
    from shardproof.bridges.host import te_pyonly

    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(RuntimeError, match="could not download transformer_engine==2.20.2"):
        te_pyonly.fetch(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_each_side_is_what_it_says(built):
    """The stand-in says so, and the other side is the real package at the same version: not one thing compared with itself."""
    from shardproof.bridges.host.transformer_engine import VERSION

    assert built["stand-in"]["transformer_engine"] == f"stand-in {VERSION}"
    assert built["real"]["transformer_engine"] == VERSION


def test_every_entry_agrees(built):
    """Names, shapes, dtypes and parallel attributes agree exactly, on all 13 kinds of model."""
    ours, theirs = (built[side]["cases"] for side in ("stand-in", "real"))
    assert sorted(ours) == sorted(theirs) == sorted(CASES)
    assert differences(ours, theirs) == []
    assert sum(map(len, theirs.values())) > 500  # the models have not become empty
    marked = [entry for case in theirs.values() for entry in case.values() if entry and "partition_dim" in entry[2]]
    assert len(marked) > 100  # and the attributes are there to be compared


def drift(cases: dict, case: str, entry: str, change) -> dict:
    """A copy of ``cases`` in which ``change(entries, name)`` was applied to the first entry whose name ends in ``entry``."""
    copy = json.loads(json.dumps(cases))
    change(copy[case], next(name for name in copy[case] if name.endswith(entry)))
    return copy


def _rename(found: dict, name: str) -> None:
    found[name.replace("layer_norm_weight", "norm_weight")] = found.pop(name)


def _set_attribute(key: str, value):
    return lambda found, name: found[name][2].update({key: value})


DRIFTS = {
    "renamed norm": ("mla", "linear_fc1.layer_norm_weight", _rename, 2),
    "wrong partition_dim": ("dense_qknorm", "linear_proj.weight", _set_attribute("partition_dim", 0), 1),
    "not sequence parallel": ("gdn", "layer_norm_weight", _set_attribute("sequence_parallel", False), 1),
    "lost attribute": ("moe_grouped", "linear_fc2.weight0", lambda found, name: found[name][2].pop("allreduce"), 1),
    "lost extra state": ("hybrid", "_extra_state", lambda found, name: found.pop(name), 1),
    "wrong dtype": ("zero_centered_window_sink", "softmax_offset", lambda found, name: found[name].__setitem__(1, "x"), 1),
    "transposed": ("moe_latent", "linear_qkv.weight", lambda found, name: found[name][0].reverse(), 1),
}


@pytest.mark.parametrize("kind", DRIFTS)
def test_a_planted_drift_is_seen(built, kind):
    """Control: each way the stand-in could drift shows as a difference that names the case."""
    case, entry, change, lines = DRIFTS[kind]
    theirs = built["real"]["cases"]
    found = differences(drift(built["stand-in"]["cases"], case, entry, change), theirs)
    assert len(found) == lines and all(line.startswith(f"{case}: ") for line in found), found


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(build_all(sys.argv[1], *sys.argv[3:])))
