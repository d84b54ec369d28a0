"""Planted faults for the first suite: each wrong bridge is killed by the check that owns its class, and no right one is.

`-s` prints the table: fault, plan, what killed it, what it survived (a round trip survives every symmetric fault).
"""

import shutil

import pytest
from helpers_engine import FAULTS, VARIANTS
from shardproof.conformance.api import LawBroken, load_adapter
from shardproof.conformance.cases import Case, Toy
from shardproof.conformance.checks import CHECKS
from shardproof.conformance.lab import Lab

QWEN2_TIED = ("Qwen/Qwen2.5-0.5B", "default")
SPLIT = "pp2,split3-2"
# fault -> (variant or family, geometry), plan, checks that must fail, checks that it passes all the same
KILLS = {
    "gate_up_swapped": (("llama", "default"), "tp1", ["forward.logits", "grad.parameters"], ["roundtrip.bits", "names.coverage"]),
    "k_v_swapped": (("llama", "default"), "tp1", ["forward.logits"], ["roundtrip.bits", "roundtrip.perturbed"]),
    "heads_permuted": (("qwen2", "default"), "tp1", ["forward.logits"], ["roundtrip.bits", "roundtrip.perturbed"]),
    "groups_reversed": (("mistral", "default"), "tp2", ["forward.logits"], ["roundtrip.bits", "plan.agreement"]),
    "q_k_norms_swapped": (("qwen3", "default"), "tp1", ["forward.logits"], ["roundtrip.bits"]),
    "norms_swapped": (("nemotron", "default"), "tp1", ["forward.logits"], ["roundtrip.bits"]),
    "qkv_bias_dropped": (("qwen2", "default"), "tp1", ["forward.logits", "roundtrip.bits"], ["names.coverage"]),
    "tied_head_stale": (QWEN2_TIED, SPLIT, ["forward.logits", "plan.agreement"], ["roundtrip.bits"]),
    "window_off_by_one": (("mistral", "default"), "tp1", ["forward.logits"], ["roundtrip.bits"]),
    "rope_theta_default": (("llama", "default"), "tp1", ["forward.logits"], ["roundtrip.bits"]),
    "rope_scaling_dropped": (("llama", "default"), "tp1", ["forward.long"], ["roundtrip.bits"]),
    "eps_default": (("llama", "default"), "tp1", ["forward.logits"], ["roundtrip.bits"]),
    "padding_first": (("llama", "default"), "tp2", ["forward.logits"], ["roundtrip.bits", "roundtrip.perturbed"]),
    "fc2_transposed": (("llama", "square"), "tp1", ["forward.logits"], ["roundtrip.bits", "roundtrip.perturbed"]),
    "layer_offset": (("llama", "default"), SPLIT, ["roundtrip.bits", "forward.logits", "lineage.once"], ["names.coverage"]),
    "sections_ignored": (
        ("llama", "default"),
        "tp2",
        ["forward.logits", "plan.agreement", "lineage.same"],
        ["roundtrip.bits", "roundtrip.perturbed"],
    ),
    "export_of_the_source": (("llama", "default"), "tp1", ["roundtrip.perturbed"], ["roundtrip.bits", "forward.logits"]),
    "replicas_differ": (("llama", "default"), "tp2", ["plan.replicas"], ["roundtrip.bits"]),
    "gradients_k_v_swapped": (("llama", "default"), "tp1", ["grad.parameters"], ["roundtrip.bits", "forward.logits"]),
    "tensor_dropped": (("llama", "default"), "tp1", ["names.coverage", "roundtrip.bits"], ["forward.logits"]),
    "export_widened": (("llama", "default"), "tp1", ["roundtrip.bits16"], ["roundtrip.bits"]),
    "tokenizer_lost": (("llama", "default"), "tp1", ["io.reload"], ["roundtrip.bits"]),
    "index_total_off": (("llama", "default"), "tp1", ["io.reload"], ["roundtrip.bits"]),
    "config_field_lost": (("llama", "default"), "tp1", ["config.roundtrip"], ["forward.logits"]),
    "reload_incomplete": (("llama", "default"), "tp1", ["io.resharded"], ["roundtrip.bits"]),
    "flops_without_head": (("llama", "default"), "tp1", ["flops.counted"], ["forward.logits"]),
}
# The same fault where it cannot show: the geometry or plan that the toy rules ask for is what reveals it.
HIDDEN = {"sections_ignored": "tp1", "layer_offset": "tp1", "tied_head_stale": "tp1", "replicas_differ": "tp1"}


@pytest.fixture(scope="module")
def lab():
    lab = Lab(load_adapter("helpers_engine:RIGHT"), "helpers_engine:RIGHT", keep=60)
    yield lab
    lab.close()


def run(lab, name, toy, plan, check):
    """A check's verdict on the adapter `name`: None, or what broke the law. A crash of another kind is a crash of the test."""
    lab.adapter, lab.adapter_name = load_adapter(f"helpers_engine:{name}"), f"helpers_engine:{name}"
    law = CHECKS[check]
    try:
        law.run(lab, Case("any", toy, plan, law.dtypes[0], law.direction, check))
    except LawBroken as broken:
        return str(broken)
    return None


def forget(lab):
    """Drop what was measured with another adapter; references stay."""
    for key in [k for k in lab._memory if k[0] not in ("reference", "trained reference")]:
        del lab._memory[key]
    for coded in lab.root.glob("*-coded*"):
        shutil.rmtree(coded)


def toy_of(where):
    return Toy(VARIANTS.get(where[0], where[0]), where[1])


@pytest.mark.parametrize("fault", KILLS)
def test_a_planted_fault_is_killed_by_its_owner(lab, fault):
    """The owning checks fail on the wrong bridge, the named others do not see it, and the right bridge passes all of them."""
    where, plan, owners, blind = KILLS[fault]
    toy = toy_of(where)
    forget(lab)
    found = {check: run(lab, f"FAULT_{fault}", toy, plan, check) for check in [*owners, *blind]}
    forget(lab)
    right = {check: run(lab, "RIGHT", toy, plan, check) for check in found}
    forget(lab)
    print(
        f"\n{fault:24} {toy!s:28} {plan:14} killed by {', '.join(c for c in found if found[c]) or 'nothing':48} "
        f"survives {', '.join(c for c in found if not found[c])}"
    )
    assert not any(right.values()), {c: why for c, why in right.items() if why}
    assert all(found[c] for c in owners), f"{fault} survives {[c for c in owners if not found[c]]}"
    assert not any(found[c] for c in blind), {c: found[c] for c in blind if found[c]}


@pytest.mark.parametrize("fault", HIDDEN)
def test_a_fault_that_one_plan_hides(lab, fault):
    """On one rank these faults change nothing at all: only the plans of the suite make them visible."""
    forget(lab)
    toy = toy_of(KILLS[fault][0])
    assert not any(
        run(lab, f"FAULT_{fault}", toy, HIDDEN[fault], check) for check in ("forward.logits", "roundtrip.bits", "grad.parameters")
    )
    forget(lab)


def test_every_fault_is_planted():
    """Each fault of the list has its line in the table of kills, and each line its fault; at least fifteen."""
    assert set(FAULTS) == set(KILLS) and len(KILLS) >= 15
