"""Parallel plans: text, coordinates, placement, and the words for impossible ones."""

import dataclasses

import pytest
from helpers_engine import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from shardproof.bridges.errors import BridgeError, PlanError
from shardproof.bridges.families import find_family
from shardproof.bridges.plan import Coordinates, ParallelPlan
from shardproof.conformance import plans
from shardproof.conformance.worlds import FakeWorld

law = settings(derandomize=True, deadline=None, max_examples=150, database=None)
one_to_four = st.sampled_from([1, 2, 3, 4])


@st.composite
def any_plan(draw):
    """A plan whose sizes fit together."""
    tp, pp, cp, ep, etp = (draw(one_to_four) for _ in range(5))
    vpp = draw(one_to_four) if pp > 1 else 1
    split = draw(st.none() | st.lists(st.integers(0, 9), min_size=pp * vpp, max_size=pp * vpp).map(tuple))
    return ParallelPlan(
        tp=tp,
        pp=pp,
        vpp=vpp,
        cp=cp,
        ep=ep,
        etp=draw(st.sampled_from([None, etp])),
        dp=ep * etp * draw(one_to_four) * tp,
        sp=tp > 1 and draw(st.booleans()),
        split=split,
    )


@law
@given(any_plan())
def test_text_and_plan_are_one(plan):
    """parse(str(plan)) is the plan, and str is stable."""
    assert ParallelPlan.parse(str(plan)) == plan
    assert str(ParallelPlan.parse(str(plan))) == str(plan)


@law
@given(any_plan())
def test_coordinates_are_unique_and_fill_the_plan(plan):
    """Every rank has its own dense coordinates and its own expert coordinates, each within the sizes."""
    ranks = [plan.coordinates(r) for r in range(plan.world_size)]
    assert len({(c.tp, c.cp, c.dp, c.pp) for c in ranks}) == plan.world_size
    assert len({(c.etp, c.ep, c.edp, c.pp) for c in ranks}) == plan.world_size
    last = plan.coordinates(plan.world_size - 1)
    assert last == Coordinates(plan.tp - 1, plan.cp - 1, plan.dp - 1, plan.pp - 1, plan.ep - 1, plan.expert_tp - 1, last.edp)
    assert plan.coordinates(0) == Coordinates()


def test_spellings_of_the_empty_plan():
    """No text is one rank; spaces and capitals do not matter; sp may be written with a number."""
    assert ParallelPlan.parse("") == ParallelPlan.parse("tp1") == ParallelPlan()
    assert ParallelPlan.parse(" TP2 , sp1,pp2 ") == ParallelPlan(tp=2, pp=2, sp=True)
    assert ParallelPlan.parse("tp2,sp0") == ParallelPlan(tp=2)


@pytest.mark.parametrize(
    "text, words",
    [
        ("tq2", "tp"),
        ("tp", "tp"),
        ("tp2-2", "tp2-2"),
        ("2", "2"),
        ("split", "split"),
        ("tp2;pp2", "tp2;pp2"),
        ("tp0", "at least 1"),
        ("sp2,tp2", "sp2"),
    ],
)
def test_words_that_mean_nothing_are_named(text, words):
    """A word that is not understood is in the message."""
    with pytest.raises(PlanError, match=words):
        ParallelPlan.parse(text)


MANY = [
    *(
        "tp2",
        "pp2",
        "cp2",
        "dp2",
        "tp2,pp2",
        "tp2,cp2",
        "tp2,dp2,pp2",
        "cp2,dp2,pp2",
        "tp2,cp2,dp2,pp2",
        "tp4,cp3,dp2,pp2",
        "tp3,dp5",
    ),
    *("tp4,etp1,ep4", "tp2,ep2,dp2", "tp2,etp1,ep4,dp2", "ep4,dp4", "etp2,ep2,dp4", "etp2,ep2,dp4,pp2", "tp4,pp2,dp2,ep2,etp2"),
    *(
        "tp2,cp2,dp2,ep4,etp2",
        "tp2,cp2,dp2,pp2,ep8,etp1",
        "tp8,pp8,dp4,ep32,etp1",
        "tp1,etp4,dp8,ep2",
        "cp2,ep2",
        "tp2,etp4,ep2,dp4",
    ),
]


def test_coordinates_are_megatrons(solo):
    """For many plans, with expert, context and data parallelism, every rank stands where megatron-core's RankGenerator puts
    it."""
    for text, where in zip(MANY, solo("megatron_coordinates", plans=MANY), strict=True):
        plan = ParallelPlan.parse(text)
        assert len(where) == plan.world_size
        for rank, want in enumerate(where):
            assert dataclasses.asdict(plan.coordinates(rank)) == want, (text, rank)


@pytest.mark.parametrize("plan", ["tp2,pp2", "tp2,cp2", "dp2,tp2", "tp2,etp1,ep2,dp2", "ep4,dp4", "cp2,pp2"])
def test_coordinates_are_those_that_run(ranks, plan):
    """In real ranks parallel_state says the same coordinates as the plan."""
    for seen in ranks("running_coordinates", plan):
        assert seen["running"] == seen["planned"], seen


@pytest.fixture(scope="module")
def fake():
    with FakeWorld(host="shardproof.bridges.host:install") as world:
        yield world


