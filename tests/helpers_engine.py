"""What the engine's tests run in worlds, and the toys they share; no test of its own.

Nothing at the top imports torch, megatron or the bridges: the clean world imports this file too.
"""

from __future__ import annotations

import contextlib
import json
import re
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
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


def hf_variants(jobs: list[dict]) -> list[dict]:
    """*clean*: for each job (config, folder, length) let transformers read config.json, fill its model with loud weights (a
    function of name and shape, so equal shapes have equal weights), save them, and give logits and the parsed config; or the
    error."""
    return [_caught(_hf_variant, **job) for job in jobs]


def _hf_variant(config: dict, folder: str, length: int) -> dict:
    import torch
    from safetensors.torch import save_file
    from shardproof.toy_models import loud
    from transformers import AutoConfig, AutoModelForCausalLM

    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "config.json").write_text(json.dumps(config))
    parsed = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(parsed, attn_implementation="eager").float().eval()
    tied = set(model.all_tied_weights_keys)
    state = {n: loud(n, tuple(t.shape)) for n, t in model.state_dict().items() if n not in tied}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= tied, (missing, unexpected)
    save_file(state, Path(folder) / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        return {"logits": model(tokens(parsed.vocab_size, length)).logits}


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
def bridge_variants(jobs: list[dict], fault=None) -> list[dict]:
    """*one rank*: the bridge's logits for each job, its weights read from the job's folder; or the error. `fault`: a planted
    one around all jobs, see _context."""
    with _context(fault):
        return [_caught(_bridge_variant, **job) for job in jobs]


def _bridge_variant(config: dict, folder: str, length: int) -> dict:
    from shardproof.bridges.auto import AutoBridge

    bridge = AutoBridge(config, Path(folder))
    if not (Path(folder) / "model.safetensors").exists():  # transformers built no model
        return {"config": str(bridge.transformer_config)}
    return {"logits": forward(bridge.to_megatron_model(), bridge.architecture.settings["vocab_size"], length)}


def bridge_logits(folder: str, length: int, plan: str = "", fault=None):
    """*one rank*: the bridge's logits of a folder."""
    from shardproof.bridges.auto import AutoBridge

    with _context(fault):
        bridge = AutoBridge.from_hf_pretrained(folder)
        return forward(bridge.to_megatron_model(), bridge.architecture.settings["vocab_size"], length)


def forward(chunks: list, vocab: int, length: int):
    """Logits [1, length, vocab] of a model on one rank, in fp32."""
    import torch

    with torch.no_grad():
        return chunks[0].eval()(tokens(vocab, length), torch.arange(length)[None], None)[..., :vocab].float().clone()


def _context(fault):
    """A planted fault: None, or (name of a context manager of this module, its arguments)."""
    if not fault:
        return contextlib.nullcontext()
    name, *args = [fault] if isinstance(fault, str) else fault
    return globals()[name](*args)


@contextmanager
def patched(owner, name: str, value):
    """Replace an attribute for a while."""
    before = owner.__dict__[name] if isinstance(owner, type) else getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def blind_to(*keys: str):
    """*fault*: the config rules never see these fields."""
    from shardproof.bridges.config import ConfigRules

    read = ConfigRules.read
    with patched(
        ConfigRules, "read", lambda self, hf, allow=(): read(self, {k: v for k, v in hf.items() if k not in keys}, allow)
    ):
        yield


@contextmanager
def setting(name: str, value):
    """*fault*: one setting is always this value, or what a function of this module makes of it."""
    from shardproof.bridges.config import ConfigRules

    read = ConfigRules.read

    def wrong(self, hf, allow=()):
        settings = read(self, hf, allow)
        if settings.get(name) is not None:
            settings[name] = globals()[value[1:]](settings[name]) if isinstance(value, str) and value.startswith("=") else value
        return settings

    with patched(ConfigRules, "read", wrong):
        yield


def one_wider(window):
    """A window of one key more."""
    return [window[0] + 1, 0]


def late_by_one(slides):
    """The next layer's window."""
    return [*slides[1:], slides[0]] if isinstance(slides, list) else slides


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
    with _killed_at(*kill) if kill else _context(None):
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


# ------------------------------------------------------------------------------------------------------- wrong bridges
def __getattr__(name: str):
    """``RIGHT`` and ``FAULT_<name>``: adapters, made when asked for, since the clean world has no bridges."""
    if name == "RIGHT" or name.startswith("FAULT_"):
        return _adapter(name.removeprefix("FAULT_"))
    raise AttributeError(name)


def _adapter(fault: str):
    from shardproof.bridges.adapter import ReferenceAdapter

    class Faulty(ReferenceAdapter):
        """The reference adapter with one fault in force while it works."""

        name = f"reference with fault {fault}"

        def __init__(self):
            self.fault = FAULTS.get(fault, {})

        def _in_force(self):
            return self.fault.get("while", contextlib.nullcontext)()

        def build(self, folder, plan, *, with_ddp):
            with self._in_force(), self.fault.get("while building", contextlib.nullcontext)():
                chunks = super().build(folder, plan, with_ddp=with_ddp)
            self.fault.get("built", bool)(chunks)
            return chunks

        def export_weights(self, model, folder):
            with self._in_force():
                for name, tensor in super().export_weights(model, folder):
                    yield from self.fault.get("weight", _as_it_is)(name, tensor, folder)

        def export_gradients(self, model, folder):
            with self._in_force(), self.fault.get("while gradients", contextlib.nullcontext)():
                yield from super().export_gradients(model, folder)

        def save_hf(self, model, folder, out):
            with self._in_force():
                super().save_hf(model, folder, out)
            if _rank() == 0:
                self.fault.get("saved", bool)(Path(out))

        def load_megatron(self, folder, saved, plan):
            with self._in_force():
                chunks = super().load_megatron(folder, saved, plan)
            self.fault.get("loaded", bool)(chunks)
            return chunks

        def rewrite_config(self, config):
            return self.fault.get("config", dict)(super().rewrite_config(config))

        def flops(self, config, seq_len, batch):
            return super().flops(config, seq_len, batch) + self.fault.get("flops", lambda *a: 0)(config, seq_len, batch)

        def snapshot(self, config):
            with self._in_force():
                return super().snapshot(config)

    return Faulty()


def _as_it_is(name, tensor, folder):
    yield name, tensor


def _rank() -> int:
    import torch

    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def relation(change):
    """A fault in the global relations: ``change(tensor, settings)`` gives another Tensor (or None: as it is)."""

    @contextmanager
    def force():
        from shardproof.bridges.architecture import Architecture

        tensors = Architecture.tensors

        def wrong(self, *args, **kwargs):
            return [change(t, self.settings) or t for t in tensors(self, *args, **kwargs)]

        with patched(Architecture, "tensors", wrong):
            yield

    return force


def _part(name: str, *ends: str) -> bool:
    return name.endswith(tuple(f"{end}.weight" for end in ends) + tuple(f"{end}.bias" for end in ends))


def sources_swapped(end: str, a: int, b: int):
    """Two sources of the tensors that end so change places."""

    def change(t, v):
        if not _part(t.name, end):
            return None
        sources = list(t.sources)
        sources[a], sources[b] = sources[b], sources[a]
        return replace(t, sources=tuple(sources))

    return relation(change)


def rows_by(function):
    """QKV rows in another order: ``function`` takes and gives [group, heads a group + 2, dim]."""

    def change(t, v):
        if not _part(t.name, "linear_qkv"):
            return None
        groups, dim = v["num_query_groups"], v["kv_channels"]
        return replace(t, rows=function(t.rows.reshape(groups, -1, dim)).reshape(-1).copy())

    return relation(change)


def _heads_rotated(rows_GHD):
    import numpy as np

    return np.concatenate([np.roll(rows_GHD[:, :-2], 1, axis=1), rows_GHD[:, -2:]], axis=1)


def renamed(pairs: dict[str, str]):
    """Sources under other names: each key in a source's name becomes its value."""

    def change(t, v):
        names = []
        for s in t.sources:
            key = next((k for k in pairs if k in s.name), None)
            names.append(s if key is None else replace(s, name=s.name.replace(key, pairs[key])))
        return replace(t, sources=tuple(names)) if tuple(names) != t.sources else None

    return relation(change)


def _padding_first(t, v):
    import numpy as np

    fill = int((t.rows < 0).sum())
    return replace(t, rows=np.roll(t.rows, fill)) if fill else None


def _no_sections(t, v):
    from shardproof.bridges.relations import COLUMN

    return replace(t, shard=COLUMN) if t.shard.sections else None


@contextmanager
def _layer_before():
    """Ranks after the first fill layer n from the checkpoint's layer n - 1."""
    from megatron.core import parallel_state as ps

    def change(t, v):
        found = re.match(r"decoder\.layers\.(\d+)\.", t.name)
        if not found or found[1] == "0" or ps.get_pipeline_model_parallel_rank() == 0:
            return None
        was, now = f"layers.{found[1]}.", f"layers.{int(found[1]) - 1}."
        return replace(t, sources=tuple(replace(s, name=s.name.replace(was, now)) for s in t.sources))

    from shardproof.bridges import importer

    with patched(importer, "check_source", lambda *found: None), relation(change)():  # the bridge itself would see it
        yield


def each(end: str, change):
    """A fault in the built model: ``change(parameter)`` on every parameter that ends so."""

    def built(chunks):
        import torch

        with torch.no_grad():
            for chunk in chunks:
                for name, param in chunk.named_parameters():
                    if name.endswith(end):
                        change(param)

    return built


def _transposed(param):
    param.data.copy_(param.data.T.clone())


def _transposed_back(name, tensor, folder):
    yield name, tensor.T.contiguous() if name.endswith("down_proj.weight") else tensor


def _stale(param):
    param.data.copy_(param.data.roll(1, 0))


def _other_replica(param):
    from megatron.core import parallel_state as ps

    if ps.get_tensor_model_parallel_rank():
        param.data.mul_(1.01)


def _from_the_source(name, tensor, folder):
    from shardproof.bridges.io.source import SafetensorsSource

    source = SafetensorsSource(folder)
    yield name, source.read(name, (slice(None),) * len(source.shape(name)))


def _without_norm(name, tensor, folder):
    if name != "model.norm.weight":
        yield name, tensor


def _widened(name, tensor, folder):
    yield name, tensor.float()


def _without_tokenizer(out: Path):
    (out / "tokenizer.json").unlink()


def _total_off(out: Path):
    path = out / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["metadata"]["total_size"] += 1
    path.write_text(json.dumps(index))


def _fixed(name: str, value):
    return lambda: setting(name, value)


FAULTS = {
    "gate_up_swapped": {"while": sources_swapped("linear_fc1", 0, 1)},
    "k_v_swapped": {"while": sources_swapped("linear_qkv", 1, 2)},
    "heads_permuted": {"while": rows_by(_heads_rotated)},
    "groups_reversed": {"while": rows_by(lambda rows: rows[::-1])},
    "q_k_norms_swapped": {"while": renamed({"q_norm": "k_norm", "k_norm": "q_norm"})},
    "norms_swapped": {
        "while": renamed({"input_layernorm": "post_attention_layernorm", "post_attention_layernorm": "input_layernorm"})
    },
    "qkv_bias_dropped": {"built": each("linear_qkv.bias", lambda p: p.data.zero_())},
    "tied_head_stale": {"built": each("output_layer.weight", _stale)},
    "window_off_by_one": {"while": _fixed("window_size", "=one_wider")},
    "rope_theta_default": {"while": _fixed("rotary_base", 10000.0)},
    "rope_scaling_dropped": {"while": _fixed("rope_scaling", False)},
    "eps_default": {"while": _fixed("layernorm_epsilon", 1e-6)},
    "padding_first": {"while": relation(_padding_first)},
    "fc2_transposed": {"built": each("linear_fc2.weight", _transposed), "weight": _transposed_back},
    "layer_offset": {"while building": _layer_before},
    "sections_ignored": {"while": relation(_no_sections)},
    "export_of_the_source": {"weight": _from_the_source},
    "replicas_differ": {"built": each("layer_norm_weight", _other_replica)},
    "gradients_k_v_swapped": {"while gradients": sources_swapped("linear_qkv", 1, 2)},
    "tensor_dropped": {"weight": _without_norm},
    "export_widened": {"weight": _widened},
    "tokenizer_lost": {"saved": _without_tokenizer},
    "index_total_off": {"saved": _total_off},
    "config_field_lost": {"config": lambda config: {k: v for k, v in config.items() if k != "rope_theta"}},
    "reload_incomplete": {"loaded": each("linear_fc2.weight", lambda p: p.data.zero_())},
    "flops_without_head": {"flops": lambda c, seq_len, batch: -2 * c["hidden_size"] * c["vocab_size"] * seq_len * batch},
}
