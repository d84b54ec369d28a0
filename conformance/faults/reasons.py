"""Checks that kill no fault alone, and why they stand. A check without a fault of its own and without a reason here fails the tests."""

ON_GPUS = (
    "It runs on GPUs only (--run-gpu); where there are none it has no case, and its bound is calibrated by planted faults of its own there"
    " (python -m shardproof.conformance.calibrate)."
)
REASONS: dict[str, str] = {
    "plan.agreement": "forward.logits and roundtrip.bits compare each plan with the reference at the same bounds, so what this sees they see"
    " too. It needs no reference: it holds for a model that transformers has no forward pass for, and says that the plan is the cause.",
    "lineage.once": "lineage.declared on one rank and lineage.same under every other plan name a place for each element, so they see what this"
    " sees. It needs neither a reviewed table nor another plan: it holds for a family on its first day.",
    "forward.causal": "transformers' own logits are causal, so what sees a later token differs from them too, in forward.logits or"
    " forward.lengths. It needs no reference, and says that the mask is the cause.",
    "gpu.logits": ON_GPUS,
    "gpu.gradients": ON_GPUS,
}