PLACED = [
    "pp2",
    "pp4",
    "pp2,vpp2",
    "tp2,pp2,vpp2",
    "pp2,split3-1",
    "pp2,split1-3",
    "pp3,split2-1-1",
    "pp2,vpp2,split1-1-1-1",
    "pp4,split1-1-1-1",
    "pp2,vpp4,split0-1-0-1-0-1-0-1",
    "pp2,vpp2,split2-1-0-1",
    "pp4,vpp2,split1-0-1-0-1-0-1-0",
]


@pytest.mark.parametrize("plan", PLACED)
def test_placement_is_where_megatron_builds_the_layers(fake, plan):
    """Each pipeline rank's chunks hold the layers that `placement` says, by the modules' own layer_number."""
    config, parsed = toy("qwen3", "even"), ParallelPlan.parse(plan)
    placed = parsed.placement(config["num_hidden_layers"])
    found = []
    for rank in range(0, parsed.world_size, parsed.tp):
        at = parsed.coordinates(rank)
        chunks = fake.run(
            "helpers_engine:built_layers", plans.layout(plan), parsed.world_size, rank, kwargs={"config": config, "plan": plan}
        )
        assert chunks == [list(placed[parsed.stage(at.pp, vp)]) for vp in range(parsed.vpp)], (plan, rank)
        found += sum(chunks, [])
    assert sorted(found) == list(range(config["num_hidden_layers"]))


@law
@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 3))
def test_placement_is_even_or_refused_with_a_split_that_works(layers, pp, vpp):
    """Without a split layers divide evenly; where they do not, the split that the message proposes is accepted."""
    plan = ParallelPlan(pp=pp, vpp=vpp if pp > 1 else 1)
    try:
        placed = plan.placement(layers)
    except PlanError as why:
        assert layers % plan.stages and str(layers) in str(why)
        proposed = ParallelPlan.parse(f"{plan},{str(why).rpartition('e.g. ')[2]}")
        placed = proposed.placement(layers)
    assert [n for stage in placed for n in stage] == list(range(layers))


IMPOSSIBLE = [  # (fields of the toy, plan, ranks, words with their numbers)
    ({}, "tp3", None, "8 attention heads do not divide by tp 3"),
    ({}, "tp16", None, "8 attention heads do not divide by tp 16"),
    ({}, "pp2", None, r"5 layers do not divide over 2 pipeline stages.*= 1.*split3-2"),
    ({}, "pp2,vpp2", None, r"5 layers do not divide over 4.*split2-1-1-1"),
    ({}, "pp2,split3-3", None, "split holds 6 layers, the model has 5"),
    ({}, "pp2,split3-1-1", None, "lists 3 stages; pp.vpp is 2"),
    ({}, "tp2,pp2,split3-2", 2, "needs 4 ranks or a multiple of them; there are 2"),
    ({}, "tp2", 3, "needs 2 ranks or a multiple of them; there are 3"),
    ({"intermediate_size": 110}, "tp4", None, "MLP width 110 does not divide by tp 4"),
    ({}, "vpp2", None, "vpp2 without pipeline"),
    ({}, "sp", None, "sp without tensor"),
    ({"num_attention_heads": 12, "num_key_value_heads": 6, "hidden_size": 60}, "tp4", None, "6 query groups and tp 4"),
    ({}, "dp2,ep2", None, "llama has no experts"),
    ({}, "tp2,etp1", None, "llama has no experts"),
    ({}, "ep2", None, "llama has no experts"),
    ({}, "dp3,ep2", None, r"3 ranks .* cannot hold etp\*ep\*pp = 2"),
]


@pytest.mark.parametrize("fields, plan, count, words", IMPOSSIBLE, ids=[p for _, p, _, _ in IMPOSSIBLE])
def test_impossible_plans_are_named_with_their_numbers(fields, plan, count, words):
    """Before any rank starts, a plan that the model or the ranks cannot carry is a PlanError with the numbers and what to do."""
    config = toy("llama", **fields)
    with pytest.raises(PlanError, match=words) as why:
        find_family(config).architecture(config).check(ParallelPlan.parse(plan), count)
    assert plan in str(why.value) or "plan" in str(why.value)


@pytest.mark.parametrize("plan", ["tp2", "tp4", "tp8", "tp2,pp5,sp", "cp2", "dp3", "pp2,vpp2,split2-1-1-1", "tp4,cp2,dp2,pp5"])
def test_possible_plans_are_accepted(plan):
    """More ranks than groups, uneven splits, and any data and context parallelism are possible; so are more ranks than one
    replica."""
    config, parsed = toy("llama", intermediate_size=112), ParallelPlan.parse(plan)
    find_family(config).architecture(config).check(parsed, 3 * parsed.world_size)


@pytest.mark.parametrize(
    "fields", [{"tp": 0}, {"tp": -1}, {"pp": 1.0}, {"cp": True}, {"dp": None}, {"etp": 0}, {"split": (5, -1), "pp": 2}]
)
def test_sizes_that_are_no_sizes_are_refused(fields):
    """A size is a whole number of at least 1, and no stage holds less than no layers."""
    with pytest.raises(BridgeError):
        ParallelPlan(**fields).placement(4)
