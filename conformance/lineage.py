"""Lineage: which Hugging Face element each Megatron element is, read from a coded import at any plan.

Pieces of different ranks are put together by megatron-core's own sharded state dict (keys and offsets), not by any bridge's opinion of
how tensors are cut.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def pieces(chunks: list) -> list[tuple[str, tuple[int, ...], tuple[int, ...], Any]]:
    """*rank*: (key, global shape, global offset, int64 numbers) of every weight piece that this rank holds, prepended axes included."""
    from megatron.core import parallel_state as ps
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    group = ps.get_data_parallel_group(with_context_parallel=True)
    out = []
    for chunk in chunks:
        model = chunk.module if hasattr(chunk, "module") else chunk
        state = model.sharded_state_dict(metadata={"dp_cp_group": group, "singleton_local_shards": False})
        apply_factories(state)
        for item in nested_values(state):
            if isinstance(item, ShardedTensor) and item.data is not None and item.data.is_floating_point():
                shape = (1,) * item.prepend_axis_num + tuple(item.local_shape)
                numbers = item.data.detach().cpu().double().numpy().astype(np.int64).reshape(shape)
                out.append((item.key, tuple(item.global_shape), tuple(item.global_offset), numbers))
    return out


def assemble(ranks: list[list]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Put all ranks' pieces together: {key: numbers [global shape]} and sentences about pieces that contradict or leave holes."""
    whole: dict[str, np.ndarray] = {}
    problems: list[str] = []
    for rank, held in enumerate(ranks):
        for key, shape, offset, numbers in held:
            target = whole.setdefault(key, np.full(shape, -1, dtype=np.int64))
            window = target[tuple(slice(o, o + n) for o, n in zip(offset, numbers.shape, strict=True))]
            if ((window != -1) & (window != numbers)).any():
                problems.append(f"rank {rank} disagrees with another on {key} at offset {list(offset)}")
            window[...] = numbers
    problems += [
        f"{key} has {int((numbers == -1).sum())} elements that no rank holds"
        for key, numbers in whole.items()
        if (numbers == -1).any()
    ]
    return whole, problems
