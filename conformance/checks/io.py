"""io.*: what is written, others read."""

import json

from ..api import LawBroken
from .base import Check, bit_equal, disk, same_names


def reload(lab, case):
    """The exported folder is complete and stock transformers loads it strictly, with logits bit-equal to the source's."""
    folder, out = lab.folder(case.toy), lab.scratch(f"hf-{case.toy}-{case.plan}")
    lab.rank_task("save_hf", case.plan, folder=str(folder), out=str(out))
    small = {p.name for p in folder.iterdir() if "safetensors" not in p.name}
    same_names("small files", dict.fromkeys(p.name for p in out.iterdir() if "safetensors" not in p.name), dict.fromkeys(small))
    for name in small - {"config.json"}:
        if (out / name).read_bytes() != (folder / name).read_bytes():
            raise LawBroken(f"{name} was not carried over as it was")
    _index(out)
    again = lab.clean_task("reload", folder=str(out), vocab=case.toy.config["vocab_size"])
    if again["complaints"]:
        raise LawBroken(f"transformers complains about the exported folder: {again['complaints']}")
    if json.loads((out / "config.json").read_text()) != json.loads((folder / "config.json").read_text()):
        raise LawBroken("config.json of the exported folder differs from the source's")
    bit_equal("logits of the reloaded model", again["logits"], lab.reference(case.toy)["logits"])


def _index(folder):
    index = folder / "model.safetensors.index.json"
    tensors = disk(folder)
    if index.exists():
        listed = json.loads(index.read_text())
        same_names("tensors in the index", listed["weight_map"], tensors)
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        if listed["metadata"]["total_size"] != total:
            raise LawBroken(f"index total_size {listed['metadata']['total_size']}, the tensors have {total} bytes")
    elif {p.name for p in folder.glob("*.safetensors")} != {"model.safetensors"}:
        raise LawBroken(f"several shards and no index in {folder.name}")


def resharded(lab, case):
    """A distributed checkpoint saved under one plan loads under another and exports the source's weights bit for bit."""
    folder, want = lab.folder(case.toy), disk(lab.folder(case.toy))
    out = lab.scratch(f"mg-{case.toy}-{case.plan}")
    lab.rank_task("save_megatron", case.plan, folder=str(folder), out=str(out))
    other = "tp2,pp2,split3-2" if case.plan == "tp1" else "tp1"
    got = next(r for r in lab.rank_task("load_megatron", other, folder=str(folder), saved=str(out)) if r is not None)
    same_names("exported tensors", got, want)
    for name, tensor in want.items():
        bit_equal(name, got[name], tensor)


def _reshard_plans(toy, possible, first):
    return (
        [p for p in ("tp1", "tp2,pp2,split2-3", "pp2,vpp2,split2-1-1-1") if p in possible]
        if first and toy.geometry == "default"
        else []
    )


def _reload_plans(toy, possible, first):
    return possible[:1] if toy.geometry == "default" else [p for p in possible if p == "tp2,pp2,split2-3"]


CHECKS = [
    Check("io.reload", reload, _reload_plans, direction="export", needs=("save_hf",)),
    Check(
        "io.resharded",
        resharded,
        _reshard_plans,
        needs=(
            "save_megatron",
            "load_megatron",
        ),
    ),
]
