"""Rows, headers and files as the suite writes them, for the tests of its reports."""

from __future__ import annotations

from pathlib import Path

from shardproof.conformance import report

HEADER = {
    "bridge": "mine:ADAPTER",
    "profile": "default",
    "versions": {"torch": "2.13.0"},
    "world": {"device": "cpu", "kernels": {"fla": "stand-in"}},
    "started": "2026-11-21T10:04:18",
    "seconds": 12.5,
    "laws": {"forward.logits": "Logits equal those of transformers."},
}
LOGITS = "logits: relative error {} > 1e-05; largest gap at ({}, 17, 31), scale 4.7e+00"
NASTY = [
    "</script><script>document.title='broken'</script><img src=x onerror=document.title='broken'>",
    "\x1b[31mred\x1b[0m \x07 \x00 \ud800 \u202e ]]> &amp; | `one` ```` four",
    "x" * 9000,
    "```\nsecond line\n\ttabbed",
]


def case(family="qwen3", check="forward.logits", verdict="pass", plan="tp1", toy="Qwen3-8B", message="", **more) -> dict:
    """A row as the plugin writes it."""
    row = {"id": f"{family}/{toy}/{plan}/fp32/both/{check}", "family": family, "toy": toy, "plan": plan, "dtype": "fp32"}
    return row | {"check": check, "verdict": verdict, "seconds": 0.25, "message": message, "error": None, **more}


def all_kinds() -> list[dict]:
    """Cases of every verdict, two causes of failure, and messages that try to break out."""
    rows = [case(plan=p) for p in ("tp1", "cp2")] + [case("llama", c, toy="Llama+mqa") for c in ("forward.logits", "io.reload")]
    rows += [
        case(verdict="fail", plan=p, message=LOGITS.format(e, n)) for n, (p, e) in enumerate((("tp4", 0.1), ("tp2", "2.3e-02")))
    ]
    rows[-1] |= {
        "diagnosis": ["the first tap that departs is decoder.layers.1.mlp"],
        "smaller": "qwen3/Qwen3-0.6B/tp2/fp32/both/forward.logits",
    }
    entry = {"reason": "head summed twice", "issue": "#7", "expires": "2027-01-31"}
    rows += [case("llama", "grad.train", "known", message="off; head summed twice", known=entry)]
    rows += [case("llama", "forward.long", "not-run", message="not-run(gpu)")]
    rows += [case("llama", "names.coverage", "unknown", message="RankError: rank 1 of 2 raised RuntimeError: broke")]
    return rows + [case("mixtral", f"io.nasty{n}", "fail", message=text) for n, text in enumerate(NASTY)]


def wide(families=12, checks=30) -> list[dict]:
    """A matrix of many families and checks in which one cell fails."""
    rows = [
        case(f"family_{f}", f"group{c // 3}.law{c}", plan=p)
        for f in range(families)
        for c in range(checks)
        for p in ("tp1", "tp2")
    ]
    rows[7] |= {"verdict": "fail", "message": LOGITS.format(1, 2)}
    return rows


def written(folder: Path, rows: list[dict], finished=True, **header) -> Path:
    """A results.jsonl."""
    return Path(report.write(rows, folder, HEADER | header, finished=finished)["results"])
