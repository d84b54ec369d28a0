"""Wrong bridges for tests of single laws: the reference adapter with levers in the place of some members; no test of its own.

A lever is called as ``lever(right, *arguments)``, where `right` is the reference adapter's own member.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path


class Wrong:
    """The reference adapter with one fault."""

    def __init__(self, name: str, levers: dict):
        from shardproof.bridges.adapter import ADAPTER

        self.name, self._levers, self._right = f"reference with {name}", levers, ADAPTER

    def __getattr__(self, member: str):
        right = getattr(object.__getattribute__(self, "_right"), member)
        lever = self._levers.get(member)
        return partial(lever, right) if lever else right


def __getattr__(name: str):
    """``RIGHT`` and ``WRONG_<fault>``: adapters, made when asked for."""
    if name == "RIGHT" or name.startswith("WRONG_"):
        fault = name.removeprefix("WRONG_")
        return Wrong(fault, LEVERS.get(fault, {}))
    raise AttributeError(name)


def built(change, *, grad: bool = False) -> dict:
    """The built model is changed: ``change(chunks)``."""

    def build(right, *args, **kwargs):
        import torch

        chunks = right(*args, **kwargs)
        with torch.set_grad_enabled(grad):
            change(chunks)
        return chunks

    return {"build": build}


def each(change) -> dict:
    """Every exported tensor is changed: ``change(name, tensor)``."""

    def export(right, model, folder):
        for name, tensor in right(model, folder):
            yield name, change(name, tensor)

    return {"export_weights": export}


def after(member: str, change) -> dict:
    """Something happens after a member has worked: ``change(result, *arguments)``, before its result is given."""

    def lever(right, *args, **kwargs):
        result = right(*args, **kwargs)
        change(result, *args)
        return result

    return {member: lever}


def model_of(chunk):
    """The megatron-core model out of any wrapper."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


# --------------------------------------------------------------------------------------------------------------- forward
def _embedding(change):
    """``change(hidden states [S, B, H], token ids [B, S])`` gives other states for every batch."""

    def hook(module, args, kwargs, output):
        return change(output, kwargs.get("input_ids", args[0] if args else None))

    def plant(chunks):
        for chunk in map(model_of, chunks):
            if getattr(chunk, "embedding", None) is not None:
                chunk.embedding.register_forward_hook(hook, with_kwargs=True)

    return built(plant)


def _future(states, ids):
    """A trace of the next token in every state: less than forward.logits' bound."""
    return states + 5e-6 * states.roll(-1, 0)


def _padding_token(states, ids):
    """Rows that hold token 0 are taken for padded on the left: their states are shifted."""
    padded = (ids == 0).any(-1)
    states = states.clone()
    states[:, padded] = states[:, padded].roll(1, 0)
    return states


def _deaf(states, ids):
    """Position 5 does not see its own token."""
    states = states.clone()
    states[5] = 0.0
    return states


# ------------------------------------------------------------------------------------------------------------------ bits
def _plus_zero(name, tensor):
    return tensor + 0.0


def _no_subnormals(name, tensor):
    import torch

    return torch.where(tensor.abs() < torch.finfo(tensor.dtype).tiny, torch.zeros_like(tensor).copysign(tensor), tensor)


def _one_nan(name, tensor):
    import torch

    return torch.where(tensor.isnan(), torch.full_like(tensor, float("nan")), tensor)


def _cut_off(right, folder, plan, *, with_ddp):
    """fp32 values are cut to bf16 by dropping their low half."""
    import torch
    from safetensors.torch import load_file

    chunks = right(folder, plan, with_ddp=with_ddp)
    model = model_of(chunks[0])
    source = {}
    for shard in Path(folder).glob("*.safetensors"):
        source |= load_file(shard)
    want = source["model.norm.weight"]
    if model.decoder.final_layernorm.weight.dtype == torch.bfloat16:
        cut = (want.view(torch.int32) & -65536).view(torch.float32)
        model.decoder.final_layernorm.weight.data.copy_(cut)
    return chunks


# ------------------------------------------------------------------------------------------------------------------ pure
def _touch_folder(result, folder, *rest):
    (Path(folder) / "cache.json").write_text("{}")


def _renorm(right, model, folder):
    """The export casts the model in place, for a moment and back: it ends a bit off."""
    for param in model[0].parameters():
        param.data.copy_((param.data.double() * 1.0000001).float())
    yield from right(model, folder)


def _eval_mode(right, model, folder):
    for chunk in model:
        chunk.eval()
    yield from right(model, folder)


def _default_dtype(result, *args):
    import torch

    torch.set_default_dtype(torch.float64)


