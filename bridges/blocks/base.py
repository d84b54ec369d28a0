"""What blocks share: where they stand, and the shapes of common tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..names import parameter
from ..relations import REPLICATED, Shard, Source, Tensor, identity


@dataclass(frozen=True)
class Site:
    """Where a block stands: the settings, the HF prefix, the layer spec and the global layer number (None: outside layers)."""

    v: Mapping[str, Any]
    hf: str
    spec: str
    layer: int | None = None

    def source(self, module: str, part: str, *shape: int) -> Source:
        """The HF tensor ``prefix.module.part``."""
        return Source(".".join(filter(None, (self.hf, module, part))), shape)

    def same(self, role: str, module: str, part: str, *shape: int, shard: Shard = REPLICATED) -> Tensor:
        """A Megatron tensor with the rows of one HF tensor, unchanged."""
        return self.joined(role, part, (self.source(module, part, *shape),), identity(shape[0]), shard)

    def joined(self, role: str, part: str, sources: tuple[Source, ...], rows, shard: Shard, **extra) -> Tensor:
        """A Megatron tensor whose rows index into several HF tensors."""
        shape = (len(rows), *sources[0].shape[1:])
        return Tensor(parameter(role, part, self.spec, self.layer), shape, sources, rows, shard, **extra)
