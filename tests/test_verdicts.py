"""Verdicts, known failures, diagnosis and shrinking."""

import json
from datetime import date

import pytest
from shardproof.conformance import known, shrink
from shardproof.conformance.api import LawBroken, NotRun, Verdict
from shardproof.conformance.cases import Case, Toy, parse
from shardproof.conformance.known import Known, fingerprint, judge
from shardproof.conformance.verdicts import verdict_of
from test_suite import run

ENTRY = Known("id", fingerprint("forward.logits", "logits: relative error 1.0e-02 > 1e-05"), "why", "where", date(2030, 1, 1))


def test_only_a_broken_law_is_a_fail():
    """Law: LawBroken is FAIL; a crash, even an assertion inside a bridge, is UNKNOWN; NotRun is NOT_RUN."""
    assert verdict_of(None)[0] is Verdict.PASS
    assert verdict_of(LawBroken("x")) == (Verdict.FAIL, "x")
    assert verdict_of(AssertionError("inside"))[0] is Verdict.UNKNOWN
    assert verdict_of(NotRun("gpu")) == (Verdict.NOT_RUN, "not-run(gpu)")


def test_a_fingerprint_knows_the_cause_not_the_numbers():
    """Law: numbers, addresses and folders do not matter; names and the check do."""
    one = fingerprint("forward.logits", "logits: relative error 8.673e-01 > 1e-05; largest gap at (2, 17, 31)")
    assert one == fingerprint("forward.logits", "logits: relative error 1.2e-03 > 1e-05; largest gap at (0, 1, 3)")
    assert one != fingerprint("forward.long", "logits: relative error 8.673e-01 > 1e-05; largest gap at (2, 17, 31)")
    assert fingerprint("x", "gradient of a.weight: 1") != fingerprint("x", "gradient of b.weight: 1")


@pytest.mark.parametrize(
    ("verdict", "message", "today", "stands", "says"),
    [
        (Verdict.FAIL, "logits: relative error 2.0e-02 > 1e-05", date(2029, 1, 1), Verdict.KNOWN, "why"),
        (Verdict.FAIL, "logits: relative error 2.0e-02 > 1e-05", date(2031, 1, 1), Verdict.FAIL, "until 2030-01-01"),
        (Verdict.FAIL, "logits: got shape [1], want [2]", date(2029, 1, 1), Verdict.FAIL, "another cause"),
        (Verdict.PASS, "", date(2029, 1, 1), Verdict.FAIL, "remove the entry"),
        (Verdict.UNKNOWN, "crash", date(2029, 1, 1), Verdict.UNKNOWN, ""),
        (Verdict.NOT_RUN, "gpu", date(2029, 1, 1), Verdict.NOT_RUN, ""),
    ],
)
def test_a_known_failure_excuses_one_cause_for_a_while(verdict, message, today, stands, says):
    """Law: only a failure of the listed cause before its expiry is KNOWN; a pass makes the entry itself a failure."""
    got, note = judge(ENTRY, verdict, message, "forward.logits", today=today)
    assert got is stands and says in note


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[[known]]\nid = "a"\n', "fingerprint"),
        ('[[known]]\nid="a"\nfingerprint="f"\nreason="r"\nissue="i"\nexpires="soon"\n', "TOML date"),
        ("[[known", "known failures"),
    ],
)
def test_a_bad_list_is_named(tmp_path, text, says):
    """Law: a list that cannot be read says which file, which entry and what is wrong."""
    (tmp_path / "k.toml").write_text(text)
    with pytest.raises(ValueError, match=says):
        known.load([tmp_path / "k.toml"])


WRONG = """
from shardproof.bridges.adapter import ReferenceAdapter

class Wrong(ReferenceAdapter):
    def build(self, folder, plan, *, with_ddp):
        chunks = super().build(folder, plan, with_ddp=with_ddp)
        for chunk in chunks:
            for name, param in chunk.named_parameters():
                if "layers.1.self_attention.linear_proj.weight" in name and "tp2" in plan:
                    param.data.mul_(1.01)
        return chunks

ADAPTER = Wrong()
"""
CASE = "qwen3/Qwen3-0.6B/tp2,cp2,sp/fp32/import/forward.logits"


