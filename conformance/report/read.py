"""results.jsonl, the source of truth: kept while cases run, finished by its footer, read with every line checked, files merged."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .run import ORDER, Run, clean

RESULTS = "results.jsonl"
REPORTS = {"html": "report.html", "junit": "junit.xml", "markdown": "summary.md"}
NEEDED = ("id", "family", "toy", "plan", "check", "verdict")


class ResultsError(ValueError):
    """A results file that cannot be read or merged; names the file, the line and the remedy."""


def place(path: Path, text: str) -> str:
    """Write a file under another name and move it into its place; returns its whole path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        draft.write_text(text, encoding="utf-8", newline="\n")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return str(path.resolve())


def begin(folder: Path, header: dict[str, Any]) -> None:
    """Start results.jsonl with its header alone; reports of an earlier run go, so that none is taken for this one's."""
    place(folder / RESULTS, _line({"kind": "header", **header}))
    for name in REPORTS.values():
        (folder / name).unlink(missing_ok=True)


def add(folder: Path, case: dict[str, Any]) -> None:
    """Add a case to what `begin` started: a run that is killed leaves what it found, without a footer."""
    with (folder / RESULTS).open("a", encoding="utf-8", newline="\n") as file:
        file.write(_line({"kind": "case", **case}))


def lines(run: Run) -> str:
    """A run as results.jsonl: header, one line a case, and the footer with counts if it is finished."""
    rows = [{"kind": "header", **run.header}, *({"kind": "case", **case} for case in run.cases)]
    if run.finished:
        rows.append({"kind": "footer", "cases": len(run.cases), **run.counts})
    return "".join(map(_line, rows))


def _line(row: dict[str, Any]) -> str:
    return json.dumps(_plain(row), allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Numbers that JSON does not have become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def read(path: Path) -> Run:
    """The run in one file; without a footer it is not finished. Raises ResultsError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        why = problem.strerror if isinstance(problem, OSError) else "is not UTF-8 text"
        raise ResultsError(f"{path}: {why}; name a results.jsonl that `pytest conformance` wrote") from None
    rows = _rows(path, text)
    if not rows or rows[0].get("kind") != "header":
        raise ResultsError(f"{path}, line 1: no header; it is not the beginning of a results.jsonl: run the suite again")
    finished = rows[-1].get("kind") == "footer"
    cases = rows[1:-1] if finished else rows[1:]
    for number, row in enumerate(cases, start=2):
        _judge(path, number, row)
    header, *cases = ({k: v for k, v in row.items() if k != "kind"} for row in [rows[0], *cases])
    if finished:
        _count(path, len(rows), rows[-1], Run({}, cases))
    return Run(header, _unique(cases, [str(path)] * len(cases)), finished, (str(path),))


def _rows(path: Path, text: str) -> list[dict]:
    rows, whole = [], text.split("\n")
    for number, line in enumerate(whole, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("no object")
        except ValueError:  # a last line without an end is where the run was killed, and then there is no footer
            if number == len(whole) > 1:
                break
            raise ResultsError(
                f"{path}, line {number}: damaged, it is no JSON object; take the file from its run again"
            ) from None
        rows.append(row)
    return rows


def _judge(path: Path, number: int, row: dict) -> None:
    remedy = "the file is damaged or put together by hand: take it from its run again, and merge with `shardproof report A B`"
    if row.get("kind") != "case":
        raise ResultsError(f"{path}, line {number}: {clean(row.get('kind'))!r} where a case should stand; {remedy}")
    if missing := [key for key in NEEDED if not isinstance(row.get(key), str)]:
        raise ResultsError(f"{path}, line {number}: the case lacks {', '.join(missing)}; {remedy}")
    if row["verdict"] not in ORDER:
        raise ResultsError(f"{path}, line {number}: verdict {clean(row['verdict'])!r} is none of {', '.join(ORDER)}; {remedy}")


def _count(path: Path, number: int, footer: dict, run: Run) -> None:
    told = {key: footer.get(key) for key in ("cases", *ORDER)}
    found = {"cases": len(run.cases), **run.counts}
    if wrong := [f"{key} {told[key]}, found {found[key]}" for key in found if told[key] != found[key]]:
        raise ResultsError(f"{path}, line {number}: the footer counts {'; '.join(wrong)}: lines are lost; take the file again")


def merge(runs: Sequence[Run]) -> Run:
    """Several runs of one bridge as one. Raises ResultsError where bridges differ, or one case has two verdicts."""
    first, *rest = runs
    if not rest:
        return first
    if other := next((run for run in rest if run.bridge != first.bridge), None):
        names = f"{first.sources[0]} is of bridge {first.bridge}, {other.sources[0]} of {other.bridge}"
        raise ResultsError(f"{names}; report each bridge by itself")
    cases = _unique([c for r in runs for c in r.cases], [r.sources[0] for r in runs for _ in r.cases])
    header = _both([run.header for run in runs])
    header["seconds"] = round(sum(run.header.get("seconds") or 0 for run in runs), 1)
    if started := [run.header["started"] for run in runs if run.header.get("started")]:
        header["started"] = min(started)
    return Run(header, cases, all(run.finished for run in runs), tuple(s for run in runs for s in run.sources))


def _unique(cases: list[dict], files: list[str]) -> list[dict]:
    """Each case once: the first of those that agree."""
    seen: dict[tuple, tuple[dict, str]] = {}
    for case, file in zip(cases, files, strict=True):
        before, where = seen.setdefault((case.get("bridge"), case["id"]), (case, file))
        if before["verdict"] != case["verdict"]:
            told = f"{before['verdict']} in {where} and {case['verdict']} in {file}"
            raise ResultsError(f"case {case['id']} is {told}; run it again, and leave out the file that is out of date")
    return [case for case, _ in seen.values()]


def _both(values: list[Any]) -> Any:
    """Headers joined: what differs is told of each file, `` / `` between."""
    held = [v for v in values if v is not None]
    if held and all(isinstance(v, dict) for v in held):
        keys = dict.fromkeys(k for v in held for k in v)
        return {k: _both([v.get(k) for v in held]) for k in keys}
    texts = list(dict.fromkeys(json.dumps(v) for v in held))
    return held[0] if len(texts) == 1 else " / ".join(str(json.loads(t)) for t in texts) or None
