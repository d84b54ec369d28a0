"""The bf16 bounds, measured: errors of the right bridge below them, errors of planted faults above. ``python -m shardproof.conformance.calibrate``

A fault whose bf16 error is within the bounds cannot be seen in bf16; it is listed as such and stays the matter of the fp32 laws.
"""

from __future__ import annotations

import argparse
import contextlib
import math

from .api import load_adapter
from .cases import Case, gpu_cases
from .checks.gpu import LOGITS, bound_of, distance
from .faults.base import Model
from .faults.registry import FAULTS
from .lab import Lab

MARGIN = 2.0  # a right bridge stays below bound / MARGIN


def main(arguments: list[str] | None = None) -> int:
    """Print, for each family, the right bridge's errors and those of faults, in parts of their bounds; 1 where a bound has no margin."""
    parser = argparse.ArgumentParser(prog="python -m shardproof.conformance.calibrate", description=__doc__.splitlines()[0])
    parser.add_argument("--bridge", default="reference")
    parser.add_argument("--family", action="append", default=[])
    parser.add_argument("--gpu", action="store_true", help="measure on CUDA devices instead of the CPU")
    parser.add_argument("--right", action="store_true", help="the right bridge alone, no faults")
    options = parser.parse_args(arguments)
    print(
        "| family | right: logits | right: worst gradient | faults seen | faintest seen | not seen in bf16 |\n|---|---|---|---|---|---|"
    )
    with contextlib.closing(Lab(load_adapter(options.bridge), options.bridge)) as lab:
        lab.use("gpu" if options.gpu else "cpu")
        toys = {c.family: c for c in gpu_cases(lab.adapter) if c.plan == "tp1"}
        asked = [case for family, case in toys.items() if not options.family or family in options.family]
        tight = [case.family for case in asked if not _family(lab, options, case)]
    if tight:
        print(f"\nno margin in {', '.join(tight)}: change the bounds of checks/gpu.py or find the reason")
    return int(bool(tight))


def _family(lab: Lab, options, case: Case) -> bool:
    right = parts(lab, options.bridge, case)
    wrong = {fault: max(parts(lab, f"{fault}@{options.bridge}", case)) for fault in ([] if options.right else visible(case))}
    seen = {fault: part for fault, part in wrong.items() if part > 1}
    faintest = min(seen, key=seen.get, default=None)
    told = f"{faintest} ({seen[faintest]:.1f})" if faintest else "-"
    unseen = ", ".join(f"{f} ({p:.2f})" for f, p in wrong.items() if f not in seen) or "-"
    print(f"| {case.family} | {right[0]:.2f} | {right[1]:.2f} | {len(seen)} of {len(wrong)} | {told} | {unseen} |", flush=True)
    return max(right) * MARGIN <= 1


def visible(case: Case) -> list[str]:
    """Faults that show in the logits of a default toy on one rank."""
    model = Model(case.toy.config, frozenset())
    shown = [f for f in FAULTS.values() if "forward.logits" in f.owners and f.plans[0] == "tp1" and f.geometries[0] == "default"]
    return [f.name for f in shown if f.where(model)]


def parts(lab: Lab, name: str, case: Case) -> tuple[float, float]:
    """Errors in bf16 of the logits and of the worst gradient, in parts of their bounds; infinite where the bridge crashes."""
    lab.adapter, lab.adapter_name = load_adapter(name), name
    lab.forget()
    try:
        got, want = lab.measured(case.toy, "tp1", "bf16", forward=True), lab.reference(case.toy, "bf16")
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
        return math.inf, math.inf
    parts = [
        distance(got["gradients"][n], g) / bound_of(n, want["gradients"])
        for n, g in want["gradients"].items()
        if n in got["gradients"]
    ]
    return distance(got["logits"], want["logits"]) / LOGITS, max(parts, default=math.inf)


if __name__ == "__main__":
    raise SystemExit(main())
