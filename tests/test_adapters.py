"""Adapters for bridges that are not ours, as far as they can be tested without them; docs/bridges has their verdicts."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from shardproof import fixtures
from shardproof.conformance.adapters import common
from shardproof.conformance.api import REQUIRED, load_adapter
from shardproof.conformance.cases import families

NAMES = ("mbridge", "megatron_bridge")
DOCS = Path(__file__).parent.parent / "docs" / "bridges"


def adapter(name: str):
    return load_adapter(f"shardproof.conformance.adapters.{name}:ADAPTER")


@pytest.mark.parametrize("name", NAMES)
def test_loads_without_its_bridge(name):
    """Law: the adapter's module imports neither its bridge, nor megatron, nor torch, and names its family of every published config."""
    probe = (
        "import json, sys; from shardproof.conformance.api import load_adapter; from shardproof.conformance.cases import families; "
        f"a = load_adapter('shardproof.conformance.adapters.{name}:ADAPTER'); found = families(a); "
        "print(json.dumps([sorted(found), [m for m in ('mbridge', 'megatron', 'torch', 'transformers') if m in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    found, loaded = json.loads(done.stdout)
    assert {"llama", "qwen2", "qwen3"} <= set(found)
    assert loaded == []


@pytest.mark.parametrize("name", NAMES)
def test_offers_what_is_required_and_claims_no_more(name):
    """Law: all required members are there, and none of the laws is claimed that the bridge has no function for."""
    assert not [member for member in REQUIRED if not hasattr(adapter(name), member)]
    for missing in ("export_gradients", "flops", "prove", "snapshot", "rewrite_config"):
        assert not hasattr(adapter(name), missing), missing


@pytest.mark.parametrize("name", NAMES)
def test_an_absent_bridge_says_how_to_reach_it(name, tmp_path):
    """Law: building without the bridge installed names the package and the door to its environment."""
    (tmp_path / "config.json").write_text(json.dumps(fixtures.published("Qwen/Qwen3-0.6B")))
    with pytest.raises(ImportError, match=rf"(?s){name.replace('_', '-')}.*exec:ENV/bin/python.*adapters\.{name}:ADAPTER"):
        adapter(name).build(tmp_path, "tp1", with_ddp=False)


def test_a_broken_bridge_is_not_called_absent(tmp_path, monkeypatch):
    """Law: a bridge that is installed and lacks a package of its own keeps its own error."""
    (tmp_path / "halfbridge.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        common.peer("halfbridge", "halfbridge")


def test_a_plan_in_megatron_cores_words():
    """Law: sizes, sequence parallelism and the split reach the fields that megatron-core has for them; the ends hold embedding and loss."""
    fields = common.parallel_settings("tp2,pp2,vpp2,sp,split2-1-1-1")
    assert (fields["tensor_model_parallel_size"], fields["pipeline_model_parallel_size"]) == (2, 2)
    assert fields["virtual_pipeline_model_parallel_size"] == 2 and fields["sequence_parallel"] is True
    layout = fields["pipeline_model_parallel_layout"]
    assert layout == [["embedding", "decoder", "decoder"], ["decoder"], ["decoder"], ["decoder", "loss"]]
    plain = common.parallel_settings("tp1")
    assert plain["virtual_pipeline_model_parallel_size"] is None and "pipeline_model_parallel_layout" not in plain


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        ("tp3", "heads do not divide"),
        ("pp2", "layers do not divide"),
        ("pp2,split3-3", "does not hold"),
        ("tp2,ep2", "no experts"),
    ],
)
def test_what_megatron_core_cannot_run_gives_no_case(plan, why):
    """Law: a plan that no bridge could build is named impossible, with the reason, before any rank starts."""
    config = {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 5}
    assert why in common.impossible(config, plan)
    assert common.impossible(config, "tp4") is None and common.impossible(config, "pp2,split3-2") is None


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_the_reference_on_what_can_run(name):
    """Law: on every toy, the plans that the adapter calls impossible are those that the reference bridge does."""
    from shardproof.conformance import plans
    from shardproof.toy_models import toy_config

    reference, peer = load_adapter("reference"), adapter(name)
    for variants in families(peer).values():
        config = toy_config(fixtures.published(variants[0]))
        if reference.family_of(config) is None:
            continue
        for plan in (*plans.NIGHTLY, *plans.EVEN):
            assert (peer.possible(config, plan) is None) == (reference.possible(config, plan) is None), (variants[0], plan)


@pytest.mark.parametrize("name", ["mbridge", "megatron-bridge"])
def test_a_page_shows_the_matrix_of_its_record(name):
    """Law: the verdicts in docs/bridges are those of the records beside them, none of which names a path of the machine that ran them."""
    from shardproof.conformance import report

    files = sorted((DOCS / name).glob("*.jsonl"))
    run = report.merge([report.read(file) for file in files])
    table = [line for line in report.made("markdown", run).splitlines() if line.startswith("|")]
    page = (DOCS / f"{name}.md").read_text()
    assert len(table) > 10 and "\n".join(table) in page
    assert not [file.name for file in files if re.search(r"/(tmp|root|home|work|mnt)/", file.read_text())]
