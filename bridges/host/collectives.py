"""What gloo lacks and megatron-core asks of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist


class _Finished:
    """The work handle of a collective that has already run."""

    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def fill_gloo_gaps() -> None:
    """Replace three functions of ``torch.distributed`` by ones that also do what NCCL does. Later calls change nothing.

    * ``all_to_all_single`` takes its split sizes as tensors: megatron's alltoall dispatcher converts them only ``if is_cuda``;
    * ``all_gather`` and ``reduce_scatter`` take pieces of unequal length (dim 0): expert tensor parallelism needs them.
    """
    if hasattr(dist.all_to_all_single, "_shardproof"):
        return
    dist.all_to_all_single = _ours(_sizes_from_tensors(dist.all_to_all_single))
    dist.all_gather = _ours(_uneven_all_gather(dist.all_gather))
    dist.reduce_scatter = _ours(_uneven_reduce_scatter(dist.reduce_scatter))


def _ours(function: Callable) -> Callable:
    function._shardproof = True
    return function


def _sizes_from_tensors(real: Callable) -> Callable:
    def sizes(x: Any) -> Any:
        return x.tolist() if hasattr(x, "tolist") else x

    @wraps(real)
    def all_to_all_single(output, input, output_split_sizes=None, input_split_sizes=None, group=None, async_op=False):
        return real(output, input, sizes(output_split_sizes), sizes(input_split_sizes), group=group, async_op=async_op)

    return all_to_all_single


def _uneven_all_gather(real: Callable) -> Callable:
    @wraps(real)
    def all_gather(tensor_list, tensor, group=None, async_op=False):
        if len({t.shape for t in tensor_list}) == 1:
            return real(tensor_list, tensor, group=group, async_op=async_op)
        longest = max(t.shape[0] for t in tensor_list)
        padded = tensor.new_zeros(longest, *tensor.shape[1:])
        padded[: tensor.shape[0]] = tensor
        buffers = [torch.empty_like(padded) for _ in tensor_list]
        real(buffers, padded, group=group)
        for piece, buffer in zip(tensor_list, buffers, strict=True):
            piece.copy_(buffer[: piece.shape[0]])
        return _Finished() if async_op else None

    return all_gather


def _uneven_reduce_scatter(real: Callable) -> Callable:
    @wraps(real)
    def reduce_scatter(output, input_list, op=dist.ReduceOp.SUM, group=None, async_op=False):
        if len({t.shape for t in input_list}) == 1:
            return real(output, input_list, op=op, group=group, async_op=async_op)
        whole = torch.cat(list(input_list))
        dist.all_reduce(whole, op=op, group=group)
        output.copy_(whole.split([t.shape[0] for t in input_list])[dist.get_rank(group)])
        return _Finished() if async_op else None

    return reduce_scatter
