"""Reports from results: JSONL is the source of truth; from it the terminal matrix and one HTML page."""

from __future__ import annotations

import json
from collections.abc import Iterable
from io import StringIO
from pathlib import Path

from ..api import Verdict

_ORDER = tuple(map(str, Verdict))
_STYLE = {"pass": "green", "known": "yellow", "not-run": "blue", "unknown": "magenta", "fail": "red"}


def write(results: list[dict], folder: Path, header: dict) -> dict[str, str]:
    """Write results.jsonl (header, one line a case, footer with counts) and report.html; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = {v: sum(r["verdict"] == v for r in results) for v in _ORDER}
    lines = [
        {"kind": "header", **header},
        *({"kind": "case", **r} for r in results),
        {"kind": "footer", "cases": len(results), **counts},
    ]
    jsonl, page = folder / "results.jsonl", folder / "report.html"
    jsonl.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page.write_text(html(results, header, counts))
    return {"results": str(jsonl), "report": str(page.resolve())}


def worst(rows: Iterable[dict]) -> str:
    """The largest verdict of some cases, ``-`` for none."""
    return max((r["verdict"] for r in rows), key=_ORDER.index, default="-")


def table(results: list[dict], by: str) -> tuple[list[str], list[str], dict[tuple[str, str], list[dict]]]:
    """Rows (families or toys), columns (checks), and the cases of each cell."""
    cells: dict[tuple[str, str], list[dict]] = {}
    for r in results:
        row = r["family"] if by == "family" else f"{r['family']} {r['toy']}"
        cells.setdefault((row, r["check"]), []).append(r)
    return list(dict.fromkeys(k[0] for k in cells)), sorted({k[1] for k in cells}), cells


def matrix(results: list[dict], width: int = 120) -> str:
    """Families x checks for a terminal: passed/all, worst verdict as colour; below it the failures grouped by message."""
    from rich.console import Console
    from rich.table import Table

    rows, columns, cells = table(results, "family")
    grid = Table(title=f"{len(results)} cases", header_style="bold")
    grid.add_column("check")
    for row in rows:
        grid.add_column(row, justify="right")
    for check in columns:
        texts = []
        for row in rows:
            mine = cells.get((row, check), [])
            verdict = worst(mine)
            style = _STYLE.get(verdict, "dim")
            texts.append(f"[{style}]{sum(r['verdict'] == 'pass' for r in mine)}/{len(mine)}[/]" if mine else "[dim]-[/]")
        grid.add_row(check, *texts)
    out = StringIO()
    console = Console(file=out, width=max(80, width), force_terminal=False)
    console.print(grid)
    for message, same in _causes(results):
        console.print(f"{len(same)} x {message}", markup=False)
        console.print(f"    e.g. --case {same[0]['id']}", markup=False)
    return out.getvalue().rstrip()


def _causes(results: list[dict]) -> list[tuple[str, list[dict]]]:
    groups: dict[str, list[dict]] = {}
    for r in results:
        if r["verdict"] not in ("pass", "known"):
            groups.setdefault(f"{r['check']} [{r['verdict']}]: {r['message'].splitlines()[0][:300]}", []).append(r)
    return sorted(groups.items(), key=lambda g: -len(g[1]))[:20]


def html(results: list[dict], header: dict, counts: dict) -> str:
    """One self-contained page: the matrix of toys x checks; a cell opens its cases and counterexamples."""
    from jinja2 import Environment, FileSystemLoader

    env = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    rows, columns, cells = table(results, "toy")
    grid = {row: [(check, worst(cells.get((row, check), [])), cells.get((row, check), [])) for check in columns] for row in rows}
    return env.get_template("page.html.j2").render(header=header, counts=counts, columns=columns, grid=grid, total=len(results))
