"""The GPU tier where there is no GPU, its bf16 laws on the CPU, and exploration."""

import json

import pytest
from shardproof import fixtures
from shardproof.conformance import lab as lab_module
from shardproof.conformance.api import LawBroken, NotRun, load_adapter
from shardproof.conformance.cases import Case, Toy, chosen, gpu_cases, parse
from shardproof.conformance.checks import CHECKS, explore
from shardproof.conformance.checks.base import Check, single
from shardproof.conformance.lab import Lab
from shardproof.conformance.worlds import gpus
from test_suite import run

REFERENCE = load_adapter("reference")


def test_cells_without_devices_are_not_run(tmp_path):
    """Law: --run-gpu adds the GPU tier; on a machine without a device each of its cases reads not-run(gpu) and the exit code is 0."""
    if gpus():
        pytest.skip("this states what happens on a machine without a GPU")
    done = run("--run-gpu", "--family", "qwen3", "--toy", "dim32", "--plan", "tp1", reports=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()][1:-1]
    assert done.returncode == 0 and {r["verdict"] for r in rows} == {"not-run"}, done.stdout[-2000:]
    assert {"gpu.logits", "gpu.gradients", "roundtrip.bits", "lineage.once"} <= {r["check"] for r in rows}
    assert all(r["message"] == "not-run(gpu)" for r in rows)


def test_the_tier_is_asked_for():
    """Law: without --run-gpu no case of the tier is listed; with it every family has some; their ids run alone as GPU cases."""
    tier = list(gpu_cases(REFERENCE))
    assert not [c for c in chosen(REFERENCE, "default", []) if c.gpu]
    assert {c.family for c in tier} == {c.family for c in chosen(REFERENCE, "default", [])}
    assert parse(tier[0].id, REFERENCE) == tier[0]


def test_too_few_devices_are_told(monkeypatch):
    """Law: a plan of more ranks than devices is not run, and the message counts both."""
    monkeypatch.setattr(lab_module, "gpus", lambda: 2)
    lab = Lab.__new__(Lab)
    with pytest.raises(NotRun, match="gpu: 4 devices, 2 here"):
        lab.use("gpu", "tp2,pp2,split3-2")


@pytest.fixture(scope="module")
def lab():
    """Ranks on the CPU."""
    lab = Lab(REFERENCE, "reference")
    yield lab
    lab.close()


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_the_bf16_laws_bite_and_pass(lab, family):
    """Law: with the stand-ins in bf16 the right bridge is within the bounds of gpu.*, one with gate and up swapped is not."""
    if gpus():
        pytest.skip("ranks of this test are CPU ranks")
    cases = [
        c for c in gpu_cases(REFERENCE) if c.family == family and c.plan == "tp1" and c.check in ("gpu.logits", "gpu.gradients")
    ]
    for case in cases:
        CHECKS[case.check].run(lab, case)
    name = "gate_up_swapped@reference"
    lab.adapter, lab.adapter_name = load_adapter(name), name
    lab.forget()
    for case in cases:
        with pytest.raises(LawBroken, match="root mean square"):
            CHECKS[case.check].run(lab, case)
    lab.adapter, lab.adapter_name = REFERENCE, "reference"
    lab.forget()


class Bench:
    """A lab without ranks: the laws under test are its own."""

    adapter, profile = REFERENCE, "nightly"


def broken_by(wrong):
    """A law that some cases break."""

    def law(lab, case):
        """A law."""
        if wrong(case):
            raise LawBroken("broken")

    return Check("names.coverage", law, single)


CASE = Case("qwen3", Toy("Qwen/Qwen3-0.6B"), "tp1", "fp32", "both", "explore.drawn")


@pytest.mark.parametrize(
    ("wrong", "smallest"),
    [
        (lambda case: case.toy.config["num_hidden_layers"] == 7, "qwen3/Qwen3-0.6B+layers7/tp1/fp32/both/names.coverage"),
        (lambda case: "cp2" in case.plan, "qwen3/Qwen3-0.6B/cp2/fp32/both/names.coverage"),
    ],
)
def test_what_is_drawn_shrinks_to_a_case(monkeypatch, wrong, smallest):
    """Law: a fault that only one size or one kind of parallelism shows is found, and told as the smallest case id, which runs."""
    monkeypatch.setattr(explore, "checks", lambda: {"names.coverage": broken_by(wrong)})
    monkeypatch.setattr(explore, "LAWS", ("names.coverage",))
    monkeypatch.setitem(explore.EXAMPLES, "nightly", 200)
    with pytest.raises(LawBroken, match="found.txt") as told:
        explore.drawn(Bench, CASE)
    assert str(told.value).startswith(smallest), told.value
    assert parse(smallest, REFERENCE).id == smallest


def test_a_right_bridge_raises_no_alarm_there(monkeypatch):
    """Law: where no drawn case breaks a law, exploration passes; the gate draws the same cases every time."""
    seen = []
    monkeypatch.setattr(explore, "checks", lambda: {"names.coverage": broken_by(lambda case: seen.append(case.id))})
    monkeypatch.setattr(explore, "LAWS", ("names.coverage",))
    gate = type("Gate", (Bench,), {"profile": "default"})
    explore.drawn(gate, CASE)
    first, seen[:] = list(seen), []
    explore.drawn(gate, CASE)
    assert seen == first and len(first) == explore.EXAMPLES["default"]


def test_what_was_found_is_listed():
    """Law: every id of fixtures/found.txt means a case, and the suite lists it."""
    listed = {c.id for c in chosen(REFERENCE, "default", [])}
    assert fixtures.found() and set(fixtures.found()) <= listed
