"""gpu.*: real kernels in bf16, against transformers in fp32 on the same bf16 weights.

The bounds lie between what right bridges show and what planted faults show; ``python -m shardproof.conformance.calibrate`` measures both.
"""

from __future__ import annotations

from .base import Check, close, on_gpus_only, same_names

LOGITS = 0.03  # relative to the largest logit
GRADIENTS = 0.1  # relative to the largest element of each gradient


def logits(lab, case):
    """In bf16 on real kernels, logits are those of transformers within the calibrated bound."""
    got = lab.measured(case.toy, case.plan, "bf16", forward=True)["logits"]
    lab.note(close("bf16 logits", got.float(), lab.reference(case.toy, "bf16")["logits"], LOGITS))


def gradients(lab, case):
    """In bf16 on real kernels, every gradient is that of transformers within the calibrated bound."""
    want = lab.reference(case.toy, "bf16")["gradients"]
    got = lab.measured(case.toy, case.plan, "bf16", forward=True)["gradients"]
    same_names("gradients", got, want)
    for name, gradient in want.items():
        lab.note(close(f"bf16 gradient of {name}", got[name].float(), gradient, GRADIENTS))


CHECKS = [
    Check("gpu.logits", logits, on_gpus_only, direction="import", dtypes=("bf16",), gpu=True),
    Check("gpu.gradients", gradients, on_gpus_only, dtypes=("bf16",), needs=("export_gradients",), gpu=True),
]
