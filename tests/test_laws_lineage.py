"""Declared lineage and its diagnosis: tables say what was measured and are read back; planted permutations are named."""

import numpy as np
import pytest
from shardproof.conformance import declared
from shardproof.conformance.coding import Code
from shardproof.conformance.looks_like import explained, looks_like

LAYERS, GROUPS, HEADS, DIM, HIDDEN, MLP, EXPERTS = 3, 2, 3, 4, 10, 6, 4


def _shapes():
    shapes = {"embed.weight": (7, HIDDEN), "stacked": (EXPERTS, HIDDEN, MLP)}
    for i in range(LAYERS):
        here = f"model.layers.{i}"
        shapes |= {f"{here}.norm.weight": (HIDDEN,)}
        shapes |= {
            f"{here}.attn.{p}_proj.weight": (n * DIM, HIDDEN) for p, n in (("q", GROUPS * HEADS), ("k", GROUPS), ("v", GROUPS))
        }
        shapes |= {f"{here}.mlp.{p}_proj.weight": (MLP, HIDDEN) for p in ("gate", "up")} | {f"{here}.square": (HIDDEN, HIDDEN)}
        shapes |= {f"{here}.mlp.experts.{j}.w.weight": (MLP, HIDDEN) for j in range(EXPERTS)}
    return shapes


CODE = Code.of(dict(sorted(_shapes().items())))


def of(name):
    """Numbers of a Hugging Face tensor."""
    return CODE.values(name).astype(np.int64)


def layers(make):
    """A Megatron tensor with a layer axis."""
    return np.stack([make(f"model.layers.{i}") for i in range(LAYERS)])


def qkv(here):
    """Grouped rows: the query heads of a group, its key, its value."""
    q, k, v = (of(f"{here}.attn.{p}_proj.weight").reshape(GROUPS, -1, HIDDEN) for p in "qkv")
    return np.concatenate([q, k, v], axis=1).reshape(-1, HIDDEN)


def fc1(here):
    """Gate over up."""
    return np.concatenate([of(f"{here}.mlp.{p}_proj.weight") for p in ("gate", "up")])


