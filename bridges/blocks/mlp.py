"""Dense MLP, gated or not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..relations import COLUMN, ROW, Shard, Tensor, identity
from .base import Site


@dataclass(frozen=True)
class MLP:
    """fc1 then fc2. Gated: fc1 holds gate rows then up rows, and every rank holds its piece of each."""

    prefix: str = "mlp"
    gate: str | None = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"

    def settings(self) -> dict:
        """TransformerConfig fields."""
        return {"gated_linear_unit": self.gate is not None}

    def tensors(self, at: Site) -> Iterator[Tensor]:
        """fc1 [2F or F, H] column-parallel, fc2 [H, F] row-parallel; biases where add_bias_linear says so."""
        hidden, width = at.v["hidden_size"], at.v["ffn_hidden_size"]
        modules = [f"{self.prefix}.{m}" for m in (self.gate, self.up) if m]
        shard = Shard("split", 0, (width,) * len(modules)) if self.gate else COLUMN
        rows = identity(width * len(modules))
        yield at.joined("mlp.fc1", "weight", tuple(at.source(m, "weight", width, hidden) for m in modules), rows, shard)
        yield at.same("mlp.fc2", f"{self.prefix}.{self.down}", "weight", hidden, width, shard=ROW)
        if at.v["add_bias_linear"]:
            yield at.joined("mlp.fc1", "bias", tuple(at.source(m, "bias", width) for m in modules), rows, shard)
            yield at.same("mlp.fc2", f"{self.prefix}.{self.down}", "bias", hidden)

    def flops(self, v) -> int:
        """One token through the layer's MLP."""
        return 2 * v["hidden_size"] * v["ffn_hidden_size"] * (3 if self.gate else 2)
