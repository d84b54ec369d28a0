"""Conversions of files without a model: bit for bit what a model would give, in little memory, gone on with, checked by digests.

Functions named do_* are tasks: they run in real ranks, whose workers import this file.
"""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers_engine import _killed_at, toy
from hypothesis import given, settings
from hypothesis import strategies as st
from shardproof import fixtures
from shardproof.bridges.adapter import ADAPTER
from shardproof.bridges.io.slices import runs
from shardproof.conformance.cases import families
from shardproof.toy_models import toy_config

HERE = "test_streaming"
SMALL = toy("llama", num_hidden_layers=3)
FIRST = {family: variants[0] for family, variants in families(ADAPTER).items()}


def load_all(folder):
    """Every tensor of a folder."""
    from safetensors.torch import load_file

    return {n: t for p in sorted(Path(folder).glob("*.safetensors")) for n, t in load_file(p).items()}


def same(got, want):
    """Names, types and bits."""
    import torch

    def raw(tensor):
        return tensor.contiguous().view(-1).view(torch.uint8)

    alike = [n for n in want if n in got and got[n].dtype == want[n].dtype and raw(got[n]).equal(raw(want[n]))]
    return sorted(set(got) ^ set(want)) or sorted(set(want) - set(alike))


def caught(call):
    """None, or "Kind: message" of the bridge's error."""
    from shardproof.bridges import BridgeError

    try:
        call()
    except BridgeError as why:
        return f"{type(why).__name__}: {why}"
    return None


def bridge_of(folder):
    from shardproof.bridges import AutoBridge

    return AutoBridge.from_hf_pretrained(folder)


# ------------------------------------------------------------------------------------------------------------ every family
def do_there_and_back(folder, out, plan=""):
    """Import by streaming, load the checkpoint into a model by megatron-core and export that; export by streaming: what came back of both."""
    import torch
    from shardproof.bridges import AutoBridge
    from shardproof.bridges.convert import export_folder, import_folder

    bridge = bridge_of(folder)
    read = import_folder(bridge, f"{out}/mg", plan=plan)
    loaded = dict(bridge.export_hf_weights(bridge.load_megatron_model(f"{out}/mg", plan=plan)))
    export_folder(AutoBridge.from_megatron(f"{out}/mg"), f"{out}/mg", f"{out}/hf", plan=plan, max_shard_size="30KB")
    if torch.distributed.get_rank():
        return {"read": read}
    want = dict(bridge.export_hf_weights(bridge.to_megatron_model(plan=plan))) if not plan else None
    return {
        "read": read,
        "loaded": same(loaded, want or load_all(folder)),
        "back": same(load_all(f"{out}/hf"), want or load_all(folder)),
    }


@pytest.mark.parametrize("family", FIRST)
def test_every_family_streams_as_a_model_would(family, toys, solo, tmp_path):
    """Hugging Face -> torch_dist -> Hugging Face without a model has the bits that import, save, load and export of a model have."""
    folder = toys(toy_config(fixtures.published(FIRST[family])))
    found = solo(f"{HERE}:do_there_and_back", folder=str(folder), out=str(tmp_path))
    assert found["loaded"] == found["back"] == [], found


PLANS = {
    "llama": ["tp2", "pp2,vpp2,split2-1-1-1", "dp2"],
    "qwen3_moe": ["tp2,sp,ep2,etp1", "pp2,split3-2"],
    "gpt_oss": ["tp2,sp,ep2,etp1"],
    "deepseek_v3": ["tp2,sp,ep2"],
    "glm4_moe": ["pp2,split3-2"],
}


@pytest.mark.parametrize(("family", "plan"), [(f, p) for f, plans in PLANS.items() for p in plans])
def test_ranks_share_the_work(family, plan, toys, ranks, solo, tmp_path):
    """Ranks of a plan write one checkpoint together and share the files of the export; one rank exports it too, bit for bit."""
    folder = toys(toy_config(fixtures.published(FIRST[family])))
    found = ranks(f"{HERE}:do_there_and_back", plan, folder=str(folder), out=str(tmp_path))
    assert found[0]["loaded"] == found[0]["back"] == [], found[0]
    read, whole = [rank["read"] for rank in found], sum(t.nbytes for t in load_all(folder).values())
    assert whole <= sum(read) <= 1.05 * whole, (read, whole)  # each element once, whatever ranks hold copies of it
    assert solo(f"{HERE}:do_export", saved=f"{tmp_path}/mg", out=f"{tmp_path}/one") is None
    assert same(load_all(tmp_path / "one"), load_all(tmp_path / "hf")) == []


