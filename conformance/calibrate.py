"""The bf16 bounds, measured: errors of the right bridge below them, errors of planted faults above. ``python -m shardproof.conformance.calibrate``

A fault whose bf16 error is no larger than a right bridge's cannot be seen in bf16 by any bound; it is listed as such and stays the matter
of the fp32 laws.
"""

from __future__ import annotations

import argparse
import contextlib
import math

from .api import load_adapter
from .cases import Case, gpu_cases
from .checks.gpu import GRADIENTS, LOGITS
from .diagnose import relative
from .faults.base import Model
from .faults.registry import FAULTS
from .lab import Lab
from .measure import write_toy  # noqa: F401 - named for readers: the toys are its

MARGIN = 2.0  # a right bridge stays below bound / MARGIN, a fault that counts as seen is above bound * MARGIN


def main(arguments: list[str] | None = None) -> int:
    """Print, for each family, the right bridge's errors and the smallest errors of faults; 1 where a bound has no margin."""
    parser = argparse.ArgumentParser(prog="python -m shardproof.conformance.calibrate", description=__doc__.splitlines()[0])
    parser.add_argument("--bridge", default="reference")
    parser.add_argument("--family", action="append", default=[])
    parser.add_argument("--gpu", action="store_true", help="measure on CUDA devices instead of the CPU")
    options = parser.parse_args(arguments)
    with contextlib.closing(Lab(load_adapter(options.bridge), options.bridge)) as lab:
        lab.use("gpu" if options.gpu else "cpu")
        toys = {c.family: c for c in gpu_cases(lab.adapter) if c.plan == "tp1"}
        tight = [
            family
            for family, case in toys.items()
            if not options.family or family in options.family
            if not _family(lab, options, case)
        ]
    if tight:
        print(f"no margin in {', '.join(tight)}: change the bounds of checks/gpu.py or find the reason")
    return int(bool(tight))


def _family(lab: Lab, options, case: Case) -> bool:
    lab.adapter, lab.adapter_name = load_adapter(options.bridge), options.bridge
    lab.forget()
    right = errors(lab, case)
    seen, unseen = [], []
    for fault in visible(case):
        lab.adapter, lab.adapter_name = load_adapter(f"{fault}@{options.bridge}"), f"{fault}@{options.bridge}"
        lab.forget()
        wrong = errors(lab, case)
        (seen if wrong[0] > LOGITS * MARGIN or wrong[1] > GRADIENTS * MARGIN else unseen).append((wrong, fault))
    smallest = min(seen, default=((math.nan, math.nan), "-"))
    print(
        f"{case.family}: right logits {right[0]:.1e} (bound {LOGITS}), gradients {right[1]:.1e} (bound {GRADIENTS}); {len(seen)} of"
        f" {len(seen) + len(unseen)} faults are seen, the faintest {smallest[1]} at {smallest[0][0]:.1e} / {smallest[0][1]:.1e}"
    )
    for wrong, fault in unseen:
        print(f"  not seen in bf16: {fault}, {wrong[0]:.1e} / {wrong[1]:.1e}")
    return right[0] * MARGIN < LOGITS and right[1] * MARGIN < GRADIENTS


def visible(case: Case) -> list[str]:
    """Faults that show in the logits of this toy on one rank."""
    model = Model(case.toy.config, frozenset())
    return [f.name for f in FAULTS.values() if "forward.logits" in f.owners and "tp1" in f.plans[:1] and _shows(f, model)]


def _shows(fault, model: Model) -> bool:
    return fault.geometries[0] == "default" and fault.where(model)


def errors(lab: Lab, case: Case) -> tuple[float, float]:
    """Relative errors in bf16 of the logits, and of the worst gradient; infinite where the bridge crashes."""
    try:
        got, want = lab.measured(case.toy, "tp1", "bf16", forward=True), lab.reference(case.toy, "bf16")
    except Exception as error:
        print(f"  {lab.adapter_name}: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
        return math.inf, math.inf
    gradients = [relative(got["gradients"][n].float(), g) for n, g in want["gradients"].items() if n in got["gradients"]]
    return relative(got["logits"].float(), want["logits"]), max(gradients, default=math.inf)


if __name__ == "__main__":
    raise SystemExit(main())