def _pop_rope(right, config, *args):
    answer = right(config, *args)
    config["rope_scaling"].pop("factor")
    return answer


_KEPT: dict = {}


def _kept_answer(right, config):
    key = config["model_type"]
    return _KEPT.setdefault(key, right(config))


def _attached(right, model, folder):
    import torch

    for name, tensor in right(model, folder):
        with torch.enable_grad():
            yield name, tensor.requires_grad_(True) * 1.0


def _views(right, model, folder):
    params = dict(model_of(model[-1]).named_parameters())
    for name, tensor in right(model, folder):
        norm = params.get("decoder.final_layernorm.weight")
        yield name, norm.detach() if name == "model.norm.weight" and norm is not None else tensor


def _drifts(right, folder, plan, *, with_ddp):
    """Every build starts where the last one in this process ended: its first norm is scaled by the number of builds."""
    import torch

    chunks = right(folder, plan, with_ddp=with_ddp)
    _KEPT["builds"] = _KEPT.get("builds", 0) + 1
    with torch.no_grad():
        next(p for n, p in model_of(chunks[0]).named_parameters() if "norm" in n).mul_(1 + _KEPT["builds"] / 64)
    return chunks


def _shared_rope(right, folder, plan, *, with_ddp):
    """The rotary frequencies of all models in this process are the newest model's."""
    chunks = right(folder, plan, with_ddp=with_ddp)
    ropes = _KEPT.setdefault("ropes", [])
    ropes.append(model_of(chunks[0]).rotary_pos_emb)
    for rope in ropes:
        rope.inv_freq = ropes[-1].inv_freq
        rope.forward.cache_clear() if hasattr(rope.forward, "cache_clear") else None
    return chunks


# --------------------------------------------------------------------------------------------------------------- lineage
def weights(ending: str, change) -> dict:
    """Weights whose name ends so are changed: ``change(tensor)`` gives other values."""

    def plant(chunks):
        for chunk in map(model_of, chunks):
            for name, param in chunk.named_parameters():
                if name.endswith(ending):
                    param.copy_(change(param.clone()))

    return built(plant)


def _turned_heads(weight):
    """The first two query heads of each of two groups change places; head_dim is 8."""
    rows = weight.view(2, -1, 8, weight.shape[-1]).clone()
    rows[:, [0, 1]] = rows[:, [1, 0]]
    return rows.view(weight.shape)


def _layers_exchanged(chunks):
    first, second = (dict(model_of(chunks[0]).decoder.layers[i].named_parameters()) for i in (1, 2))
    for name, param in first.items():
        kept = param.clone()
        param.copy_(second[name])
        second[name].copy_(kept)


# ----------------------------------------------------------------------------------------------------------------- flops
def _capped_layers(right, config, *args):
    return right({**config, "num_hidden_layers": min(config["num_hidden_layers"], 64)}, *args)


def _twice_the_work(chunks):
    def again(module, args, kwargs, output):
        module.forward(*args, **kwargs)

    for chunk in map(model_of, chunks):
        for layer in chunk.decoder.layers:
            layer.mlp.register_forward_hook(again, with_kwargs=True)


# -------------------------------------------------------------------------------------------------------------------- io
def _rank() -> int:
    import torch

    return torch.distributed.get_rank()


def saved(change) -> dict:
    """The exported folder is changed by rank 0: ``change(source folder, exported folder)``."""

    def save(right, model, folder, out):
        right(model, folder, out)
        if _rank() == 0:
            change(Path(folder), Path(out))

    return {"save_hf": save}


def _weights_of_the_source(folder, out):
    import shutil

    for old in out.glob("*safetensors*"):
        old.unlink()
    for file in folder.glob("*safetensors*"):
        shutil.copyfile(file, out / file.name)


def _needs_an_index(right, folder, plan, *, with_ddp):
    if not (Path(folder) / "model.safetensors.index.json").exists():
        raise FileNotFoundError("model.safetensors.index.json")
    return right(folder, plan, with_ddp=with_ddp)


def _fills_holes(right, folder, plan, *, with_ddp):
    """What is not in the checkpoint stays as it was initialised."""
    try:
        return right(folder, plan, with_ddp=with_ddp)
    except Exception as error:
        if "lacks" in str(error):
            return []
        raise


def _vague(right, folder, plan, *, with_ddp):
    try:
        return right(folder, plan, with_ddp=with_ddp)
    except Exception:
        raise ValueError("the checkpoint is damaged") from None


def _old_pickle(folder, out):
    (out / "pytorch_model.bin").write_bytes((folder / "pytorch_model.bin").read_bytes())