def do_export(saved, out, **options):
    """Export by streaming; None or the error."""
    from shardproof.bridges import AutoBridge

    return caught(lambda: AutoBridge.export_ckpt(saved, out, **options))


def do_import(folder, out, kill=None, file_bytes=None, **options):
    """Import by streaming with small files; {"read": bytes} or {"error": words}."""
    import contextlib

    from shardproof.bridges.convert import import_folder
    from shardproof.bridges.io import dcp

    bridge, before = bridge_of(folder), dcp.FILE_BYTES
    dcp.FILE_BYTES = file_bytes or before
    try:
        with _killed_at(*kill) if kill else contextlib.nullcontext():
            error = caught(lambda: import_folder(bridge, out, **options))
    finally:
        dcp.FILE_BYTES = before
    return {"error": error} if error else {"read": bridge.source.bytes_read}


# ----------------------------------------------------------------------------------------------------- megatron-core's own
def do_compare_with_megatron(folder, out):
    """What our writer and megatron-core's own wrote of one model: metadata entries in which they differ."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import verify_integrity_manifest
    from shardproof.bridges.convert import import_folder
    from shardproof.bridges.io.pieces import state_of
    from torch.distributed.checkpoint import FileSystemReader

    bridge = bridge_of(folder)
    import_folder(bridge, f"{out}/ours")
    verify_integrity_manifest(f"{out}/ours/iter_0000000")
    os.makedirs(f"{out}/theirs")
    import multiprocessing

    multiprocessing.current_process()._config["daemon"] = False  # its writer starts a process
    dist_checkpointing.save({**state_of(bridge.to_megatron_model()), "checkpoint_version": 3.0, "iteration": 0}, f"{out}/theirs")

    def entries(folder):
        found = FileSystemReader(folder).read_metadata().state_dict_metadata
        return {
            key: (str(e.properties.dtype), tuple(e.size), sorted((tuple(c.offsets), tuple(c.sizes)) for c in e.chunks))
            if hasattr(e, "properties")
            else "object"
            for key, e in found.items()
        }

    ours, theirs = entries(f"{out}/ours/iter_0000000"), entries(f"{out}/theirs")
    return {
        "differ": sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)),
        "common": [dist_checkpointing.load_common_state_dict(f) for f in (f"{out}/ours/iter_0000000", f"{out}/theirs")],
        "count": len(ours),
    }


@pytest.mark.parametrize("family", ["qwen3", "glm4_moe"])
def test_the_checkpoint_is_what_megatron_core_would_have_written(family, toys, solo, tmp_path):
    """Keys, shapes, types, offsets, objects and common state are those of dist_checkpointing.save; its integrity check passes."""
    folder = toys(toy_config(fixtures.published(FIRST[family])))
    found = solo(f"{HERE}:do_compare_with_megatron", folder=str(folder), out=str(tmp_path))
    assert found["differ"] == [] and found["count"] > 40 and found["common"][0] == found["common"][1], found


def trainer_round(folder, out, distributed):
    """megatron.training's loader reads what we wrote; after a step its save, optimizer included, is exported."""
    import torch
    from shardproof.bridges import host

    host.install()
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from shardproof.bridges.convert import export_folder, import_folder

    bridge, out = bridge_of(folder), Path(out)
    import_folder(bridge, out / "mg")
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=distributed)
    model = bridge.to_megatron_provider(load_weights=False).finalize().provide_distributed_model(ddp_config=ddp)

    from megatron.training import checkpointing
    from megatron.training.arguments import parse_args
    from megatron.training.global_vars import set_args

    sys.argv = ["train"]
    args = parse_args()
    sizes = {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "data_parallel_size": 1,
        "world_size": 1,
        "rank": 0,
    }
    where = {"load": str(out / "mg"), "save": str(out / "trained"), "ckpt_format": "torch_dist", "use_dist_ckpt": True}
    without = {"no_load_optim": True, "no_load_rng": True, "dist_ckpt_optim_fully_reshardable": True}
    vars(args).update(sizes | where | without | {"use_distributed_optimizer": distributed})
    set_args(args)
    assert checkpointing.load_checkpoint(model, None, None)[0] == 0
    assert same(dict(bridge.export_hf_weights(model)), load_all(folder)) == []

    settings = OptimizerConfig(optimizer="adam", lr=0.01, params_dtype=torch.float32, use_distributed_optimizer=distributed)
    optimizer = get_megatron_optimizer(settings, model, use_gloo_process_groups=False)
    for param in model[0].parameters():
        param.main_grad.normal_()
    optimizer.step()
    args.iteration = 7
    checkpointing.save_checkpoint(7, model, optimizer, None, 0)
    export_folder(bridge, out / "trained", out / "back")
    trained = dict(bridge.export_hf_weights(model))
    assert same(load_all(out / "back"), trained) == [] and len(same(trained, load_all(folder))) == len(trained)
    keys = json.dumps(sorted(pickle.loads((out / "trained/iter_0000007/.metadata").read_bytes()).state_dict_metadata))
    assert "optimizer" in keys, keys
    print("trainer: ok")


