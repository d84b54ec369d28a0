"""Mixture of experts: a softmax router sends every token to its top-k MLPs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ..errors import ConfigError, PlanError
from ..plan import ParallelPlan
from ..relations import Expert, Tensor
from .base import Site
from .mlp import MLP


@dataclass(frozen=True)
class MoE:
    """Routed experts behind a router without bias; no token is dropped.

    experts: HF module of expert ``{e}`` under `prefix`; `expert`: its linear layers.
    """

    prefix: str = "mlp"
    router: str = "gate"
    experts: str = "experts.{e}"
    expert: MLP = MLP(prefix="")
    norm_role: ClassVar[str] = "moe.norm"

    def settings(self) -> dict:
        """TransformerConfig fields."""
        return {**self.expert.settings(), "moe_router_score_function": "softmax"}

    def check(self, v) -> None:
        """Raise ConfigError for a choice of experts that cannot be made."""
        count, chosen = v["num_moe_experts"], v["moe_router_topk"]
        if chosen > count:
            raise ConfigError(f"num_experts_per_tok is {chosen} and there are {count} experts; lower it")
        if chosen == 1 and not v["moe_router_pre_softmax"]:
            raise ConfigError(
                "num_experts_per_tok is 1 and weights are normalised: each expert has the weight 1, which Megatron-Core's softmax"
                " router refuses; set norm_topk_prob to false"
            )

    def check_plan(self, v, plan: ParallelPlan) -> None:
        """Raise PlanError where a plan cannot deal out or cut the experts."""
        count, width = v["num_moe_experts"], v["moe_ffn_hidden_size"]
        if count % plan.ep:
            raise PlanError(f"plan {plan}: {count} experts do not divide by ep {plan.ep} (experts % ep = {count % plan.ep})")
        if width % plan.expert_tp:
            raise PlanError(f"plan {plan}: expert width {width} does not divide by etp {plan.expert_tp} (etp is tp where unset)")
        if plan.tp > 1 and not plan.sp:
            raise PlanError(
                f"plan {plan}: Megatron-Core trains experts under tensor parallelism with sequence parallelism only; add sp"
            )

    def tensors(self, at: Site) -> Iterator[Tensor]:
        """router [E, H] replicated; of every expert fc1 [2F, H] and fc2 [H, F], cut like an MLP's over its own ranks."""
        v, count = at.v, at.v["num_moe_experts"]
        yield at.same("moe.router", f"{self.prefix}.{self.router}", "weight", count, v["hidden_size"])
        for index in range(count):
            inside = at.inside(f"{self.prefix}.{self.experts.format(e=index)}", Expert(index, count))
            yield from self.expert.of_width(inside, "expert", v["moe_ffn_hidden_size"])

    def width(self, v) -> str:
        """Its size as tables print it."""
        return f"{v['num_moe_experts']} x {v['moe_ffn_hidden_size']}, {v['moe_router_topk']} a token"

    def flops(self, v) -> int:
        """One token through the router and its top-k experts."""
        return 2 * v["hidden_size"] * v["num_moe_experts"] + v["moe_router_topk"] * self.expert.flops(v, v["moe_ffn_hidden_size"])
