"""Word embedding and output head: vocabulary-parallel, padded with zero rows to a multiple every rank can share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..relations import COLUMN, Tensor, padded
from .base import Site


@dataclass(frozen=True)
class Embedding:
    """Word embedding [V, H]."""

    module: str = "model.embed_tokens"

    def tensors(self, at: Site, padded_vocab: int) -> Iterator[Tensor]:
        """embedding.word_embeddings.weight [V padded, H]."""
        source = at.source(self.module, "weight", at.v["vocab_size"], at.v["hidden_size"])
        yield at.joined("embedding", "weight", (source,), padded(at.v["vocab_size"], padded_vocab), COLUMN)


@dataclass(frozen=True)
class Head:
    """Output head [V, H]. Tied to the embedding, it exists only as a second copy on a last pipeline stage of its own."""

    module: str = "lm_head"

    def tensors(self, at: Site, padded_vocab: int, embedding: Embedding) -> Iterator[Tensor]:
        """output_layer.weight [V padded, H]; an alias of the embedding's source where heads are tied."""
        tied = at.v["share_embeddings_and_output_weights"]
        source = at.source(embedding.module if tied else self.module, "weight", at.v["vocab_size"], at.v["hidden_size"])
        yield at.joined("head", "weight", (source,), padded(at.v["vocab_size"], padded_vocab), COLUMN, alias=tied)

    def flops(self, v) -> int:
        """Logits of one token."""
        return 2 * v["hidden_size"] * v["vocab_size"]
