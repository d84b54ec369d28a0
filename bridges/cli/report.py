"""`report`: the reports of a run, or of several merged, made again from results.jsonl."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from . import shared
from .shared import BridgeError

DEFAULT = Path("reports/results.jsonl")
Out = Annotated[Path | None, typer.Option(metavar="FILE", help="Where to write it; - is stdout.")]


def report(
    results: Annotated[list[Path] | None, typer.Argument(metavar="RESULTS.jsonl", help=f"Default: {DEFAULT}.")] = None,
    html: Out = None,
    junit: Out = None,
    markdown: Out = None,
    terminal: Annotated[bool, typer.Option("--terminal", help="Print the matrix and the causes; the default.")] = False,
    exit_zero: Annotated[bool, typer.Option("--exit-zero", help="Exit 0 whatever the verdicts are.")] = False,
) -> None:
    """Make the reports of a run again from its results.jsonl.

    Several files are merged: a case that is in two of them must have the same verdict in both. Exit code 1 where a case failed or is
    unknown, or where a file has no footer because its run was interrupted.
    """
    from shardproof.conformance import report as reports

    files = {kind: path for kind, path in (("html", html), ("junit", junit), ("markdown", markdown)) if path}
    if sum(str(path) == "-" for path in files.values()) + terminal > 1:
        raise BridgeError("only one report fits on stdout; give the others a file")
    try:
        run = reports.merge([reports.read(path) for path in results or [DEFAULT]])
        for kind, path in files.items():
            _put(reports, kind, path, run)
    except reports.ResultsError as problem:
        raise BridgeError(str(problem)) from None
    if terminal or not files:
        width = shutil.get_terminal_size((120, 24)).columns
        shared.say(reports.terminal.matrix(run, width, colour=_coloured()))
    if not run.ok and not exit_zero:
        raise typer.Exit(1)


def _put(reports, kind: str, path: Path, run) -> None:
    text = reports.made(kind, run)
    if str(path) == "-":
        sys.stdout.buffer.write(text.encode())
        return
    try:
        shared.note(f"{kind}: {reports.place(path, text)}")
    except OSError as problem:
        raise BridgeError(f"{path}: {problem.strerror}; name a file that can be written") from None


def _coloured() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")
