"""The gate: what a certificate needs, and that it is not given away."""

import json

import pytest
from shardproof.conformance import certify
from shardproof.conformance.api import load_adapter
from shardproof.conformance.checks import CHECKS
from test_suite import run

REFERENCE = load_adapter("reference")


def rows(verdict="pass", without=()):
    """One case of every check."""
    return [{"id": f"f/t/tp1/fp32/both/{c}", "family": "f", "check": c, "verdict": verdict} for c in CHECKS if c not in without]


class Thin:
    """An adapter that claims no FLOPs."""

    def __getattr__(self, name):
        if name == "flops":
            raise AttributeError(name)
        return None


def test_all_checks_passed_is_a_certificate(tmp_path):
    """Law: nothing lacks where every check is claimed, has a case and passed; the file says granted."""
    assert certify.lacking(REFERENCE, "f", rows(), finished=True) == []
    path = certify.write(tmp_path, "f", rows(), {"versions": {}}, [])
    assert json.loads(path.read_text())["granted"] and [p.name for p in tmp_path.iterdir()] == ["certificate-f.json"]


@pytest.mark.parametrize(
    ("results", "adapter", "finished", "says"),
    [
        (rows(), REFERENCE, False, "stopped"),
        (rows(without=("grad.train",)), REFERENCE, True, "grad.train has no case"),
        (rows(), Thin(), True, "flops.counted is not claimed: the adapter lacks flops"),
        *[(rows(verdict), REFERENCE, True, f"{len(CHECKS)} {verdict}") for verdict in ("fail", "unknown", "not-run", "known")],
    ],
)
def test_anything_less_is_none(results, adapter, finished, says):
    """Law: a stopped run, a check without a case or a claim, and any verdict but pass are each named."""
    assert any(says in sentence for sentence in certify.lacking(adapter, "f", results, finished=finished))


@pytest.mark.parametrize("options", [("--certify",), ("--family", "qwen3", "--certify", "--plan", "tp1")])
def test_a_part_is_no_gate(options, tmp_path):
    """Law: --certify without a family, or with an option that leaves cases out, is a usage error."""
    done = run(*options, reports=tmp_path)
    assert done.returncode == 4 and "--certify" in done.stderr
