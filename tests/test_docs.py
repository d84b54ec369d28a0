"""The documentation says what is so: tables are current, snippets run, links resolve, no machine shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from shardproof.bridges import pages
from shardproof.conformance.api import Verdict
from shardproof.conformance.checks import CHECKS

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"(?:<!-- (?P<mark>[^>]*) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
SHELL = ("bash", "-euo", "pipefail", "-c")


def name(page: Path) -> str:
    """A page in test ids."""
    return str(page.relative_to(ROOT))


def fences(page: Path, language: str = "") -> list[re.Match]:
    """The fenced blocks of a page."""
    return [m for m in FENCE.finditer(page.read_text()) if m["language"] in (language or m["language"])]


def anchors(page: Path) -> set[str]:
    """What a link may name in a page: its headings, as GitHub spells them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}


# ------------------------------------------------------------------------------------------------------------- generated
def test_generated_tables_are_current():
    """Every table between markers is what the code gives; python -m shardproof.bridges.pages rewrites them."""
    assert [name(page) for page in pages.stale()] == []


def test_a_stale_table_is_seen_and_a_missing_marker_named():
    """The generator replaces only what stands between the markers, and says which marker is missing."""
    page = "a\n<!-- t:begin -->\n{}\n<!-- t:end -->\nb\n"
    assert pages.filled(page.format("old"), "t", "new") == page.format("new")
    with pytest.raises(ValueError, match="t:begin"):
        pages.filled("<!-- t:end -->", "t", "new")


def test_every_check_says_what_it_catches():
    """docs/laws.md has a row of prose for each check, and none for a check that is not there."""
    prose = (ROOT / "docs" / "laws.md").read_text().split("## What each catches")[1]
    assert re.findall(r"^\| `(\w+\.\w+)` \|", prose, re.M) == list(CHECKS)


def test_every_verdict_is_explained():
    """docs/read-a-failure.md names each verdict."""
    text = (ROOT / "docs" / "read-a-failure.md").read_text()
    assert [str(v) for v in Verdict if f"`{v}`" not in text] == []


@pytest.mark.parametrize("page", [p for p in PAGES if "<!-- file: " in p.read_text()], ids=name)
def test_quoted_files_are_the_files(page):
    """A block marked with a file's name is that file."""
    for fence in fences(page):
        if (fence["mark"] or "").startswith("file: "):
            assert fence["text"] == (ROOT / fence["mark"].removeprefix("file: ")).read_text()


# -------------------------------------------------------------------------------------------------------------- snippets
@pytest.mark.parametrize("page", [p for p in PAGES if fences(p, "python")], ids=name)
def test_python_snippets_parse(page):
    """Every Python block is Python."""
    for fence in fences(page, "python"):
        compile(fence["text"], name(page), "exec")


@pytest.mark.parametrize("page", [p for p in PAGES if "<!-- run -->" in p.read_text()], ids=name)
def test_marked_snippets_run(page, tmp_path):
    """Blocks marked run do, in order, in one empty folder, without the repository around them."""
    marked = [f for f in fences(page) if f["mark"] == "run"]
    assert len(marked) == page.read_text().count("<!-- run -->"), "a run mark stands before no block"
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    for fence in marked:
        command = [sys.executable, "-c"] if fence["language"] == "python" else list(SHELL)
        done = subprocess.run([*command, fence["text"]], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{fence['text']}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("page", [p for p in PAGES if "\nshardproof " in p.read_text()], ids=name)
def test_commands_and_options_exist(page):
    """Every `shardproof` line names a command and options that it has."""
    from shardproof.bridges.cli import app
    from typer.main import get_command

    commands = get_command(app).commands
    for line in re.findall(r"^shardproof (.*?)(?: #.*)?$", "".join(f["text"] for f in fences(page, "bash")), re.M):
        command, *words = line.split()
        assert command in commands, line
        options = {option for parameter in commands[command].params for option in parameter.opts}
        assert {w for w in words if w.startswith("--")} <= options, line


# ----------------------------------------------------------------------------------------------------------------- links
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_resolve(page):
    """Every relative link names a file of the repository, and a heading of it where it names one."""
    broken = []
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not link.startswith(("http://", "https://")) and (not target.exists() or (anchor and anchor not in anchors(target))):
            broken.append(link)
    assert broken == []


# -------------------------------------------------------------------------------------------------------------- machines
def private(text: str) -> list[str]:
    """Absolute paths of a developer's machine and hosts of package registries in a text."""
    folders = "|".join(("work", "root"))
    hosts = "|".join(("py" + "pi.org", "python" + "hosted.org", "index" + "-url", "conda" + ".anaconda.org"))
    return re.findall(rf"(?<![\w/.-])/(?:{folders})(?![\w-])|{hosts}", text)


def test_no_machine_shows_in_any_tracked_file():
    """Tracked text files hold no path of a developer's machine and no package registry's host."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git clone")
    found = {}
    for file in filter(None, listed.stdout.split("\0")):
        try:
            text = (ROOT / file).read_text()
        except (UnicodeDecodeError, FileNotFoundError):
            continue
        if hits := private(text):
            found[file] = hits[:3]
    assert found == {}


def test_a_planted_path_is_seen():
    """The search finds a path and a host, and lets a link's last part pass."""
    assert private("see /" + "work/main and https://py" + "pi.org/simple") == ["/" + "work", "py" + "pi.org"]
    assert private("docs/" + "root/x, ../" + "work, /" + "worker") == []
