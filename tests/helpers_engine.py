"""What the engine's tests run in worlds, and the toys they share; no test of its own.

Nothing at the top imports torch, megatron or the bridges: the clean world imports this file too.
"""

from __future__ import annotations

import contextlib
import json
from contextlib import contextmanager
from typing import Any

VARIANTS = {
    "llama": "meta-llama/Llama-3.1-8B-Instruct",
    "mistral": "mistralai/Mistral-7B-v0.1",
    "nemotron": "nvidia/Minitron-4B-Base",
    "qwen2": "Qwen/Qwen2-7B",
    "qwen3": "Qwen/Qwen3-8B",
}


def toy(family: str, geometry: str = "default", **fields: Any) -> dict[str, Any]:
    """The toy config of a family's main variant; `fields` replace its own, REMOVED deletes."""
    from shardproof import fixtures
    from shardproof.toy_models import toy_config

    return change(toy_config(fixtures.published(VARIANTS[family]), geometry), fields)


REMOVED = "<removed>"


def change(config: dict, fields: dict) -> dict:
    """A config with fields replaced or, where the value is REMOVED, deleted."""
    return {k: v for k, v in (config | fields).items() if not (isinstance(v, str) and v == REMOVED)}


def tokens(vocab: int, length: int):
    """Token ids [1, length]."""
    import torch

    return torch.randint(3, vocab, (1, length), generator=torch.Generator().manual_seed(11))


# ---------------------------------------------------------------------------------------------------------- the clean world
def hf_toy(config: dict, folder: str, shard: str = "40KB") -> None:
    """*clean*: write a toy folder."""
    from shardproof.toy_models import write_toy

    write_toy(config, folder, max_shard_size=shard)


def hf_parsed(configs: list[dict]) -> list[dict]:
    """*clean*: what transformers makes of each config.json, as a dict of every attribute; or the error.

    Each gets a copy: transformers writes into the rope dict that it is given.
    """
    from transformers import AutoConfig

    def parse(config):
        return json.loads(AutoConfig.for_model(**json.loads(json.dumps(config))).to_json_string(use_diff=False))

    return [_caught(parse, config=c) for c in configs]


def hf_logits(folder: str, length: int):
    """*clean*: logits of a folder as transformers loads it, in fp32, and what loading complained about."""
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype="auto", output_loading_info=True
    )
    with torch.no_grad():
        logits = model.float().eval()(tokens(model.config.vocab_size, length)).logits
    return {"logits": logits, "complaints": {k: sorted(map(str, v)) for k, v in info.items() if v}}


def hf_loads(folders: list[str]) -> list[str | None]:
    """*clean*: for each folder None if stock transformers loads a model from it without a complaint, else why not."""
    from transformers import AutoModelForCausalLM

    out = []
    for folder in folders:
        try:
            _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
            out.append(str(info) if any(info.values()) else None)
        except Exception as error:
            out.append(f"{type(error).__name__}: {error}"[:300])
    return out


# ------------------------------------------------------------------------------------------------------------------- ranks
def bridge_logits(folder: str, length: int, plan: str = ""):
    """*one rank*: the bridge's logits of a folder."""
    from shardproof.bridges.auto import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(folder)
    return forward(bridge.to_megatron_model(), bridge.architecture.settings["vocab_size"], length)


def forward(chunks: list, vocab: int, length: int):
    """Logits [1, length, vocab] of a model on one rank, in fp32."""
    import torch

    with torch.no_grad():
        return chunks[0].eval()(tokens(vocab, length), torch.arange(length)[None], None)[..., :vocab].float().clone()


@contextmanager
def patched(owner, name: str, value):
    """Replace an attribute for a while."""
    before = owner.__dict__[name] if isinstance(owner, type) else getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _caught(task, **kwargs) -> dict:
    """A task's result, or {"error": type name, "message": text}."""
    try:
        return task(**kwargs)
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)[:400]}


