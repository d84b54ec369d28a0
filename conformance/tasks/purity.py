"""What a bridge leaves behind: folders, models, torch's own settings; one model built twice; two models in one process."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ..api import load_adapter, offers
from ..measure import FACTOR, _bytes, _digest_all


def inputs(adapter: str, folder: str, plan: str, out: str) -> list[str]:
    """*rank*: sentences about inputs that changed while the bridge built, exported, saved and loaded."""
    import torch

    bridge, path, out = load_adapter(adapter), Path(folder), Path(out)
    found: list[str] = []
    state = {"the model folder": _folder(path), "torch's defaults": _defaults()}

    def after(step: str, **now: Any) -> None:
        torch.distributed.barrier()
        now = {"the model folder": _folder(path), "torch's defaults": _defaults()} | {
            k.replace("_", " "): v for k, v in now.items()
        }
        found.extend(f"{step} changed {what}{_first(state[what], held)}" for what, held in now.items() if state[what] != held)
        state.update(now)

    chunks = bridge.build(path, plan, with_ddp=False)
    state["the model"] = _model(chunks)
    after("build")
    dict(bridge.export_weights(chunks, path))
    after("export_weights", the_model=_model(chunks))
    if offers(bridge, ["save_hf"]):
        bridge.save_hf(chunks, path, out / "hf")
        after("save_hf", the_model=_model(chunks))
    if offers(bridge, ["save_megatron", "load_megatron"]):
        bridge.save_megatron(chunks, path, out / "megatron")
        torch.distributed.barrier()
        state["the saved checkpoint"] = _folder(out / "megatron")
        after("save_megatron", the_model=_model(chunks))
        bridge.load_megatron(path, out / "megatron", plan)
        after("load_megatron", the_model=_model(chunks), the_saved_checkpoint=_folder(out / "megatron"))
    return found


def twice(adapter: str, folder: str, plan: str) -> dict[str, Any]:
    """*rank*: digests of three exports {what: digest}, names still attached to autograd, and what in-place changes reach.

    followed: exported names that changed when the model did; leaked: whether the model changed when what it exported did.
    """
    import torch

    bridge, path = load_adapter(adapter), Path(folder)
    first = bridge.build(path, plan, with_ddp=False)
    exported = dict(bridge.export_weights(first, path))
    digests = {
        "the first export": _digest_all(exported),
        "a second export": _digest_all(dict(bridge.export_weights(first, path))),
    }
    again = bridge.build(path, plan, with_ddp=False)
    digests["a second model's export"] = _digest_all(dict(bridge.export_weights(again, path)))
    attached = [name for name, t in exported.items() if t.requires_grad or t.grad_fn is not None]
    before = {name: hashlib.sha256(_bytes(t)).digest() for name, t in exported.items()}
    with torch.no_grad():
        for param in _parameters(first):
            param.mul_(FACTOR)
        followed = [name for name, t in exported.items() if hashlib.sha256(_bytes(t)).digest() != before[name]]
        model = _model(first)
        for tensor in exported.values():
            tensor.detach().zero_()
    return {"digests": digests, "attached": attached, "followed": followed, "leaked": _model(first) != model}


def interleaved(adapter: str, folder: str, other: str, plan: str, vocab: int, other_vocab: int) -> dict[str, Any]:
    """*rank* (one): a model alone, then beside another that was built, exported in turns and run after it; digests and logits."""
    bridge, path, beside = load_adapter(adapter), Path(folder), Path(other)
    one = bridge.build(path, plan, with_ddp=False)
    out = {"alone": _logits(one, vocab), "exported alone": _digest_all(dict(bridge.export_weights(one, path)))}
    two = bridge.build(beside, plan, with_ddp=False)
    mine, theirs = {}, {}
    streams = [(iter(bridge.export_weights(one, path)), mine), (iter(bridge.export_weights(two, beside)), theirs)]
    while streams:
        stream, into = streams.pop(0)
        item = next(stream, None)
        if item is not None:
            into[item[0]] = item[1]
            streams.append((stream, into))
    out |= {"exported in turns": _digest_all(mine), "the other's export": theirs}
    out |= {"after": _logits(one, vocab), "the other": _logits(two, other_vocab)}
    rebuilt = bridge.build(path, plan, with_ddp=False)
    return out | {"built again": _logits(rebuilt, vocab)}


def _logits(chunks: list, vocab: int):
    import torch

    from ..measure import inputs as tokens

    ids = tokens(vocab)[0]
    with torch.no_grad():
        return chunks[0].eval()(ids, torch.arange(ids.shape[1]).expand(len(ids), -1), None)[..., :vocab].float().clone()


def _parameters(chunks: list):
    return [param for chunk in chunks for param in chunk.parameters()]


def _folder(path: Path) -> dict[str, str]:
    """{file below a folder: digest}."""
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(path.rglob("*")) if p.is_file()}


def _model(chunks: list) -> dict[str, str]:
    """{chunk: parameter or buffer: digest, mode and flags}."""
    import torch

    out = {}
    for index, chunk in enumerate(chunks):
        out[f"{index}: mode"] = f"training {chunk.training}"
        for name, tensor in chunk.state_dict(keep_vars=True).items():
            if isinstance(tensor, torch.Tensor):
                out[f"{index}: {name}"] = f"{hashlib.sha256(_bytes(tensor)).hexdigest()} requires_grad={tensor.requires_grad}"
    return out


def _defaults() -> dict[str, str]:
    import torch

    defaults = {"dtype": torch.get_default_dtype(), "device": torch.get_default_device(), "gradients": torch.is_grad_enabled()}
    return {name: str(value) for name, value in defaults.items()}


def _first(before: dict, now: dict) -> str:
    """The first entry that differs."""
    names = sorted(k for k in set(before) | set(now) if before.get(k) != now.get(k))
    return f": {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
