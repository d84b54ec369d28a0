"""The lint: a toy that breaks a rule must name the coincidence it wants."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

PADDING = 128


def lint(config: Mapping[str, Any], *, seq_len: int, wanted: Iterable[str] = ()) -> list[str]:
    """Broken rules of a toy config, as sentences; empty when it hides nothing.

    seq_len: tokens of the suite's sequences. wanted: coincidences this toy has on purpose (sizes, head_dim, heads, groups, layers).
    """
    found = {kind: text for kind, text in _rules(config, seq_len) if kind not in set(wanted)}
    return [f"{kind}: {text}" for kind, text in found.items()]


def _rules(c: Mapping[str, Any], seq_len: int):
    heads, groups = c["num_attention_heads"], c.get("num_key_value_heads") or c["num_attention_heads"]
    dim = c.get("head_dim") or c["hidden_size"] // heads
    sizes = {
        "hidden": c["hidden_size"],
        "mlp": c["intermediate_size"],
        "q": heads * dim,
        "kv": groups * dim,
        "vocab": c["vocab_size"],
    }
    sizes["fc1"] = 2 * sizes["mlp"]
    same = [n for n, count in Counter(sizes.values()).items() if count > 1]
    if same:
        yield "sizes", f"sizes must be pairwise distinct, {same[0]} occurs twice in {sizes}"
    if dim == c["hidden_size"] // heads:
        yield "head_dim", f"head_dim {dim} equals hidden/heads; a converter that derives it would pass"
    if dim < 4:
        yield "head_dim_small", f"head_dim {dim} is below 4: rope layouts coincide"
    if groups < 2:
        yield "groups", f"{groups} query group hides grouping"
    if heads // groups < 2 or heads // groups == groups:
        yield "heads", f"{heads} heads in {groups} groups: heads a group must be at least 2 and differ from the groups"
    if c["num_hidden_layers"] < 3 or c["num_hidden_layers"] % 2 == 0:
        yield "layers", f"{c['num_hidden_layers']} layers: an odd number of at least 3 shows uneven pipelines"
    if c["vocab_size"] % PADDING == 0:
        yield "vocab", f"vocabulary {c['vocab_size']} is a multiple of the padding {PADDING}"
    window = c.get("sliding_window")
    if window is not None and c.get("use_sliding_window", True) and window >= seq_len:
        yield "window", f"sequence of {seq_len} tokens is not longer than the window of {window}"
    return
