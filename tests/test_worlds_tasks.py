"""Tasks that tests/test_worlds*.py run in workers; no test of its own."""

import os
import signal
import sys
import time


def usage():
    """Threads and file descriptors of this process."""
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def sizes():
    """What parallel_state says of this rank, and a sum over its tensor and data parallel groups."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state as ps

    tp, dp = torch.ones(1), torch.ones(1)
    dist.all_reduce(tp, group=ps.get_tensor_model_parallel_group())
    dist.all_reduce(dp, group=ps.get_data_parallel_group())
    return {
        "rank": dist.get_rank(),
        "world": dist.get_world_size(),
        "tp": ps.get_tensor_model_parallel_world_size(),
        "pp": ps.get_pipeline_model_parallel_world_size(),
        "vpp": ps.get_virtual_pipeline_model_parallel_world_size(),
        "cp": ps.get_context_parallel_world_size(),
        "ep": ps.get_expert_model_parallel_world_size(),
        "etp": ps.get_expert_tensor_parallel_world_size(),
        "dp": ps.get_data_parallel_world_size(),
        "vpp_rank": ps.get_virtual_pipeline_model_parallel_rank(),
        "tp_sum": int(tp),
        "dp_sum": int(dp),
    }


def ranks():
    """Coordinates of this rank."""
    from megatron.core import parallel_state as ps

    return {
        "tp": ps.get_tensor_model_parallel_rank(),
        "pp": ps.get_pipeline_model_parallel_rank(),
        "ep": ps.get_expert_model_parallel_rank(),
        "dp": ps.get_data_parallel_rank(),
        "tp_ranks": _members(ps.get_tensor_model_parallel_group()),
        "size": ps.get_tensor_model_parallel_world_size(),
    }


def _members(group):
    import torch.distributed as dist

    return dist.get_process_group_ranks(group)


def no_parallel_state():
    from megatron.core import parallel_state as ps

    return ps.model_parallel_is_initialized()


def spoil_parallel_state():
    """Leave parallel_state as no task should."""
    import torch
    from megatron.core import parallel_state as ps

    ps.set_virtual_pipeline_model_parallel_rank(1)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)


def torch_state():
    import torch

    return str(torch.get_default_dtype()), torch.is_grad_enabled(), torch.get_num_threads()


def draw():
    """Random numbers from every source, and from megatron's tensor parallel state."""
    import random

    import numpy as np
    import torch
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        tp = torch.rand(3)
    return random.random(), float(np.random.rand()), torch.rand(3), tp


def tiny_model():
    """Logits of a small GPT on the TE spec, whole vocabulary: the path from layout to forward."""
    import torch

    model = _gpt(heads=4)
    ids, position = torch.arange(12)[None], torch.arange(12)[None]
    mask = torch.triu(torch.ones(12, 12, dtype=torch.bool), 1)[None, None]
    return model(ids, position, mask)


def meta_shapes():
    """Shapes of this rank's parameters, built on meta."""
    import torch

    with torch.device("meta"):
        model = _gpt(heads=8, init_model_with_meta_device=True)
    assert all(p.is_meta for p in model.parameters())
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def _gpt(heads, **more):
    import torch
    from megatron.core import parallel_state as ps
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=8,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=heads,
        num_query_groups=heads,
        kv_channels=16,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        pipeline_dtype=torch.float32,
        tensor_model_parallel_size=ps.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=ps.get_pipeline_model_parallel_world_size(),
        transformer_impl="transformer_engine",
        **more,
    )
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=True)
    return GPTModel(
        config,
        spec,
        vocab_size=128,
        max_sequence_length=32,
        position_embedding_type="rope",
        pre_process=ps.is_pipeline_first_stage(),
        post_process=ps.is_pipeline_last_stage(),
    )


def fail(rank, how):
    """One rank fails in the given way; the others wait for it."""
    import torch
    import torch.distributed as dist

    if dist.get_rank() == rank:
        print("about to fail:", how)
        if how == "raise":
            raise ValueError(f"planted in rank {rank}")
        if how == "exit":
            os._exit(7)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "hang":
            _sleep_here()
        if how == "unpicklable":
            return lambda: None
    if how != "unpicklable":
        dist.all_reduce(torch.ones(1))
    return None


def _sleep_here():
    time.sleep(600)


def echo(value, *, times=1):
    return [value] * times


def tensors():
    """Results that are hard to carry: special bits, half types, views of something large, a parameter, meta."""
    import torch

    odd = torch.tensor([0x7FC00001, -(2**31), 1], dtype=torch.int32).view(torch.float32)  # NaN with a payload, -0.0, subnormal
    large = torch.zeros(1000, 1000)
    large.share_memory_()
    return {
        "odd": odd,
        "half": torch.arange(4).to(torch.bfloat16),
        "view": large[3:4, :5],
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "meta": torch.empty(5, 7, device="meta"),
        "graph": (torch.ones(2, requires_grad=True) * 2),
        "bool": torch.tensor([True, False]),
    }


def large(mib):
    import torch

    return torch.ones(mib * 2**18)


def modules():
    return sorted(sys.modules)


def where():
    return os.getpid(), os.getppid()


def contaminate():
    """All that a clean world must notice."""
    import types

    import torch

    for name in ("megatron", "fla"):
        sys.modules[name] = types.ModuleType(name)
    torch.cuda.current_device = _sleep_here


def leave_a_child():
    import subprocess

    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid


def group_twice():
    """The same ranks in another order after a destroy: the same group, and it still works."""
    import torch
    import torch.distributed as dist

    group = dist.new_group([0, 1, 3])
    if dist.get_rank() != 2:
        dist.destroy_process_group(group)
    again = dist.new_group([3, 1, 0])
    value = torch.ones(1)
    if dist.get_rank() != 2:
        dist.all_reduce(value, group=again)
    members = 0 if dist.get_rank() == 2 else len(dist.get_process_group_ranks(again))
    return again is group and members == (0 if dist.get_rank() == 2 else 3) and value.item() == (1 if dist.get_rank() == 2 else 3)


def destroy_world():
    import torch.distributed as dist

    dist.destroy_process_group()


def hf_logits(seed):
    """Logits of a small Qwen3 at seeded weights."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=64,
    )
    return Qwen3ForCausalLM(config)(torch.arange(10)[None]).logits


def whoami():
    import torch.distributed as dist

    return dist.get_rank(), os.getpid()
