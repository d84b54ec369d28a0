"""What hypothesis draws: geometries, configs and plans that mean something, always the same, shrinking to the plain one."""

import json
from pathlib import Path

import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st
from shardproof import fixtures
from shardproof.bridges.adapter import ADAPTER
from shardproof.toy_models import lint, toy_config, wanted
from shardproof.toy_models.decoder import section_of
from shardproof.toy_models.strategies import config_changes, geometries, plans, ranks

CONFIGS = Path(__file__).parent / "data/configs"
DENSE, MOE = fixtures.published("Qwen/Qwen3-8B"), fixtures.published("Qwen/Qwen3-30B-A3B")
GATE = settings(derandomize=True, deadline=None, database=None, max_examples=25)
PUBLISHED = st.sampled_from([DENSE, MOE, *(json.loads(path.read_text()) for path in sorted(CONFIGS.glob("*.json")))])


@GATE
@given(st.data())
def test_geometries_hide_nothing(data):
    """Law: what is drawn is a toy's text, gives a toy of the published structure, and breaks no rule that the architecture does not."""
    published = data.draw(PUBLISHED)
    text = data.draw(geometries(published))
    assert lint(toy_config(published, text), wanted=wanted(published, "default")) == []


@GATE
@given(st.data())
def test_plans_are_possible(data):
    """Law: a drawn plan fits the toy by the reference bridge's own rules, and needs no more than four ranks."""
    toy = toy_config(
        data.draw(st.sampled_from([DENSE, MOE])), data.draw(st.sampled_from(["default", "mha", "mqa", "even", "layers7"]))
    )
    plan = data.draw(plans(toy))
    assert ADAPTER.possible(toy, plan) is None
    from shardproof.conformance.plans import ranks as needed

    assert needed(plan) <= 4


@GATE
@given(st.data())
def test_changes_change(data):
    """Law: a drawn change leaves the given config alone, adds no field, and differs from it in one to three fields of the decoder."""
    toy = toy_config(data.draw(PUBLISHED))
    before = json.dumps(toy)
    changed = data.draw(config_changes(toy))
    differing = {k for k in section_of(changed) if section_of(changed)[k] != section_of(toy)[k]}
    assert json.dumps(toy) == before and set(section_of(changed)) == set(section_of(toy)) and 1 <= len(differing) <= 3


@pytest.mark.parametrize(
    ("strategy", "holds", "least"),
    [
        (lambda: geometries(DENSE), lambda text: True, "default"),
        (lambda: geometries(DENSE), lambda text: "hidden" in text and "vocab" in text, "hidden48-vocab131"),
        (lambda: plans(toy_config(DENSE)), lambda plan: True, "tp1"),
        (lambda: plans(toy_config(DENSE)), lambda plan: "cp2" in plan and "pp" in plan, "pp2,cp2,split3-2"),
        (lambda: plans(toy_config(MOE)), lambda plan: plan.startswith("tp2"), "tp2,sp"),
        (lambda: plans(toy_config(MOE)), lambda plan: "ep" in plan, "ep2"),
    ],
)
def test_counterexamples_shrink_to_the_plain(strategy, holds, least):
    """Law: the smallest counterexample of a condition is the plain one: fewest sizes, fewest kinds of parallelism, evenest stages."""
    assert find(strategy(), holds, settings=settings(derandomize=True, database=None)) == least


def test_the_gate_draws_the_same_every_time():
    """Law: derandomised, two runs draw the same texts in the same order."""

    def drawn() -> list[str]:
        seen: list[str] = []
        GATE(given(geometries(MOE))(lambda text: seen.append(text)))()
        return seen

    assert drawn() == drawn()


def test_ranks_count_experts():
    """Law: experts live on the dense ranks of their stage; the least number of ranks that holds both is taken."""
    one = {"tp": 1, "pp": 1, "vpp": 1, "cp": 1, "ep": 1, "etp": None}
    assert ranks(one) == 1 and ranks(one | {"tp": 2, "ep": 2}) == 4 and ranks(one | {"tp": 2, "ep": 2, "etp": 1}) == 2


def test_toys_do_without_hypothesis():
    """Law: hypothesis is the tests' own; toys are made where it is not installed."""
    import subprocess
    import sys

    program = "import sys; sys.modules['hypothesis'] = None; import shardproof.toy_models.strategies, shardproof.toy_models; print('ok')"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "ok\n"
