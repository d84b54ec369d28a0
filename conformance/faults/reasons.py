"""Checks that kill no fault alone, and why they stand. A check without a fault of its own and without a reason here fails the tests."""

REASONS: dict[str, str] = {
    "plan.agreement": "forward.logits and roundtrip.bits compare each plan with the reference at the same bounds, so what this sees they see too. "
    "It needs no reference: it holds for a model that transformers has no forward pass for, and says that the plan is the cause.",
}