@pytest.mark.parametrize("distributed", [False, True], ids=["adam", "distributed-adam"])
def test_megatrons_trainer_reads_ours_and_we_read_its(distributed, toys, tmp_path):
    """load_checkpoint and save_checkpoint of megatron.training, with optimizer state, in a process of their own."""
    code = f"import {HERE}; {HERE}.trainer_round({str(toys(SMALL))!r}, {str(tmp_path)!r}, {distributed})"
    script = tmp_path / "round.py"  # its writer spawns a process, which imports the main module
    script.write_text(f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\nif __name__ == '__main__':\n    {code}\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "trainer: ok" in done.stdout, done.stderr[-3000:]


# --------------------------------------------------------------------------------------------------------- interruptions
def test_an_interrupted_import_goes_on(toys, solo, tmp_path):
    """After SIGKILL files that are complete are kept: the second run reads only what is left, and the result is the same."""
    from shardproof.conformance.worlds import RankError

    folder, out, small = toys(SMALL), tmp_path / "out", {"file_bytes": 20_000}
    whole = solo(f"{HERE}:do_import", folder=str(folder), out=str(tmp_path / "whole"), **small)["read"]
    with pytest.raises(RankError, match="SIGKILL"):
        solo(f"{HERE}:do_import", folder=str(folder), out=str(out), kill=["shardproof.bridges.io.dcp:_save", 20], **small)
    assert not (out / "latest_checkpointed_iteration.txt").exists()
    kept = {p.name: p.stat().st_mtime_ns for p in (out / ".iter_0000000.partial").glob("*.distcp")}
    again = solo(f"{HERE}:do_import", folder=str(folder), out=str(out), **small)
    assert 0 < again["read"] < 0.8 * whole, (again, whole)
    now = {p.name: p.stat().st_mtime_ns for p in (out / "iter_0000000").glob("*.distcp")}
    assert sum(kept[n] == now.get(n) for n in kept) >= 2, (kept, now)
    assert solo(f"{HERE}:do_export", saved=str(out), out=str(tmp_path / "back")) is None
    assert same(load_all(tmp_path / "back"), load_all(folder)) == []
    assert not [p for p in out.rglob("*") if p.name.endswith((".jsonl", ".partial")) or p.name == "conversion.json"]


@pytest.mark.parametrize("what", ["damaged", "source", "plan"])
def test_what_does_not_fit_is_made_again(what, toy_copy, solo, ranks, tmp_path):
    """A kept file whose bytes changed is written again; another source or plan begins from nothing."""
    from shardproof.conformance.worlds import RankError

    folder, out = toy_copy(SMALL), tmp_path / "out"
    with pytest.raises(RankError, match="SIGKILL"):
        kill = ["shardproof.bridges.io.dcp:_save", 20]
        solo(f"{HERE}:do_import", folder=str(folder), out=str(out), kill=kill, file_bytes=20_000)
    if what == "damaged":
        file = min((out / ".iter_0000000.partial").glob("*.distcp"))
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    elif what == "source":
        os.utime(next(folder.glob("*.safetensors")))
    if what == "plan":
        results = ranks(f"{HERE}:do_import", "tp2", folder=str(folder), out=str(out))
    else:
        results = [solo(f"{HERE}:do_import", folder=str(folder), out=str(out), file_bytes=20_000)]
    whole = sum(t.nbytes for t in load_all(folder).values())
    assert what == "damaged" or sum(r["read"] for r in results) >= whole, (results, whole)
    assert solo(f"{HERE}:do_export", saved=str(out), out=str(tmp_path / "back")) is None
    assert same(load_all(tmp_path / "back"), load_all(folder)) == []


def do_killed_export(saved, out, kill):
    """Export in small files until a call ends this process."""
    from shardproof.bridges import AutoBridge

    with _killed_at(*kill):
        AutoBridge.export_ckpt(saved, out, max_shard_size="20KB")


def test_an_interrupted_export_goes_on(toys, solo, tmp_path):
    """Complete files are kept, nothing loads before all are there, and the next run finishes the folder."""
    from shardproof.conformance.worlds import RankError

    folder, mg, out = toys(SMALL), str(tmp_path / "mg"), tmp_path / "out"
    solo(f"{HERE}:do_import", folder=str(folder), out=mg)
    with pytest.raises(RankError, match="SIGKILL"):
        solo(f"{HERE}:do_killed_export", saved=mg, out=str(out), kill=["shardproof.bridges.io.sink:as_bytes", 17])
    assert not out.exists()
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / ".out.partial").glob("*.safetensors")}
    assert solo(f"{HERE}:do_export", saved=mg, out=str(out), max_shard_size="20KB") is None
    now = {p.name: p.stat().st_mtime_ns for p in out.glob("*.safetensors")}
    assert sum(kept[n] == now.get(n) for n in kept) >= 1, (kept, now)
    assert same(load_all(out), load_all(folder)) == [] and not (tmp_path / ".out.partial").exists()
    assert not [p.name for p in out.iterdir() if p.name.endswith(".jsonl") or p.name == "conversion.json"]


