"""The two worlds without peers: the clean one, for references, and the fake one, for names and shapes at any size."""

import time

import pytest
from shardproof.conformance.worlds import Clean, FakeWorld, RankError, WorldError

HOST = "shardproof.bridges.host:install"


@pytest.fixture(scope="module")
def clean():
    with Clean() as world:
        yield world


@pytest.fixture(scope="module")
def fake():
    with FakeWorld(host=HOST) as world:
        yield world


def task(name):
    return f"test_worlds_tasks:{name}"


def test_the_clean_world_has_no_megatron_and_no_stub(clean):
    """The oracle's process holds torch and transformers, and nothing of megatron, its stand-ins or the host."""
    clean.run(task("hf_logits"), {"seed": 3})
    held = clean.run(task("modules"))
    assert {"torch", "transformers"} <= set(held)
    stubs = ("megatron", "transformer_engine", "fla", "mamba_ssm", "causal_conv1d", "deep_ep", "shardproof.bridges")
    assert not [name for name in held if name in stubs or name.startswith(tuple(s + "." for s in stubs))]


def test_the_clean_world_is_persistent_and_repeats_itself(clean):
    """One process serves all runs, and equal seeds give equal bits, also from its replacement."""
    where, logits = clean.run(task("where")), clean.run(task("hf_logits"), {"seed": 3})
    assert clean.run(task("where")) == where
    with pytest.raises(RankError, match="holds fla, megatron, torch.cuda as patched by test_worlds_tasks"):
        clean.run(task("contaminate"))
    assert clean.run(task("where")) != where
    assert clean.run(task("hf_logits"), {"seed": 3}).equal(logits)


def test_the_fake_world_gives_right_ranks_at_512(fake):
    """tp varies fastest, then dp, then pp: coordinates of ranks of 512 under TP 8, PP 8, EP 64, from one process."""
    layout = {"tp": 8, "pp": 8, "ep": 64, "etp": 1}
    seconds = []
    for rank in (0, 9, 64, 200, 511, 9):
        start = time.perf_counter()
        seen = fake.run(task("ranks"), layout, 512, rank)
        seconds.append(time.perf_counter() - start)
        assert (seen["tp"], seen["dp"], seen["pp"]) == (rank % 8, rank // 8 % 8, rank // 64), (rank, seen)
        assert seen["ep"] == rank % 64 and seen["tp_ranks"] == list(range(rank // 8 * 8, rank // 8 * 8 + 8)), (rank, seen)
    assert fake.run(task("ranks"), {"tp": 2, "pp": 2}, 4, 3)["pp"] == 1
    print(f"\nfake world of 512: {[round(s, 3) for s in seconds]} s per rank")
    shapes = fake.run(task("meta_shapes"), layout, 512, 201)
    assert shapes["decoder.layers.0.mlp.linear_fc1.weight"] == (2 * 96 // 8, 64), shapes
    assert len(fake.start_seconds) == 1
    with pytest.raises(WorldError, match="rank 4 is not in a world of 4"):
        fake.run(task("ranks"), {"tp": 2, "pp": 2}, 4, 4)
