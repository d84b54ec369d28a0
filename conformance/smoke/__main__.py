"""``python -m shardproof.conformance.smoke --bridge ADAPTER``: a table of steps; exit code 0 where the adapter can be used, else 1."""

from __future__ import annotations

import argparse
import sys

from .bench import Bench, Outcome
from .steps import STEPS

_MARK = {"ok": "ok", "wrong": "WRONG", "skipped": "skipped", "not offered": "-"}


def main(words: list[str] | None = None) -> int:
    """Run the steps, print each as it ends; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m shardproof.conformance.smoke", description=(__doc__ or "").split(":", 1)[1].strip()
    )
    parser.add_argument(
        "--bridge", required=True, help="adapter: MODULE:NAME, FILE.py:NAME, an entry point, or 'exec:PYTHON ADAPTER'"
    )
    parser.add_argument("--family", help="use a toy of this family")
    parser.add_argument("--toy", help="use the first toy whose name contains this")
    asked = parser.parse_args(words)
    outcomes = []
    with Bench(asked.bridge, family=asked.family, toy=asked.toy) as bench:
        for step in STEPS:
            outcomes.append(bench.take(step))
            print(line(outcomes[-1]), flush=True)
    wrong = [outcome for outcome in outcomes if outcome.result == "wrong"]
    print("\n" + verdict(asked.bridge, wrong))
    return 1 if wrong else 0


def line(outcome: Outcome) -> str:
    """One row of the table, what to do beneath."""
    text = f"{outcome.step:20} {_MARK[outcome.result]:8} {outcome.detail}".rstrip()
    if outcome.todo:
        text += f"\n{'':29} -> {outcome.todo}."
    if outcome.trace:
        text += "\n" + "\n".join(f"{'':29} | {row}" for row in outcome.trace.rstrip().splitlines()[-20:])
    return text


def verdict(bridge: str, wrong: list[Outcome]) -> str:
    """What the table comes to."""
    if not wrong:
        return f"The adapter {bridge} can be used: what the suite says of it from here on is about the bridge."
    names = ", ".join(outcome.step for outcome in wrong)
    return f"The adapter {bridge} is wrong ({names}): the suite would judge the adapter, not the bridge. Mend it as the lines above say."


if __name__ == "__main__":
    sys.exit(main())
