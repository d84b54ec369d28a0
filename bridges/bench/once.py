"""One measurement in a process of its own: ``PYTHON once.py TASK FOLDER OUT`` prints JSON with seconds, bytes and peak memory.

A script, run by path: peers run it in their own environments, so nothing but the standard library is imported before a task begins. Seconds are
of the work, after imports; `first` is from the process's launch to its first tensor; memory is what the work added to what the process had after
its imports. What was written is on the disk when the clock stops.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import re
import shutil
import sys
import time
import warnings
from pathlib import Path

TASKS = {}


def task(function):
    """Register a task: a generator that yields once when its imports are done, and then each time something has come out."""
    TASKS[function.__name__] = function
    return function


# ----------------------------------------------------------------------------------------------------------------- plain
@task
def cp(folder: Path, out: Path):
    """Copy the files."""
    yield
    shutil.copytree(folder, out)


@task
def safetensors_load(folder: Path, out: Path):
    """Load all tensors into memory of the process's own; safetensors itself only maps the files."""
    from safetensors.torch import load_file

    yield
    loaded = {n: t.clone() for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}
    assert loaded


@task
def safetensors_load_save(folder: Path, out: Path):
    """Load each file and save it."""
    from safetensors.torch import load_file, save_file

    yield
    out.mkdir()
    for file in sorted(folder.glob("*.safetensors")):
        save_file(load_file(file), out / file.name)


@task
def transformers_load_save(folder: Path, out: Path):
    """from_pretrained, save_pretrained."""
    from transformers import AutoModelForCausalLM

    yield
    AutoModelForCausalLM.from_pretrained(folder, dtype="auto").save_pretrained(out)


# ------------------------------------------------------------------------------------------------------------------ ours
@task
def shardproof_load(folder: Path, out: Path):
    """load_hf_weights into a model that is built."""
    from shardproof.bridges.auto import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(folder)
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.params_dtype = bridge.to_megatron_provider().params_dtype
    provider.filled = True
    model = provider.finalize().provide_distributed_model(wrap_with_ddp=False)
    yield
    bridge.load_hf_weights(model)


@task
def shardproof_export_weights(folder: Path, out: Path):
    """export_hf_weights of a model in memory, consumed tensor by tensor."""
    from shardproof.bridges.auto import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(folder)
    model = bridge.to_megatron_model()
    yield
    for _ in bridge.export_hf_weights(model):
        yield


@task
def shardproof_import(folder: Path, out: Path):
    """Hugging Face folder -> torch_dist."""
    from shardproof.bridges.auto import AutoBridge
    from shardproof.bridges.convert import import_folder

    _megatron_ready()
    yield
    import_folder(AutoBridge.from_hf_pretrained(folder), out)


@task
def shardproof_export(folder: Path, out: Path):
    """torch_dist -> Hugging Face folder."""
    from shardproof.bridges.auto import AutoBridge
    from shardproof.bridges.convert import export_folder

    _megatron_ready()
    yield
    export_folder(AutoBridge.from_megatron(folder), folder, out)


# ----------------------------------------------------------------------------------------------------------------- peers
@task
def megatron_bridge_import(folder: Path, out: Path):
    """Megatron-Bridge: what AutoBridge.import_ckpt does, without fusions that want a GPU."""
    _one_rank()
    from megatron.bridge import AutoBridge

    yield
    bridge = AutoBridge.from_hf_pretrained(str(folder))
    provider = bridge.to_megatron_provider()
    provider.gradient_accumulation_fusion = provider.apply_rope_fusion = provider.moe_permute_fusion = False
    provider.finalize()
    model = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
    bridge.save_megatron_model(model, str(out), low_memory_save=True)


@task
def megatron_bridge_export(folder: Path, out: Path):
    """Megatron-Bridge: AutoBridge.export_ckpt; the Hugging Face folder it wants lies beside."""
    _megatron_ready()
    from megatron.bridge import AutoBridge

    yield
    AutoBridge.from_hf_pretrained(str(folder.parent / "hf")).export_ckpt(str(folder), str(out), show_progress=False)


@task
def mbridge_load(folder: Path, out: Path):
    """mbridge: load_weights into a model that is built."""
    _one_rank()
    from mbridge import AutoBridge

    bridge = AutoBridge.from_pretrained(str(folder))
    model = bridge.get_model()
    yield
    bridge.load_weights(model, str(folder))


@task
def mbridge_save(folder: Path, out: Path):
    """mbridge: save_weights of a model in memory."""
    _one_rank()
    from mbridge import AutoBridge

    bridge = AutoBridge.from_pretrained(str(folder))
    model = bridge.get_model()
    bridge.load_weights(model, str(folder))
    yield
    out.mkdir()
    bridge.save_weights(model, str(out))


def _megatron_ready() -> None:
    from shardproof.bridges import host

    host.install()
    import megatron.core.models.gpt  # noqa: F401 - counted among the imports


def _gloo() -> None:
    """One rank on the CPU; a peer without a group starts NCCL."""
    _megatron_ready()
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def _one_rank() -> None:
    _gloo()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)


# ------------------------------------------------------------------------------------------------------------- measuring
def memory(field: str) -> int:
    """Bytes of a line of this process's status."""
    return 1024 * int(re.search(rf"^{field}:\s+(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


def on_disk(out: Path) -> None:
    """Wait until everything below a folder is on the disk."""
    for root, _, files in os.walk(out):
        for name in files:
            with open(Path(root) / name, "rb") as file:
                os.fsync(file.fileno())


def at_hand(size: int) -> None:
    """Touch so much memory and let it go: a virtual machine may have given its free pages back, and whoever writes first would pay for them."""
    if size:
        with mmap.mmap(-1, size) as pages:
            for first in range(0, size, mmap.PAGESIZE):
                pages[first] = 1


def measured(name: str, folder: Path, out: Path) -> dict:
    """Run a task once."""
    run = TASKS[name](folder, out)
    next(run)
    gc.freeze()  # whatever was imported: collections need not look at it again
    at_hand(sum(512 * file.stat().st_blocks for file in folder.rglob("*") if file.is_file()))
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    for _ in run:
        pass
    done = time.perf_counter()
    on_disk(out)
    return {"seconds": done - start, "flushed": time.perf_counter() - start, "grown": memory("VmHWM") - before, "before": before}


def main() -> None:
    """Print the measurement of the task that the arguments name; peers' own talk goes to stderr."""
    warnings.filterwarnings("ignore")
    launched = time.time()
    real, sys.stdout = sys.stdout, sys.stderr
    result = measured(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    print(json.dumps(result | {"total": time.time() - launched}), file=real)


if __name__ == "__main__":
    main()