RIGHT = {
    "layers.fc1": layers(fc1),
    "layers.qkv": layers(qkv),
    "layers.norm": layers(lambda here: of(f"{here}.norm.weight")),
    "layers.square": layers(lambda here: of(f"{here}.square")),
    "layers.experts": layers(lambda here: np.stack([of(f"{here}.mlp.experts.{j}.w.weight") for j in range(EXPERTS)])),
    "stacked": of("stacked").swapaxes(1, 2),
    "embed": np.concatenate([of("embed.weight"), np.zeros((5, HIDDEN), dtype=np.int64)]),
    "reversed": of("embed.weight")[::-1],
    "rotary": of("model.layers.0.attn.q_proj.weight").reshape(-1, 2, DIM // 2, HIDDEN).swapaxes(1, 2).reshape(-1, HIDDEN),
    "columns": np.concatenate([of("model.layers.0.square")[:, 5:], of("model.layers.1.square")[:, :5]], axis=1),
    "offset": layers(fc1)[1:],
    "one_column": of("embed.weight")[:, 3],
}


def test_a_table_is_read_back():
    """Law: for layers, experts, fused and transposed tensors, padding, steps and parts of columns, parse(table(x)) is x without padding."""
    text = declared.table(RIGHT, CODE)
    back = declared.parse(text, CODE)
    assert back.keys() == RIGHT.keys()
    for key, numbers in RIGHT.items():
        np.testing.assert_array_equal(back[key], declared.trimmed(numbers), err_msg=text)


def test_a_table_is_short_where_layers_are_alike():
    """Law: what repeats over layers and experts is one line, in names that a reader knows."""
    lines = [
        line.strip()
        for line in declared.table({k: RIGHT[k] for k in ("layers.fc1", "layers.experts", "embed")}, CODE).splitlines()
    ]
    assert lines[1:] == [
        "embed [7, 10]",
        "[:] = embed.weight",
        "layers.experts [3, 4, 6, 10]",
        "[i, j] = model.layers.{i}.mlp.experts.{j}.w.weight",
        "layers.fc1 [3, 12, 10]",
        "[i, 0:6] = model.layers.{i}.mlp.gate_proj.weight",
        "[i, 6:12] = model.layers.{i}.mlp.up_proj.weight",
    ]  # fmt: skip


def test_any_lineage_has_a_table():
    """Law: also a tensor in no order at all is told and read back."""
    rng = np.random.default_rng(0)
    shuffled = rng.permutation(of("model.layers.0.square").reshape(-1)).reshape(HIDDEN, HIDDEN)
    np.testing.assert_array_equal(declared.parse(declared.table({"x": shuffled}, CODE), CODE)["x"], shuffled)


@pytest.mark.parametrize(
    "line", ["    [0:6] = no.such.tensor", "    [0:6 = embed.weight", "    [0:6] = embed.weight[0:9]", "    nonsense"]
)
def test_a_line_that_makes_no_sense_is_named(line):
    """Law: a table that does not parse is refused with the line's number and text."""
    with pytest.raises(ValueError, match=r"line 2, '"):
        declared.parse(f"x [7, 10]\n{line}\n", CODE)


def _rolled(array, shift):
    return np.roll(array, shift, axis=-2)


def _heads(array, order):
    """Query heads of each group in another order."""
    rows = array.reshape(LAYERS, GROUPS, HEADS + 2, DIM, HIDDEN).copy()
    rows[:, :, :HEADS] = rows[:, :, order]
    return rows.reshape(array.shape)


def _interleaved(array, ranks):
    return array.reshape(LAYERS, 2, ranks, -1, HIDDEN).swapaxes(1, 2).reshape(array.shape)


def _one(array, change):
    """A change in the middle layer alone."""
    out = array.copy()
    out[1] = change(out[1])
    return out


fc, q, sq, ex = RIGHT["layers.fc1"], RIGHT["layers.qkv"], RIGHT["layers.square"], RIGHT["layers.experts"]
WRONG = {
    "gate and up swapped": ("layers.fc1", _rolled(fc, MLP)),
    "k_proj and v_proj swapped": (
        "layers.qkv",
        layers(lambda h: qkv(h).reshape(GROUPS, HEADS + 2, DIM, -1)[:, [0, 1, 2, 4, 3]].reshape(-1, HIDDEN)),
    ),
    "transposed": ("layers.square", sq.swapaxes(1, 2)),
    "heads permuted within a group": ("layers.qkv", _heads(q, [1, 2, 0])),
    "groups or heads in another order": ("layers.qkv", q.reshape(LAYERS, GROUPS, -1, HIDDEN)[:, ::-1].reshape(q.shape)),
    "rows shifted by 1": ("layers.square", _rolled(sq, -1)),
    "rows shifted by -2": ("layers.square", _rolled(sq, 2)),
    "rows reversed": ("layers.square", sq[:, ::-1]),
    "columns shifted by 3": ("layers.square", np.roll(sq, -3, axis=2)),
    "columns reversed": ("layers.square", _one(sq, lambda m: m[:, ::-1])),
    "blocks of TP shards interleaved: 2 shards of 3 parts": ("layers.fc1", fc.reshape(LAYERS, 3, 2, 2, HIDDEN).swapaxes(1, 2).reshape(fc.shape)),
    "from layer i-1": ("layers.norm", np.roll(RIGHT["layers.norm"], 1, axis=0)[1:]),
    "from layer i+1": ("layers.fc1", np.roll(fc, -1, axis=0)[:-1]),
    "from expert j+1": ("layers.experts", np.roll(ex, -1, axis=1)[:, :-1]),
    "experts in another order": ("layers.experts", ex[:, ::-1]),
    "never filled": ("layers.norm", np.zeros_like(RIGHT["layers.norm"])),
    "gate in the place of up": ("layers.fc1", np.concatenate([fc[:, :MLP], fc[:, :MLP]], axis=1)),
    "interleaved: halves and pairs exchanged": ("layers.square", sq.reshape(LAYERS, 2, 5, HIDDEN).swapaxes(1, 2).reshape(sq.shape)),
}  # fmt: skip


@pytest.mark.parametrize("pattern", WRONG)
def test_a_planted_permutation_is_named(pattern):
    """Law: the sentence about a wrong tensor names its key, both sides of the first wrong element, and the pattern that was planted."""
    key, got = WRONG[pattern]
    want = RIGHT[key]
    if len(want) != len(got):  # the layers that have a neighbour
        want = want[1:] if "i-1" in pattern else want[:-1]
    elif want.shape != got.shape:
        want = want[:, :-1]
    said = explained(key, want, got, CODE)
    at = tuple(np.argwhere(want != got)[0])
    assert f"{key}{[int(i) for i in at]}: want {CODE.where(want[at])}, got {CODE.where(got[at])}; " in said
    assert "looks like: " in said and pattern in said.split("looks like: ")[1], said


def test_tp_shards_of_a_fused_tensor():
    """Law: gate and up cut per rank and put together without regard to it are named as interleaved shards."""
    assert "blocks of TP shards interleaved" in looks_like(fc, _interleaved(fc, 2), CODE)


def test_nothing_is_named_where_nothing_fits():
    """Law: equal arrays give None, a shuffle of single elements gives coordinates and no pattern."""
    assert explained("x", sq, sq.copy(), CODE) is None and looks_like(sq, sq.copy(), CODE) is None
    noise = np.random.default_rng(1).permutation(sq.reshape(-1)).reshape(sq.shape)
    assert looks_like(sq, noise, CODE) is None and "want" in explained("x", sq, noise, CODE)
