"""The figures: parity, warm world times and command start-up, measured in one run. ``python -m shardproof.conformance.bench [--write FILE]``

Times are medians with their spread; ratios compare things measured side by side, since a shared machine is noisy.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from . import plans
from .api import LawBroken, load_adapter
from .cases import Case, Toy, families
from .checks import CHECKS
from .lab import Lab
from .worlds import Pool

ROUNDS = 7


def main() -> None:
    """Print all figures as Markdown; with --write FILE also to a file."""
    import contextlib
    import io

    lab, out = Lab(load_adapter("reference"), "reference"), io.StringIO()

    def show(text: str = "") -> None:
        print(text, flush=True)
        out.write(text + "\n")

    with contextlib.closing(lab):
        show("# Figures\n")
        show(
            f"`make bench` on {time.strftime('%Y-%m-%d')}: {os.cpu_count()} cores, Python {platform.python_version()}, "
            f"load {os.getloadavg()[0]:.1f} at the start.\n"
        )
        for section in (parity, worlds, commands):
            for line in section(lab):
                show(line)
            show()
        show(f"Ranks ran on: {lab.host_record()}")
    if "--write" in sys.argv:
        Path(sys.argv[sys.argv.index("--write") + 1]).write_text(out.getvalue())


def parity(lab: Lab):
    """Largest relative error of logits and of every gradient, and differing elements of round trips, per family and plan."""
    yield "## Parity (largest relative error over all toys of the default geometry's first variant; bound 1e-5, round trips exact)\n"
    yield "| family | plan | logits | gradients | round trip |"
    yield "|---|---|---|---|---|"
    for family, variants in families(lab.adapter).items():
        toy = Toy(variants[0])
        for plan in plans.NIGHTLY:
            if lab.adapter.possible(toy.config, plan) is None:
                cells = [
                    _cell(lab, Case(family, toy, plan, "fp32", "both", check))
                    for check in ("forward.logits", "grad.parameters", "roundtrip.bits")
                ]
                yield f"| {family} | {plan} | {' | '.join(cells)} |"


def _cell(lab: Lab, case: Case) -> str:
    lab.error = None
    try:
        CHECKS[case.check].run(lab, case)
    except LawBroken as broken:
        return f"FAIL: {broken}"
    return "exact" if lab.error is None else f"{lab.error:.1e}"


def worlds(lab: Lab):
    """Pool start, and layout + build + forward + backward + exports on warm ranks."""
    yield "## Worlds (seconds, median of rounds, slowest in brackets)\n"
    yield "| what | seconds | bound |"
    yield "|---|---|---|"
    lab.pools.close()
    first = _timed(lambda: Pool(4, host=lab.adapter.host))
    first[1].close()
    starts = []
    for _ in range(ROUNDS):
        seconds, pool = _timed(lambda: Pool(4, host=lab.adapter.host))
        starts.append(seconds)
        pool.close()
    yield f"| start of 4 ranks, fork server up | {_spread(starts)} | 0.5 |"
    toy, warm = Toy("Qwen/Qwen3-8B"), []
    folder, vocab = str(lab.folder(toy)), toy.config["vocab_size"]
    for round_ in range(ROUNDS + 1):
        lab.rank_task("forward_only", "tp4", folder=folder, vocab=vocab)  # another layout in between
        seconds, _ = _timed(lambda: lab.rank_task("forward_only", "tp2,pp2,split2-3", folder=folder, vocab=vocab))
        warm += [seconds] if round_ else []
    yield f"| 4 warm ranks, TP2 x PP2: layout change + build + import + forward | {_spread(warm)} | 0.5 |"


def commands(lab: Lab):
    """Start-up of the command line, as processes of their own."""
    yield "## Commands (seconds, best and median of rounds)\n"
    yield "| what | best | median | bound |"
    yield "|---|---|---|---|"
    program = [sys.executable, "-m", "shardproof.bridges.cli"]
    bare = [_timed(lambda: subprocess.run([sys.executable, "-c", "pass"], check=True))[0] for _ in range(3)]
    yield f"| python -c pass | {min(bare):.2f} | {statistics.median(bare):.2f} | |"
    listing = [_timed(lambda: subprocess.run([*program, "families"], check=True, capture_output=True))[0] for _ in range(5)]
    yield f"| shardproof families | {min(listing):.2f} | {statistics.median(listing):.2f} | 1.5 |"
    folder = lab.folder(Toy("Qwen/Qwen3-8B"))
    with tempfile.TemporaryDirectory() as root:
        yield from _conversions(program, folder, Path(root))


def _conversions(program: list[str], folder: Path, root: Path):
    import json

    for name, arguments in {
        "import": lambda n: ["import", str(folder), str(root / f"mg{n}")],
        "export": lambda n: ["export", str(root / "mg0"), str(root / f"hf{n}")],
    }.items():
        waits = []
        for n in range(3):
            done = subprocess.run([*program, *arguments(n), "--json"], check=True, capture_output=True, text=True)
            waits.append(json.loads(done.stdout)["seconds_to_first_tensor"])
        yield f"| shardproof {name}: launch to first tensor | {min(waits):.2f} | {statistics.median(waits):.2f} | 6 |"


def _timed(call):
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def _spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.3f} ({max(seconds):.3f})"


if __name__ == "__main__":
    main()
