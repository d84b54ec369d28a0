"""The suite for other people's bridges: as a function, as a decorator, from an empty folder, by entry point, from a wheel."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import planted_adapters
import pytest
from shardproof.bridges.adapter import ADAPTER, ReferenceAdapter
from shardproof.conformance import Verdict, load_adapter, parametrize_with_checks, run_conformance
from shardproof.conformance.api import REQUIRED
from shardproof.conformance.checks import CHECKS
from shardproof.conformance.naming import name_of

ROOT = Path(__file__).resolve().parent.parent
MINE = ReferenceAdapter()
NAMES = "qwen3/Qwen3-0.6B/tp1/fp32/both/names.coverage"
BITS = "qwen3/Qwen3-0.6B/tp1/fp32/both/roundtrip.bits"


def pytest_in(folder, *words, **environment):
    """pytest in a folder; `environment`: variables to set."""
    env = {**{k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}, **environment}
    call = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words]
    return subprocess.run(call, cwd=folder, capture_output=True, text=True, env=env, timeout=400)


# ------------------------------------------------------------------------------------------------------------- run_conformance
def test_run_conformance_gives_verdicts_and_reports(tmp_path, monkeypatch, capsys):
    """Law: rows, counts and reports of a right bridge; the caller's pytest settings and stdout have no part in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTEST_ADDOPTS", "--no-such-option")
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option-either\n")
    result = run_conformance("reference", cases=[NAMES, BITS], report_dir="out")
    assert result.ok and result.exit_code == 0 and result.bad == [] and result.counts["pass"] == 2 == len(result.rows)
    assert {row["id"] for row in result.rows} == {NAMES, BITS} and result.header["bridge"] == "reference"
    assert all(path.parent == tmp_path / "out" and path.stat().st_size for path in result.reports.values())
    assert set(result.reports) == {"results", "report", "junit", "summary"}
    assert "roundtrip.bits" in str(result) and "100%" in result.output and capsys.readouterr().out == ""


def test_run_conformance_judges_an_adapter_object(tmp_path):
    """Law: an adapter that a module holds is found by its variable; a wrong one is not ok, and its failures are rows."""
    result = run_conformance(planted_adapters.forgets_a_tensor, cases=[NAMES], report_dir=tmp_path)
    assert not result.ok and [(row["id"], row["verdict"]) for row in result.bad] == [(NAMES, str(Verdict.FAIL))]
    assert result.header["bridge"] == "planted_adapters:forgets_a_tensor" and "missing" in result.bad[0]["message"]


@pytest.mark.parametrize(
    ("options", "words"),
    [({"families": "qwen33"}, "--family qwen33 matches no case"), ({"cases": "a/b"}, "an id is family/toy/plan")],
)
def test_run_conformance_refuses_what_names_nothing(tmp_path, options, words):
    """Law: a misspelt word is a ValueError that lists what there is, not an empty pass; an old report is not read instead."""
    (tmp_path / "results.jsonl").write_text("old")
    with pytest.raises(ValueError, match=words):
        run_conformance("reference", report_dir=tmp_path, **options)


def test_run_conformance_ends_in_time(tmp_path):
    """Law: when time is over the run and all that it started ends."""
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="had not finished after 1 s"):
        run_conformance("reference", cases=[NAMES], report_dir=tmp_path, timeout=1)
    assert time.monotonic() - start < 30


# ---------------------------------------------------------------------------------------------------------------------- names
def test_names_of_adapters(tmp_path):
    """Law: ranks can load what name_of gives, whether the module is on the path, or a test file that pytest imported by itself."""
    assert name_of("reference") == "reference"
    assert name_of(ADAPTER) == "shardproof.bridges.adapter:ADAPTER"
    assert name_of(planted_adapters.twice) == "planted_adapters:twice"
    name = name_of(MINE)
    assert name.endswith("MINE") and isinstance(load_adapter(name).name, str)
    (tmp_path / "alone.py").write_text(
        "from shardproof.bridges.adapter import ReferenceAdapter\nclass N:\n    A = ReferenceAdapter()\n"
    )
    assert load_adapter(f"{tmp_path / 'alone.py'}:N.A").name == ADAPTER.name


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such", "give MODULE:NAME, FILE.py:NAME, or one of the installed .*'reference'"),
        ("no_such.module:A", "no module no_such; installed are .*'reference'"),
        ("json:NOTHING", "module json has no NOTHING"),
        ("no/such/file.py:A", "there is no file no/such/file.py"),
        ("json:dumps", "lacks \\['name', 'host'"),
    ],
)
def test_names_that_load_nothing(name, words):
    """Law: each is a ValueError that says what is missing and what there is."""
    with pytest.raises(ValueError, match=words):
        name_of(name)


def test_an_adapter_that_ranks_cannot_import_is_refused(tmp_path):
    """Law: an object in no variable, or in the running script, is refused before anything starts, with the remedy."""
    with pytest.raises(ValueError, match="write ADAPTER = ReferenceAdapter"):
        name_of(ReferenceAdapter())
    (tmp_path / "script.py").write_text(
        "from shardproof.conformance import run_conformance\nfrom shardproof.bridges.adapter import ReferenceAdapter\n"
        "class Own(ReferenceAdapter): pass\nADAPTER = Own()\nrun_conformance(ADAPTER)\n"
    )
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "move it to a module of its own" in done.stderr


