"""DeepEP's buffer over ``all_to_all``, so that megatron's "flex" token dispatcher runs on any backend."""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.distributed as dist


class Finished:
    """``deep_ep.utils.EventHandle`` and ``EventOverlap``: everything has happened when the call returns."""

    def __init__(self, *args: Any) -> None:
        pass

    def current_stream_wait(self) -> None:
        pass


class Buffer:
    """``deep_ep.Buffer``: a token goes once to every rank that holds one of its experts, and comes back summed."""

    num_nvl_bytes = num_rdma_bytes = 1 << 60  # never too small: megatron compares, and makes a new buffer if it is

    def __init__(self, group: Any, *args: Any, **kwargs: Any) -> None:
        self.group = group
        self.num_experts = 0

    @staticmethod
    def get_dispatch_config(ranks: int) -> types.SimpleNamespace:
        return types.SimpleNamespace(get_nvl_buffer_size_hint=lambda *a: 0, get_rdma_buffer_size_hint=lambda *a: 0)

    get_combine_config = get_dispatch_config

    @staticmethod
    def set_num_sms(count: int) -> None:
        pass

    def get_dispatch_layout(self, topk_idx: torch.Tensor, num_experts: int, **kwargs: Any) -> tuple:
        """Counts are not needed here; DeepEP's caller gives the number of experts in this call only, so keep it."""
        self.num_experts = num_experts
        return None, None, None, None, None

    def dispatch(self, x, handle=None, topk_idx=None, topk_weights=None, **kwargs):
        """Send tokens ``[t, h]`` to their experts' ranks; ``topk_idx``, ``topk_weights`` ``[t, k]`` (-1: no expert).

        Returns received tokens, their local expert numbers (-1: not here), weights, tokens per local expert, handle, event.
        With a ``handle`` (backward of combine) only the tokens travel, along the same routes.
        """
        if handle is not None:
            send, received, _ = handle
            return self._exchange([x[i] for i in send], received), None, None, None, None, Finished()
        local = self.num_experts // self.group.size()
        owner = torch.where(topk_idx >= 0, topk_idx // local, -1)
        send = [(owner == rank).any(1).nonzero().flatten() for rank in range(self.group.size())]
        received = self._counts_from_peers([len(rows) for rows in send], x.device)
        numbers = [torch.where(owner[i] == rank, topk_idx[i] - rank * local, -1) for rank, i in enumerate(send)]
        weights = [torch.where(owner[i] == rank, topk_weights[i], 0.0) for rank, i in enumerate(send)]
        tokens, numbers, weights = (self._exchange(p, received) for p in ([x[i] for i in send], numbers, weights))
        per_expert = [int((numbers == expert).sum()) for expert in range(local)]
        return tokens, numbers, weights, per_expert, (send, received, x.shape[0]), Finished()

    def combine(self, x, handle, topk_weights=None, **kwargs):
        """Send ``[received, h]`` back and sum per token; returns ``[t, h]``, the weights likewise (or None), event."""
        weights = None if topk_weights is None else self._return(topk_weights, handle)
        return self._return(x, handle), weights, Finished()

    def _counts_from_peers(self, mine: list[int], device: Any) -> list[int]:
        ours = torch.tensor(mine, device=device)
        theirs = torch.empty_like(ours)
        dist.all_to_all_single(theirs, ours, group=self.group)
        return theirs.tolist()

    def _exchange(self, parts: list[torch.Tensor], received: list[int]) -> torch.Tensor:
        out = parts[0].new_empty(sum(received), *parts[0].shape[1:])
        sizes = [len(part) for part in parts]
        dist.all_to_all_single(out, torch.cat(parts).contiguous(), received, sizes, group=self.group)
        return out

    def _return(self, x: torch.Tensor, handle: tuple) -> torch.Tensor:
        send, received, count = handle
        got = self._exchange(list(torch.split(x, received)), [len(rows) for rows in send])
        return x.new_zeros(count, *x.shape[1:]).index_add_(0, torch.cat(send), got)
