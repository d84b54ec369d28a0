"""The figures: parity, warm world times and command start-up, measured in one run. ``python -m shardproof.conformance.bench [--write FILE]``

Times are medians with their spread; ratios compare things measured side by side, since a shared machine is noisy.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from shardproof import fixtures

from . import plans
from .api import LawBroken, load_adapter
from .cases import Case, Toy, families
from .checks import CHECKS
from .lab import Lab
from .worlds import Pool

ROUNDS = 7
_PROGRAM = [sys.executable, "-m", "shardproof.bridges.cli"]


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
        for section in (parity, worlds, commands, new_family, bf16):
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
    bare = [_timed(lambda: subprocess.run([sys.executable, "-c", "pass"], check=True))[0] for _ in range(3)]
    yield f"| python -c pass | {min(bare):.2f} | {statistics.median(bare):.2f} | |"
    listing = [_timed(lambda: subprocess.run([*_PROGRAM, "families"], check=True, capture_output=True))[0] for _ in range(5)]
    yield f"| shardproof families | {min(listing):.2f} | {statistics.median(listing):.2f} | 1.5 |"
    folder = lab.folder(Toy("Qwen/Qwen3-8B"))
    with tempfile.TemporaryDirectory() as root:
        yield from _conversions(folder, Path(root))


def _conversions(folder: Path, root: Path):
    for name, arguments in {
        "import": lambda n: ["import", str(folder), str(root / f"mg{n}")],
        "export": lambda n: ["export", str(root / "mg0"), str(root / f"hf{n}")],
    }.items():
        waits = []
        for n in range(3):
            done = subprocess.run([*_PROGRAM, *arguments(n), "--json"], check=True, capture_output=True, text=True)
            waits.append(json.loads(done.stdout)["seconds_to_first_tensor"])
        yield f"| shardproof {name}: launch to first tensor | {min(waits):.2f} | {statistics.median(waits):.2f} | 6 |"


def new_family(lab: Lab):
    """What a family costs from its draft to its gate: commands as processes of their own, cold start included."""
    yield "## A new family\n"
    yield "| step (ERNIE 4.5) | seconds | bound |"
    yield "|---|---|---|"
    with tempfile.TemporaryDirectory() as root:
        clone = Path(root, "clone")
        for folder in ("bridges/families", "docs/models", "fixtures/configs"):
            (clone / folder).mkdir(parents=True)
        (clone / "fixtures/configs/README.md").write_text("| a/a | - |\n")
        config = fixtures.published("baidu/ERNIE-4.5-0.3B-PT") | {"architectures": ["UnheardOfForCausalLM"]}
        Path(root, "config.json").write_text(json.dumps(config))
        draft = [
            *_PROGRAM,
            "new-family",
            "ernie",
            "--config",
            f"{root}/config.json",
            "--model-id",
            "a/ernie",
            "--root",
            str(clone),
        ]
        yield f"| `shardproof new-family` | {_seconds(draft):.1f} | |"
        suite = [sys.executable, "-m", "pytest", "--pyargs", "shardproof.conformance", "--report-dir", root]
        first = ("--toy", "ERNIE-4.5-0.3B-PT", "--plan", "tp1", "--check", "names", "--check", "forward.logits")
        yield f"| first look: names and forward on one rank | {_seconds([*suite, *first]):.1f} | |"
        for family in ("ernie4_5", "qwen3", "llama"):
            gate = [*suite, "--family", family, "--certify", "-n", "2", "--dist", "loadgroup"]
            yield f"| the whole gate of {family}, `--certify -n 2` | {_seconds(gate):.1f} | 45 |"


def _seconds(command: list[str]) -> float:
    return _timed(lambda: subprocess.run(command, check=True, capture_output=True))[0]


def bf16(lab: Lab):
    """Errors of the right bridge in bf16 on the CPU, in parts of the GPU tier's bounds."""
    from .calibrate import parts
    from .cases import gpu_cases

    yield "## bf16 bounds on the CPU\n"
    yield "Stand-ins in bf16, in parts of the bounds of `gpu.*`; `python -m shardproof.conformance.calibrate` adds planted faults.\n"
    yield "| family | logits | worst gradient |"
    yield "|---|---|---|"
    for case in gpu_cases(lab.adapter):
        if case.check == "gpu.logits" and case.plan == plans.SINGLE:
            logits, gradient = parts(lab, "reference", case)
            yield f"| {case.family} | {logits:.2f} | {gradient:.2f} |"


def _timed(call):
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def _spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.3f} ({max(seconds):.3f})"


if __name__ == "__main__":
    main()
