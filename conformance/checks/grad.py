"""grad.*: gradients equal transformers', carried through the same moves as the weights."""

from .base import Check, close, every_plan, same_names


def parameters(lab, case):
    """Every parameter's gradient equals transformers' within 1e-5 of its largest element, after megatron-core's own finalisation."""
    want, got = lab.reference(case.toy)["gradients"], lab.measured(case.toy, case.plan)["gradients"]
    same_names("gradients", got, want)
    for name, gradient in want.items():
        lab.note(close(f"gradient of {name}", got[name], gradient))


CHECKS = [Check("grad.parameters", parameters, every_plan)]