def test_two_processes_do_not_write_one_output(toys, solo, tmp_path):
    """The second is told so."""
    import fcntl

    partial = tmp_path / "out" / ".iter_0000000.partial"
    partial.mkdir(parents=True)
    with open(partial / "conversion.json", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        found = solo(f"{HERE}:do_import", folder=str(toys(SMALL)), out=str(tmp_path / "out"))
    assert "another process is writing" in found["error"], found


def test_ctrl_c_keeps_what_is_complete(toys, tmp_path):
    """SIGINT to the command: no checkpoint, and the next run goes on."""
    folder, out = toys(SMALL), tmp_path / "out"
    code = (
        "import os, signal, sys\n"
        "from shardproof.bridges.io import dcp\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # whoever started the tests may ignore it
        "real, seen, dcp.FILE_BYTES = dcp._save, [], 20_000\n"
        "def save(*a):\n"
        "    seen.append(1)\n"
        "    if len(seen) == 20: os.kill(os.getpid(), signal.SIGINT)\n"
        "    return real(*a)\n"
        "dcp._save = save\n"
        "from shardproof.bridges.cli import main\n"
        f"sys.argv = ['shardproof', 'import', {str(folder)!r}, {str(out)!r}]\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode not in (0, -signal.SIGSEGV) and not (out / "iter_0000000").exists(), done
    assert list((out / ".iter_0000000.partial").glob("files-0.jsonl")), (done.stderr, list(out.rglob("*")))


# ----------------------------------------------------------------------------------------------------------------- digests
def test_a_changed_byte_is_refused(toys, solo, tmp_path):
    """Export compares the checkpoint with its SHA-256s: one bit that changed names the file, and leaves nothing; --no-verify takes it."""
    folder, mg, out = toys(SMALL), tmp_path / "mg", tmp_path / "out"
    solo(f"{HERE}:do_import", folder=str(folder), out=str(mg))
    file = max((mg / "iter_0000000").glob("*.distcp"), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    where = content.find(load_all(folder)["model.layers.1.self_attn.o_proj.weight"].numpy().tobytes())
    assert where > 0
    content[where + 3] ^= 1
    file.write_bytes(bytes(content))
    refused = solo(f"{HERE}:do_export", saved=str(mg), out=str(out))
    assert refused.startswith("CheckpointError") and file.name in refused and "SHA-256" in refused, refused
    assert not out.exists() and not (tmp_path / ".out.partial").exists()
    assert solo(f"{HERE}:do_export", saved=str(mg), out=str(out), verify=False) is None
    assert same(load_all(out), load_all(folder)) == ["model.layers.1.self_attn.o_proj.weight"]


@pytest.mark.parametrize("how", ["file lost", "file cut", "metadata cut", "other model"])
def test_damaged_checkpoints_are_refused_in_words(how, toys, toy_copy, solo, tmp_path):
    """Without digests too: what is missing is named, nothing is left."""
    mg, out = tmp_path / "mg", tmp_path / "out"
    solo(f"{HERE}:do_import", folder=str(toys(SMALL)), out=str(mg))
    folder = mg / "iter_0000000"
    (folder / "integrity.json").unlink()
    file = max(folder.glob("*.distcp"), key=lambda p: p.stat().st_size)
    words = file.name
    if how == "file lost":
        file.unlink()
    elif how == "file cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif how == "metadata cut":
        (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:100])
        words = ".metadata"
    else:
        record = mg / "shardproof/shardproof_model.json"
        said = json.loads(record.read_text())
        said["hf_config"]["num_hidden_layers"] = 4
        record.write_text(json.dumps(said))
        words = "is the config of another model"
    refused = solo(f"{HERE}:do_export", saved=str(mg), out=str(out))
    assert refused and words in refused and not out.exists() and not (tmp_path / ".out.partial").exists(), refused


# ------------------------------------------------------------------------------------------------------------------ memory
def do_grown(folder, out, back):
    """Bytes by which this process grew while it imported and exported."""
    from shardproof.bridges import AutoBridge
    from shardproof.bridges.convert import export_folder, import_folder
    from shardproof.conformance.tasks.spending import _grown

    grown = [_grown(lambda: import_folder(bridge_of(folder), out))]
    return [*grown, _grown(lambda: export_folder(AutoBridge.from_megatron(out), out, back))]


def test_memory_does_not_grow_with_the_model(clean, solo, tmp_path):
    """A model of 46 MB in 12 layers, no tensor above 2.1 MB: both directions stay within two of the largest and the code's own growth."""
    config = toy("llama", hidden_size=128, intermediate_size=2048, num_hidden_layers=12, vocab_size=4096)
    folder = tmp_path / "toy"
    clean.run(f"{HERE}:do_write", {"config": config, "folder": str(folder)})
    tensors = load_all(folder)
    assert max(t.nbytes for t in tensors.values()) <= 2.2e6 and sum(t.nbytes for t in tensors.values()) > 40e6
    solo(f"{HERE}:do_grown", folder=str(folder), out=str(tmp_path / "warm"), back=str(tmp_path / "warmed"))
    grown = solo(f"{HERE}:do_grown", folder=str(folder), out=str(tmp_path / "mg"), back=str(tmp_path / "hf"))
    assert max(grown) < 12e6, grown


def do_write(config, folder):
    """Files of a model too large for a toy, without transformers."""
    import torch
    from shardproof.bridges.families import find_family
    from shardproof.bridges.io.sink import Entry, write_json, write_weights

    shapes = find_family(config).architecture(config).hf_shapes()
    Path(folder).mkdir()
    entries = [Entry(name, shape, "float32") for name, shape in shapes.items()]
    write_weights(Path(folder), entries, ((e.name, torch.randn(e.shape)) for e in entries))
    write_json(Path(folder) / "config.json", config)


# ------------------------------------------------------------------------------------------------------------------ slices
_sizes = st.lists(st.integers(1, 6), min_size=1, max_size=4)


@st.composite
def selections(draw):
    """A shape and a selection of it."""
    shape = tuple(draw(_sizes))
    where = []
    for n in shape[: draw(st.integers(0, len(shape)))]:
        if draw(st.booleans()) and draw(st.booleans()):
            where.append(draw(st.integers(0, n - 1)))
        else:
            first = draw(st.integers(0, n - 1))
            where.append(slice(first, draw(st.integers(first + 1, n)), draw(st.sampled_from([None, 1, 2, 3]))))
    return shape, tuple(where)


@given(selections())
@settings(derandomize=True, max_examples=400, deadline=None)
def test_runs_are_numpys_selection(selection):
    """Runs, one after another, are the elements that numpy selects, in its order; none is split needlessly."""
    shape, where = selection
    numbers = np.arange(int(np.prod(shape))).reshape(shape)
    firsts, length, selected = runs(shape, where)
    got = (firsts[:, None] + np.arange(length)).reshape(selected)
    assert (got == numbers[where]).all() and got.shape == numbers[where].shape
    flat = got.reshape(-1)
    joined = [a for a, b in zip(firsts, firsts[1:], strict=False) if a + length == b]
    assert not joined or any(isinstance(w, slice) for w in where), (shape, where, flat)


def test_a_copy_is_not_left_behind(toys, solo, tmp_path):
    """Overwriting replaces a folder whole; one that exists is refused before anything is written."""
    mg, out = tmp_path / "mg", tmp_path / "out"
    solo(f"{HERE}:do_import", folder=str(toys(SMALL)), out=str(mg))
    shutil.copytree(toys(SMALL), out)
    (out / "stray.bin").write_text("old")
    assert "exists" in solo(f"{HERE}:do_export", saved=str(mg), out=str(out))
    assert (out / "stray.bin").exists()
    assert solo(f"{HERE}:do_export", saved=str(mg), out=str(out), overwrite=True) is None
    assert not (out / "stray.bin").exists() and same(load_all(out), load_all(toys(SMALL))) == []