# ------------------------------------------------------------------------------------------------------------------- plans
def megatron_coordinates(plans: list[str]) -> list[list[dict]]:
    """*one rank*: for each plan, for each rank, its coordinates from the groups that megatron-core's RankGenerator makes."""
    from megatron.core.parallel_state import RankGenerator
    from shardproof.bridges.plan import ParallelPlan

    out = []
    for text in plans:
        p = ParallelPlan.parse(text)
        order, world = "tp-cp-ep-dp-pp", p.tp * p.cp * p.dp * p.pp
        dense = RankGenerator(tp=p.tp, ep=1, dp=p.dp, pp=p.pp, cp=p.cp, order=order)
        expert = RankGenerator(tp=p.expert_tp, ep=p.ep, dp=world // (p.expert_tp * p.ep * p.pp), pp=p.pp, cp=1, order=order)
        axes = {"tp": (dense, "tp"), "cp": (dense, "cp"), "dp": (dense, "dp"), "pp": (dense, "pp")}
        axes |= {"etp": (expert, "tp"), "ep": (expert, "ep"), "edp": (expert, "dp")}
        where = [{} for _ in range(world)]
        for name, (generator, axis) in axes.items():
            for group in generator.get_ranks(axis):
                for index, rank in enumerate(group):
                    where[rank][name] = index
        assert [w["pp"] for w in where] == [next(g.index(r) for g in expert.get_ranks("pp") if r in g) for r in range(world)]
        out.append(where)
    return out


def running_coordinates(plan: str) -> dict:
    """*rank*: this rank's coordinates as the bridges ask parallel_state for them, and those of the plan."""
    import dataclasses

    import torch
    from shardproof.bridges import parallel
    from shardproof.bridges.plan import ParallelPlan

    planned = ParallelPlan.parse(plan).coordinates(torch.distributed.get_rank())
    return {"running": dataclasses.asdict(parallel.coordinates()), "planned": dataclasses.asdict(planned)}


def built_layers(config: dict, plan: str) -> list[list[int]]:
    """*a rank of a fake world*: the global numbers (from 0) of the decoder layers of each chunk that megatron-core builds."""
    import torch
    from shardproof.bridges.auto import AutoBridge

    provider = AutoBridge(config).to_megatron_provider(load_weights=False).apply(plan)
    provider.perform_initialization, provider.init_model_with_meta_device = False, True
    with torch.device("meta"):
        chunks = provider.provide_distributed_model(wrap_with_ddp=False)
    return [[layer.layer_number - 1 for layer in chunk.decoder.layers] for chunk in chunks]


# --------------------------------------------------------------------------------------------------------------- checkpoints
def imports(folders: list[str]) -> list[dict | None]:
    """*one rank*: import each folder to FOLDER.out; None, or the error."""
    from shardproof.bridges.auto import AutoBridge

    return [_caught(lambda f=f: AutoBridge.import_ckpt(f, f + ".out")) for f in folders]


def failed_load(folder: str, bad: str) -> dict:
    """*one rank*: build from `folder`, then load the weights of `bad`; the error and the parameters that changed."""
    from shardproof.bridges.auto import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(folder)
    model = bridge.to_megatron_model()
    before = {n: p.detach().clone() for n, p in model[0].named_parameters()}
    caught = _caught(lambda: bridge.load_hf_weights(model, bad))
    changed = [n for n, p in model[0].named_parameters() if not before[n].equal(p)]
    return {"caught": caught if isinstance(caught, dict) else None, "changed": changed}


def saved(
    folder: str, out: str, kind: str, plan: str = "", limit: int | None = None, kill: list | None = None, **options
) -> dict | None:
    """*rank*: import `folder` and save it as ``hf`` or ``megatron``; None, or the error.

    limit: no file may grow past so many bytes. kill: [name of a function "module:attribute", number of its call that ends this
    process]."""
    import resource

    from shardproof.bridges.auto import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(folder)
    model = bridge.to_megatron_model(plan=plan)
    save = {"hf": bridge.save_hf_pretrained, "weights": bridge.save_hf_weights, "megatron": bridge.save_megatron_model}[kind]
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    with _killed_at(*kill) if kill else contextlib.nullcontext():
        try:
            if limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
            return _caught(lambda: save(model, out, **options))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)


@contextmanager
def _killed_at(name: str, call: int):
    """End this process with SIGKILL at the n-th call (counted from 1) of a function."""
    import os
    import signal
    from importlib import import_module

    module, _, attribute = name.partition(":")
    owner = import_module(module)
    *path, attribute = attribute.split(".")
    for part in path:
        owner = getattr(owner, part)
    real, seen = getattr(owner, attribute), []

    def counted(*args, **kwargs):
        seen.append(1)
        if len(seen) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    with patched(owner, attribute, counted):
        yield
    assert len(seen) >= call, f"{name} was called {len(seen)} times"


def reload_megatron(saved: str, plan: str = "") -> dict | None:
    """*rank*: rebuild a model from a torch_dist checkpoint alone and export it (rank 0's export), or the error."""
    import torch
    from shardproof.bridges.auto import AutoBridge

    def load():
        bridge = AutoBridge.from_megatron(saved)
        exported = dict(bridge.export_hf_weights(bridge.load_megatron_model(saved, plan=plan)))
        return {"weights": exported if torch.distributed.get_rank() == 0 else None}

    return _caught(load)


def bytes_read(folder: str, plan: str) -> dict:
    """*rank*: bytes that this rank's import read, of all parameters it holds, and of the whole checkpoint."""
    from shardproof.bridges.auto import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(folder)
    chunks = bridge.to_megatron_model(plan=plan)
    held = sum(p.numel() * p.element_size() for chunk in chunks for p in chunk.parameters())
    return {"read": bridge.source.bytes_read, "held": held, "whole": bridge.source.nbytes()}


def exported(folder: str, plan: str = "") -> dict:
    """*rank*: every rank's export of a folder."""
    from shardproof.bridges.auto import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(folder)
    return dict(bridge.export_hf_weights(bridge.to_megatron_model(plan=plan)))