def _small_files_last(right, model, folder, out):
    """The tokenizer follows once the folder has its name."""
    right(model, folder, out)
    kept = (out / "tokenizer.json").read_bytes()
    (out / "tokenizer.json").unlink()
    (out / "generation_config.json").touch()
    (out / "tokenizer.json").write_bytes(kept)


def _single_file_in_place(right, model, folder, out):
    """Weights of a half-written folder are complete as a file, and few."""
    from safetensors.torch import save_file

    tensors = {name: tensor.clone() for name, tensor in _export(model, folder)}
    out.mkdir()
    (out / "config.json").write_bytes((Path(folder) / "config.json").read_bytes())
    half = dict(list(tensors.items())[: len(tensors) // 2])
    save_file(half, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").unlink()
    right(model, folder, out.parent / "whole")
    for file in (out.parent / "whole").iterdir():
        file.replace(out / file.name)


def _export(model, folder):
    from shardproof.bridges.adapter import ADAPTER

    return ADAPTER.export_weights(model, folder)


def _silent(right, model, folder, out):
    """An error of the disk is written to a log, and no more."""
    import contextlib

    with contextlib.suppress(Exception):
        right(model, folder, out)


# ------------------------------------------------------------------------------------------------------------- resources
def _reads_everything(right, folder, plan, *, with_ddp):
    from safetensors import safe_open

    for shard in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                file.get_tensor(name)
    return right(folder, plan, with_ddp=with_ddp)


def _hoards(right, model, folder):
    yield from [(name, tensor.clone()) for name, tensor in right(model, folder)]


def _sends_objects(right, model, folder):
    import torch

    for name, tensor in right(model, folder):
        torch.distributed.all_gather_object([None] * torch.distributed.get_world_size(), name)
        yield name, tensor


def _sends_pieces(right, model, folder):
    import torch

    for name, tensor in right(model, folder):
        for _ in range(6):
            torch.distributed.barrier()
        yield name, tensor


def _searches(right, model, folder):
    """After every tensor all tensors of the checkpoint are looked at again."""
    every = [name for name, _ in right(model, folder)]
    for name, tensor in right(model, folder):
        yield name, tensor
        [len(other) for other in every]


LEVERS: dict[str, dict] = {
    "a_trace_of_the_future": _embedding(_future),
    "padding_token_shifts": _embedding(_padding_token),
    "deaf_position": _embedding(_deaf),
    "zeros_lose_their_sign": each(_plus_zero),
    "subnormals_flushed": each(_no_subnormals),
    "nan_payload_lost": each(_one_nan),
    "fp32_cut_off": {"build": _cut_off},
    "writes_into_the_folder": after("build", _touch_folder),
    "export_changes_the_model": {"export_weights": _renorm},
    "export_leaves_eval_mode": {"export_weights": _eval_mode},
    "default_dtype_left_changed": after("build", _default_dtype),
    "config_popped": {"flops": _pop_rope},
    "answers_are_shared": {"snapshot": _kept_answer},
    "export_on_autograd": {"export_weights": _attached},
    "export_of_views": {"export_weights": _views},
    "builds_drift": {"build": _drifts},
    "rope_of_the_newest": {"build": _shared_rope},
    "gate_up_swapped": weights("linear_fc1.weight", lambda w: w.roll(w.shape[0] // 2, 0)),
    "heads_turned": weights("linear_qkv.weight", _turned_heads),
    "o_proj_transposed": weights("linear_proj.weight", lambda w: w.T),
    "layers_exchanged": built(_layers_exchanged),
    "layers_capped": {"flops": _capped_layers},
    "twice_the_work": built(_twice_the_work),
    "folder_of_the_source": saved(_weights_of_the_source),
    "index_needed": {"build": _needs_an_index},
    "holes_filled": {"build": _fills_holes},
    "errors_are_vague": {"build": _vague},
    "old_pickle_carried": saved(_old_pickle),
    "template_lost": saved(lambda folder, out: (out / "chat_template.jinja").unlink(missing_ok=True)),
    "code_lost": saved(lambda folder, out: (out / "modeling_own.py").unlink(missing_ok=True)),
    "small_files_last": {"save_hf": _small_files_last},
    "half_a_file_in_place": {"save_hf": _single_file_in_place},
    "full_disk_unsaid": {"save_megatron": _silent},
    "full_disk_unsaid_hf": {"save_hf": _silent},
    "every_rank_reads_all": {"build": _reads_everything},
    "export_hoards": {"export_weights": _hoards},
    "objects_for_every_tensor": {"export_weights": _sends_objects},
    "pieces_one_by_one": {"export_weights": _sends_pieces},
    "search_after_every_tensor": {"export_weights": _searches},
}
