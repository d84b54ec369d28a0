"""The suite as its users run it: exit codes, verdicts, reports, reproduction by id."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from shardproof import fixtures
from shardproof.conformance import plans
from shardproof.conformance.api import load_adapter
from shardproof.toy_models import toy_config

ROOT = Path(__file__).parent.parent


def run(*arguments: str, reports: Path, path: Path | None = None) -> subprocess.CompletedProcess:
    """``pytest conformance`` in a process of its own."""
    import os

    env = {key: value for key, value in os.environ.items() if key != "GITHUB_STEP_SUMMARY"}  # planted failures are not CI's
    env |= {"PYTHONPATH": str(path)} if path else {}
    command = [sys.executable, "-m", "pytest", "conformance", "--report-dir", str(reports), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, timeout=300)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """One family's toy through three plans."""
    reports = tmp_path_factory.mktemp("reports")
    return run("--toy", "Qwen3-0.6B", "--plan", "tp1", "--plan", "tp2,sp", "--plan", "pp2,split3-2", reports=reports), reports


def test_a_right_bridge_passes(good):
    """Law: exit code 0, a matrix with the family's column, the report's path printed, progress told toy by toy."""
    done, reports = good
    assert done.returncode == 0, done.stdout[-3000:]
    assert "grad.parameters" in done.stdout and "qwen3" in done.stdout
    assert f"report: {reports / 'report.html'}" in done.stdout
    assert "[100%] qwen3" in done.stdout


def test_results_are_whole(good):
    """Law: results.jsonl has a header with versions and what the ranks ran on, a line a case, and a footer whose counts agree."""
    lines = [json.loads(line) for line in (good[1] / "results.jsonl").read_text().splitlines()]
    header, cases, footer = lines[0], lines[1:-1], lines[-1]
    assert header["kind"] == "header" and header["world"]["transformer_engine"] and header["versions"]["megatron-core"]
    assert footer == {
        "kind": "footer",
        "cases": len(cases),
        "pass": len(cases),
        "known": 0,
        "not-run": 0,
        "unknown": 0,
        "fail": 0,
    }
    assert len({c["id"] for c in cases}) == len(cases)
    assert all(c["error"] <= 1e-5 for c in cases if c["check"] == "grad.parameters")


def test_the_page_stands_alone(good):
    """Law: the HTML report loads nothing from elsewhere and names every case."""
    page = (good[1] / "report.html").read_text()
    assert "http" not in page.replace("http-equiv", "") and "<script src" not in page
    assert "qwen3/Qwen3-0.6B/tp2,sp/fp32/both/grad.parameters" in page


def test_two_workers_give_one_report(tmp_path):
    """Law: with pytest-xdist the cases and ids are the same, each worker has its own ranks, and one report holds all."""
    done = run("--toy", "Qwen3-0.6B", "--plan", "tp2,sp", "--plan", "tp2,pp2,sp,split2-3", "-n", "2", reports=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert done.returncode == 0 and lines[-1]["pass"] == len(lines) - 2 > 10, done.stdout[-2000:]
    assert lines[0]["world"] and "qwen3/Qwen3-0.6B/tp2,sp/fp32/both/grad.parameters" in {r.get("id") for r in lines}


WRONG = """
from shardproof.bridges.adapter import ReferenceAdapter

class Wrong(ReferenceAdapter):
    def build(self, folder, plan, *, with_ddp):
        chunks = super().build(folder, plan, with_ddp=with_ddp)
        {body}
        return chunks

ADAPTER = Wrong()
"""


FC1 = "next(p for n, p in chunks[0].named_parameters() if 'linear_fc1.weight' in n).data"


@pytest.mark.parametrize(
    ("body", "case", "verdict", "message"),
    [
        ("next(p for n, p in chunks[0].named_parameters() if 'linear_fc2' in n).data.mul_(1.001)",
         "tp1/fp32/import/forward.logits", "fail", "relative error"),
        ("raise RuntimeError('the bridge broke')", "tp1/fp32/import/forward.logits", "unknown", "the bridge broke"),
        (f"w = {FC1}; w[[0, 1]] = w[[1, 0]]", "tp2/fp32/import/lineage.same", "fail", "want model.layers.0.mlp.gate_proj.weight[0, 0]"),
        (f"w = {FC1}; w[1] = w[0]", "tp1/fp32/import/lineage.once", "fail", "taken 2 times"),
    ],
)  # fmt: skip
def test_wrong_bridges_get_their_verdict(tmp_path, body, case, verdict, message):
    """Law: a wrong weight is a FAIL, a crash is UNKNOWN; both make the exit code 1, say what was wrong and how to run the case again.

    The third bridge swaps two rows under tp2 alone; the fourth copies a row over another.
    """
    if "lineage.same" in case:
        body = f"import torch\n        if torch.distributed.get_rank() == 0 and torch.distributed.get_world_size() == 2:\n            {body}"
    (tmp_path / "wrong_bridge.py").write_text(WRONG.format(body=body))
    case = f"qwen3/Qwen3-0.6B/{case}"
    done = run("--bridge", "wrong_bridge:ADAPTER", "--case", case, reports=tmp_path / "r", path=tmp_path)
    assert done.returncode == 1, done.stdout[-3000:]
    row = json.loads((tmp_path / "r" / "results.jsonl").read_text().splitlines()[1])
    assert (row["id"], row["verdict"]) == (case, verdict) and message in row["message"], row
    assert f"--case {case}" in done.stdout


def test_an_option_that_names_nothing_is_an_error(tmp_path):
    """Law: a misspelt family is a usage error that lists the families, not an empty pass."""
    done = run("--family", "qwen33", reports=tmp_path)
    assert done.returncode == 4 and "qwen3" in done.stdout + done.stderr


def test_an_adapter_that_lacks_methods_is_named(tmp_path):
    """Law: an adapter without the protocol's members is refused with their names."""
    (tmp_path / "thin.py").write_text("class A:\n    name = 'thin'\n    host = None\nADAPTER = A()\n")
    done = run("--bridge", "thin:ADAPTER", reports=tmp_path, path=tmp_path)
    assert done.returncode != 0 and "export_weights" in done.stdout + done.stderr


def test_plans_follow_a_toy_of_more_layers():
    """A toy that needs seven layers to have every kind twice is cut into stages like the others."""
    assert plans.stretched("tp2,pp2,split2-3,sp", 7) == "tp2,pp2,split2-5,sp"
    assert plans.stretched("pp2,vpp2,split2-1-1-1", 7) == "pp2,vpp2,split2-1-1-3"
    assert plans.stretched("pp2,split5-0", 6) == "pp2,split6-0"  # prediction layers keep their stage
    assert [plans.stretched(p, 5) for p in plans.EXPERTS_NIGHTLY] == list(plans.EXPERTS_NIGHTLY)
    ultra = fixtures.published("nvidia/Llama-3_1-Nemotron-Ultra-253B-v1")
    toy = toy_config(ultra)
    assert toy["num_hidden_layers"] == 7
    adapter = load_adapter("reference")
    left = [p for p in plans.wanted(toy, "default", "nightly", first=False) if "pp" in p and not adapter.possible(toy, p)]
    assert len(left) >= 8, left