@pytest.fixture
def wrong(tmp_path):
    """A bridge that is wrong under tp2, in the second layer's attention output alone."""
    (tmp_path / "wrong_bridge.py").write_text(WRONG)

    def case(*options):
        done = run("--bridge", "wrong_bridge:ADAPTER", "--case", CASE, *options, reports=tmp_path / "r", path=tmp_path)
        lines = (tmp_path / "r" / "results.jsonl").read_text().splitlines() if (tmp_path / "r").exists() else []
        return done, [json.loads(line) for line in lines]

    return case


def test_a_failure_is_narrowed_down(wrong):
    """Law: a failed forward names the first departing tap, what lineage says, that one rank passes, and the smallest plan that fails."""
    done, lines = wrong("--shrink")
    row = lines[1]
    assert done.returncode == 1 and row["verdict"] == "fail"
    assert "first departs at layer 1: attention" in row["diagnosis"][0]
    assert any("lineage.once fails too" in s and "layers.1.self_attn.o_proj" in s for s in row["diagnosis"])
    assert any("tp1 passes" in s for s in row["diagnosis"])
    assert row["smaller"] == "qwen3/Qwen3-0.6B/tp2/fp32/import/forward.logits"
    assert "--bridge wrong_bridge:ADAPTER --case " + row["smaller"] in done.stdout


def test_a_listed_failure_is_known(wrong, tmp_path):
    """Law: the entry made of a failure's fingerprint turns it into KNOWN and the exit code to 0; an entry for no case is an error."""
    row = wrong()[1][1]
    entry = f'[[known]]\nid = "{CASE}"\nfingerprint = "{row["fingerprint"]}"\nreason = "a test"\nissue = "none"\nexpires = 2100-01-01\n'
    (tmp_path / "known.toml").write_text(entry)
    done, lines = wrong("--known", str(tmp_path / "known.toml"))
    assert done.returncode == 0 and lines[1]["verdict"] == "known" and lines[1]["known"]["reason"] == "a test", done.stdout
    (tmp_path / "known.toml").write_text(entry.replace("tp2,cp2,sp", "tp3"))
    done, _ = wrong("--known", str(tmp_path / "known.toml"))
    assert done.returncode == 4 and "not there" in done.stderr


def test_plans_shrink_by_their_parts():
    """Law: smaller plans keep what their parts need, fewest ranks first; a split follows its pipeline, virtual stages fold into ranks."""
    assert shrink.simpler("tp2,cp2,sp") == ["tp1", "cp2", "tp2", "tp2,sp", "tp2,cp2"]
    assert shrink.simpler("pp2,vpp2,split2-1-1-1") == ["tp1", "pp2,split3-2"]
    case = Case("f", Toy("Qwen/Qwen3-8B", "mqa"), "tp2", "fp32", "both", "names.coverage")
    assert [c.id for c in shrink.candidates(case)] == [
        "f/Qwen3-8B/tp1/fp32/both/names.coverage",
        "f/Qwen3-8B+mqa/tp1/fp32/both/names.coverage",
        "f/Qwen3-8B/tp2/fp32/both/names.coverage",
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nonsense", "family/toy/plan"),
        ("qwen33/Qwen3-8B/tp1/fp32/both/names.coverage", "no family 'qwen33'"),
        ("qwen3/Qwen9/tp1/fp32/both/names.coverage", "no variant 'Qwen9'"),
        ("qwen3/Qwen3-8B/tp3/fp32/both/names.coverage", "tp"),
        ("qwen3/Qwen3-8B/tp1/fp32/both/names.covering", "no check 'names.covering'"),
    ],
)
def test_an_id_says_what_it_means_or_what_is_wrong_with_it(text, says):
    """Law: any geometry and plan that an id spells is a case; a part that means nothing is named."""
    from shardproof.conformance.api import load_adapter

    with pytest.raises(ValueError, match=says):
        parse(text, load_adapter("reference"))
    assert parse("qwen3/Qwen3-8B+mqa/tp2,sp/fp32/both/names.coverage", load_adapter("reference")).toy.geometry == "mqa"