# ------------------------------------------------------------------------------------------------------------------ decorator
OWN_TESTS = """
from shardproof.conformance import parametrize_with_checks

@parametrize_with_checks("reference", toys="Qwen3-0.6B", plans="tp1", checks=["names", "config.roundtrip"])
def test_right(case, lab):
    case.run(lab)

@parametrize_with_checks("planted_adapters:forgets_a_tensor", cases="{case}")
class TestWrong:
    def test_it(self, case, lab):
        case.run(lab)

def test_of_something_else():
    pass
"""


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "xdist"])
def test_the_decorator_in_somebodys_tests(tmp_path, workers):
    """Law: one test a case with the case's id, two bridges side by side, in this process or in two workers; failures say how to run again."""
    (tmp_path / "test_own.py").write_text(OWN_TESTS.format(case=NAMES))
    done = pytest_in(tmp_path, "-q", *workers, PYTHONPATH=str(ROOT / "tests"))
    rows = [json.loads(line) for line in (tmp_path / "reports" / "results.jsonl").read_text().splitlines()]
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-2000:]
    assert f"TestWrong::test_it[{NAMES}]" in done.stdout and "--bridge planted_adapters:forgets_a_tensor" in done.stdout
    assert set(rows[0]["bridge"].split(", ")) == {"reference", "planted_adapters:forgets_a_tensor"}
    assert rows[-1]["fail"] == 1 and rows[-1]["unknown"] == 0 and rows[-1]["pass"] == rows[-1]["cases"] - 1 >= 7


def test_the_decorators_words_must_name_something():
    """Law: a misspelt family is an error where it is written."""
    with pytest.raises(ValueError, match="--family qwen33 matches no case"):
        parametrize_with_checks("reference", families="qwen33")


def test_the_decorator_gives_stable_ids():
    """Law: the same ids each time, those of the suite itself."""
    one, two = (
        parametrize_with_checks("reference", toys="Qwen3-0.6B", plans=["tp1", "tp2,sp"], checks="names") for _ in range(2)
    )
    assert one.kwargs["ids"] == two.kwargs["ids"] and NAMES in one.kwargs["ids"]
    assert all(case.bridge == "reference" and case.id == name for case, name in zip(one.args[1], one.kwargs["ids"], strict=True))


# ------------------------------------------------------------------------------------------------------------------- installed
def entry_point(folder):
    """A package with an entry point, as if it were installed in a folder."""
    (folder / "somebodys_bridge.py").write_text(
        "from shardproof.bridges.adapter import ReferenceAdapter\nADAPTER = ReferenceAdapter()\n"
    )
    info = folder / "somebodys_bridge-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys-bridge\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[shardproof.adapters]\nsomebodys = somebodys_bridge:ADAPTER\n")


def test_an_entry_point_is_a_name(tmp_path):
    """Law: from an empty folder, --bridge takes an entry point of any installed package; an unknown name lists them all in one sentence."""
    site, empty = tmp_path / "site", tmp_path / "empty"
    site.mkdir(), empty.mkdir()
    entry_point(site)
    done = pytest_in(
        empty, "--pyargs", "shardproof.conformance", "--bridge", "somebodys", f"--case={NAMES}", PYTHONPATH=str(site)
    )
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    assert sorted(p.name for p in empty.iterdir()) == ["reports"]
    done = pytest_in(empty, "--pyargs", "shardproof.conformance", "--bridge", "nobodys", PYTHONPATH=str(site))
    assert done.returncode != 0 and "['reference', 'somebodys']" in done.stdout and "Traceback" not in done.stdout


def test_a_wheel_has_all_that_the_door_needs(tmp_path):
    """Law: installed from a wheel, without the clone, the suite runs on a bridge in this and through the exec door."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git clone")
    for file in filter(None, listed.stdout.split("\0")):
        if (ROOT / file).is_file() and not file.startswith(("tests/", "docs/")):
            (tmp_path / "clone" / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "clone" / file).write_bytes((ROOT / file).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    built = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(tmp_path / "clone")]
    done = subprocess.run(built, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    site, empty = tmp_path / "site", tmp_path / "empty"
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", str(site), str(wheel)], check=True, timeout=300)
    empty.mkdir()
    for bridge in ("reference", f"exec:{sys.executable} shardproof.bridges.adapter:ADAPTER"):
        words = ["--pyargs", "shardproof.conformance", "--bridge", bridge, f"--case={NAMES}", "-v", "--rootdir", str(empty)]
        done = pytest_in(empty, *words, PYTHONPATH=str(site))
        assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    text = "import shardproof.conformance.plugin as p; print(p.__file__)"
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", text], cwd=empty, capture_output=True, text=True, env=env, timeout=60)
    assert done.stdout.startswith(str(site)), done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------------------------------ docs
def test_the_page_says_what_members_unlock():
    """Law: docs/plug-in-your-bridge.md names, for each optional member, the checks that need it, and counts the planted adapters."""
    text = (ROOT / "docs" / "plug-in-your-bridge.md").read_text()
    told = {}
    for line in re.findall(r"^\|(.*)\|$", text, re.M):
        cells = line.split("|")
        for member in re.findall(r"`(\w+)", cells[0]):
            told[member] = set(re.findall(r"`(\w+\.\w+)`", cells[-1]))
    members = [*REQUIRED, *(member for check in CHECKS.values() for member in check.needs)]
    assert {m: told.get(m) for m in members} == {m: {c.id for c in CHECKS.values() if m in c.needs} for m in members}
    assert f"{len(planted_adapters.ADAPTERS)} planted ones" in text
