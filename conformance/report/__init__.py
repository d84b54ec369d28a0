"""Reports from results: results.jsonl is the source of truth; from it the terminal matrix, JUnit XML, Markdown and one HTML page."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from . import terminal
from .read import REPORTS, RESULTS, ResultsError, add, begin, lines, merge, place, read
from .run import ORDER, Run, worst

__all__ = [
    "ORDER",
    "REPORTS",
    "ResultsError",
    "Run",
    "add",
    "begin",
    "made",
    "matrix",
    "merge",
    "place",
    "read",
    "worst",
    "write",
]


def write(results: list[dict], folder: Path, header: dict, *, finished: bool = True) -> dict[str, str]:
    """Write results.jsonl, then report.html, junit.xml and summary.md from the same rows; returns what each is and where.

    finished: False leaves out the footer, and every report says that the run was interrupted. Each file appears whole or not at all. Where
    GitHub gives a step a page for its summary (GITHUB_STEP_SUMMARY), the Markdown is added to it.
    """
    run = Run(header, results, finished)
    written = {"results": place(folder / RESULTS, lines(run))}
    for kind, name in REPORTS.items():
        written[{"html": "report", "markdown": "summary"}.get(kind, kind)] = place(folder / name, made(kind, run))
    if step := os.environ.get("GITHUB_STEP_SUMMARY"):
        _append(Path(step), made("markdown", run))
    return written


def made(kind: str, run: Run) -> str:
    """The text of a report: html, junit or markdown."""
    from .html import html
    from .junit import junit
    from .markdown import markdown

    return {"html": html, "junit": junit, "markdown": markdown}[kind](run)


def matrix(results: list[dict], width: int = 120, header: dict | None = None, *, colour=False, finished=True) -> str:
    """The terminal's report of some rows; `header` names the bridge that the commands test."""
    return terminal.matrix(Run(header or {}, results, finished), width, colour=colour)


def _append(path: Path, text: str) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
    except OSError as problem:  # a summary that cannot be shown loses no verdict
        print(f"GITHUB_STEP_SUMMARY {path}: {problem.strerror}; the summary is in summary.md", file=sys.stderr)
