"""A toy's model folder: transformers' own model with loud weights, in the hub's disk layout."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import reference
from .decoder import section_of
from .hub import to_hub
from .quiet import lint_weights
from .weights import loud, loud_choices

LARGEST = 1_600_000  # parameters a layer, of five layers at least; a toy of more has a size that transformers took from its own defaults
SHARDS, SMALLEST = 6, 40_000  # files of a toy; bytes of one
AUTO = ("AutoModelForCausalLM", "AutoModelForMultimodalLM", "AutoModelForImageTextToText", "AutoModel")


def write_toy(
    config: Mapping[str, Any],
    folder: str | Path,
    *,
    seed: int = 0,
    dtype: str | None = None,
    max_shard_size: int | str | None = None,
) -> Path:
    """Write a real model folder: transformers' own model of `config` with loud weights, in several shards with an index (SHARDS or some more,
    unless their size is given), config.json as given (dtype, where one is named, in place of its own), generation_config.json and a small
    tokenizer. Returns the folder.

    Raises ValueError where transformers does not build a model of this config's sizes, and where weights would hide something.
    """
    folder = Path(folder)
    config = dict(config) | ({"torch_dtype": dtype} if dtype else {})
    model = build(config)
    tied = set(model.all_tied_weights_keys)
    state = {name: values for name, values in loud_state(model, seed=seed).items() if name not in tied}
    quiet = lint_weights(state)
    if quiet:
        raise ValueError(f"the toy's weights hide something: {'; '.join(quiet[:3])}")
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= tied, (missing, unexpected)
    whole = sum(tensor.nbytes for tensor in model.state_dict().values())
    max_shard_size = max_shard_size or max(whole // SHARDS, SMALLEST)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    copies = reference.copies(reference.parsed(config))
    to_hub(folder, str(config.get("model_type")), copies=copies, max_shard_size=max_shard_size)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if not (folder / "generation_config.json").exists():
        (folder / "generation_config.json").write_text("{}\n")
    _write_tokenizer(folder, section_of(config)["vocab_size"])
    return folder


def build(config: Mapping[str, Any]):
    """transformers' model of a toy's config, in the config's dtype. Raises ValueError where it knows no such architecture, or builds
    one of other sizes because it does not read the config's fields."""
    import torch
    from transformers import CONFIG_MAPPING

    reference.register(config.get("model_type"))
    if config.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(f"transformers knows no model type {config.get('model_type')!r}")
    parsed = reference.parsed(config)
    made = reference.whole(model_class(parsed, config), parsed)
    parameters = _parameters(made, copy.deepcopy(parsed))
    if parameters > LARGEST * max(5, section_of(config).get("num_hidden_layers") or 0):
        raise ValueError(
            f"transformers builds {parameters:,} parameters from this toy of {config.get('model_type')!r}: some sizes it takes from its own "
            f"defaults (it does not read the fields where this config has them), or they are none that toys make small"
        )
    return _wide(made(parsed).to(parsed.dtype or torch.float32))


def _wide(model):
    """What transformers keeps in fp32 in a model of any type, and published files hold so."""
    wide = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    for name, module in model.named_modules():
        for part, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if any(re.search(rf"(^|\.){re.escape(kept)}($|\.)", f"{name}.{part}") for kept in wide):
                tensor.data = tensor.data.float()
    return model


def _parameters(made, parsed) -> int:
    """How many there would be, without making them; 0 where a model cannot be built without values."""
    import torch

    try:
        with torch.device("meta"):
            return sum(p.numel() for p in made(parsed).parameters())
    except RuntimeError:
        return 0


def model_class(parsed, config: Mapping[str, Any]):
    """The class that `architectures` names, else the one that transformers has for this type. Raises ValueError."""
    import transformers

    named = getattr(transformers, str((config.get("architectures") or [None])[0]), None)
    if named is not None:
        return named
    for auto in AUTO:
        mapping = getattr(transformers, auto)._model_mapping
        if type(parsed) in mapping:
            return mapping[type(parsed)]
    raise ValueError(f"transformers has no model for {config.get('model_type')!r}")


def loud_state(model, *, seed: int = 0) -> dict[str, Any]:
    """Loud values for every tensor of a model's state dict; tables of choices (hash routing) too. Structural integers stay."""
    out, centred = {}, set(zero_centred(model))
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            out[name] = loud(name, tuple(tensor.shape), seed=seed, dtype=tensor.dtype, neutral=0.0 if name in centred else 1.0)
        else:
            out[name] = loud_choices(name, tensor, _experts_of(model), seed=seed) if name.endswith("tid2eid") else tensor
    return out


def zero_centred(model) -> list[str]:
    """Weights of norms that scale by one plus their weight: a norm that still gives something when its weight is zero."""
    import torch

    return [
        f"{name}.weight" for name, norm in model.named_modules() if "Norm" in type(norm).__name__ and _gives_at_zero(norm, torch)
    ]


def _gives_at_zero(norm, torch) -> bool:
    weight = getattr(norm, "weight", None)
    if weight is None or weight.ndim != 1:
        return False
    norm = copy.deepcopy(norm)
    with torch.no_grad():
        for param in norm.parameters():
            param.zero_()
        try:
            return bool(norm(torch.arange(1, 1 + len(weight), dtype=weight.dtype)[None]).any())
        except (AttributeError, TypeError):  # a norm of more than one input is none of a layer's
            return False


def _experts_of(model) -> int:
    text = model.config.get_text_config()
    return next(getattr(text, key) for key in ("n_routed_experts", "num_local_experts", "num_experts") if hasattr(text, key))


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({f"t{i}": i for i in range(vocab_size)}, unk_token="t0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "t0"}, indent=2) + "\n"
    )
