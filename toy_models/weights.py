"""Loud weights: every tensor its own distribution, nothing constant, no zero bias, norms away from one.

At default initialisation, logits agree to 0.99 cosine with swapped gate and up, a zeroed k_proj or permuted heads. Loud weights give every
mistake a size.
"""

from __future__ import annotations

import copy
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def loud(name: str, shape: tuple[int, ...], *, seed: int = 0, dtype=None):
    """Values of one tensor, a function of its name, shape and seed alone.

    Matrices: normal, scale 0.7 to 1.3 over sqrt(columns) (embeddings 0.7 to 1.3); of stacked experts [experts, .., ..]
    each has a scale of its own, which also rises along both axes, so that gate and up differ. Norm weights: around 0.6 to 1.5, spread
    0.2. Biases: around +-0.3, spread 0.3.
    """
    import torch

    gen = torch.Generator().manual_seed(zlib.crc32(name.encode()) + 7919 * seed)
    noise = torch.randn(shape, generator=gen, dtype=torch.float64)
    u = torch.rand((), generator=gen, dtype=torch.float64).item()
    if name.endswith("bias"):  # of stacked experts too: [experts, rows]
        values = 0.3 * noise + (0.3 if u > 0.5 else -0.3) * (0.5 + u)
    elif len(shape) >= 2:
        fan_in = 1 if "embed" in name else shape[-1]
        values = noise * (0.7 + 0.6 * u) / fan_in**0.5
        if len(shape) == 3 and "experts" in name:
            values = values * _of_its_own(shape, gen)
    else:
        values = 0.2 * noise + 0.6 + 0.9 * u
    return values.to(dtype or torch.float32)


def _of_its_own(shape: tuple[int, ...], gen):
    """A scale for every element of stacked experts: an expert's own, rising from 0.8 to 1.2 along each of its axes."""
    import torch

    expert = 0.7 + 0.6 * torch.rand(shape[0], generator=gen, dtype=torch.float64)
    rows, columns = (torch.linspace(0.8, 1.2, n, dtype=torch.float64) for n in shape[1:])
    return expert[:, None, None] * rows[:, None] * columns


def write_toy(config: Mapping[str, Any], folder: str | Path, *, seed: int = 0, max_shard_size: str = "40KB") -> Path:
    """Write a real model folder: transformers' own model of `config` with loud weights, in several shards with an index, config.json as
    given, generation_config.json and a small tokenizer. Returns the folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(folder)
    parsed = AutoConfig.for_model(
        **copy.deepcopy(dict(config))
    )  # transformers writes rope_theta into the rope dict that it is given
    model = AutoModelForCausalLM.from_config(parsed).to(parsed.dtype or torch.float32)
    tied = set(model.all_tied_weights_keys)
    state = {
        name: loud(name, tuple(t.shape), seed=seed, dtype=t.dtype) for name, t in model.state_dict().items() if name not in tied
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= tied, (missing, unexpected)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
    _write_tokenizer(folder, config["vocab_size"])
    return folder


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
