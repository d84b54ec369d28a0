"""*rank*: passes through megatron-core's own schedule, with its own finalisation of gradients; whole logits out of all ranks' pieces."""

from __future__ import annotations

import functools

from . import prediction


def run_schedule(chunks: list, vocab: int, *, forward_only: bool = False, batch=None):
    """Forward (and backward, with gradient finalisation) through megatron-core's own schedule; whole logits on one rank.

    batch: (token ids, probe) in place of `inputs`.
    """
    return (run_heads(chunks, vocab, forward_only=forward_only, batch=batch) or [None])[0]


def run_heads(chunks: list, vocab: int, *, forward_only: bool = False, batch=None) -> list | None:
    """The same; the logits of every prediction depth follow the model's own. None on ranks that do not end the pipeline."""
    import torch
    from megatron.core import parallel_state as ps
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from .measure import inputs

    if not forward_only:
        chunks[0].config.finalize_model_grads_func = finalize_model_grads
    device = torch.device(torch.cuda.current_device())  # a stage may have no parameter to ask
    ids, probe = (tensor.to(device) for tensor in batch or inputs(vocab))
    mine = _local_positions(ids.shape[1])
    micro_batches = 4 if len(chunks) > 1 else 2  # with virtual stages two are all warm-up: the steady state must run too
    size = ids.shape[0] // micro_batches
    tokens = size * ids.shape[1]
    weights = [one.split(size) for one in prediction.probes(probe, prediction.depths_of(chunks))]
    batches = list(zip(ids.split(size), *weights, strict=True))
    positions = torch.arange(ids.shape[1])[mine].expand(size, -1).to(device)

    def loss(probes, logits_BSV):
        found = collect(logits_BSV)
        parts = zip(found, probes, strict=False)  # a model that does not run its prediction layers has fewer logits than probes
        weighed = [(one.float() * _vocab_slice(w[:, mine], one.shape[-1])).sum() for one, w in parts]
        return sum(weighed) / tokens, {"logits": [one.detach() for one in found]}

    def step(iterator, model):
        ids_BS, *probes = next(iterator)
        return model(ids_BS[:, mine], positions, None), functools.partial(loss, probes)

    for chunk in chunks:
        chunk.train()
        if hasattr(chunk, "zero_grad_buffer"):
            chunk.zero_grad_buffer()
    iterators = [iter(batches) for _ in chunks]
    virtual = len(chunks) > 1
    with prediction.heads(chunks) as collect:
        results = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iterators if virtual else iterators[0],
            model=chunks if virtual else chunks[0],
            num_microbatches=micro_batches,
            seq_length=ids.shape[1],
            micro_batch_size=size,
            forward_only=forward_only,
        )
    if not ps.is_pipeline_last_stage():
        return None
    heads = zip(*(r["logits"] for r in results), strict=True)
    return [_whole_logits(torch.cat(parts), ids.shape[1], vocab) for parts in heads]


def _local_positions(seq_len: int):
    """Positions of this context-parallel rank's tokens: chunk r and chunk 2*cp-1-r of 2*cp (megatron's load-balanced order)."""
    from megatron.core import parallel_state as ps

    return zigzag(seq_len, ps.get_context_parallel_world_size(), ps.get_context_parallel_rank())


def zigzag(seq_len: int, cp: int, rank: int):
    """Positions of a context-parallel rank: chunk r and chunk 2*cp-1-r of 2*cp (megatron's load-balanced order)."""
    import torch

    if cp == 1:
        return torch.arange(seq_len)
    chunks = torch.arange(seq_len).chunk(2 * cp)
    return torch.cat([chunks[rank], chunks[2 * cp - 1 - rank]])


def _vocab_slice(probe_BSV, width: int):
    """This tensor-parallel rank's vocabulary columns; padding has weight 0."""
    import torch.nn.functional as F
    from megatron.core import parallel_state as ps

    rank, size = ps.get_tensor_model_parallel_rank(), ps.get_tensor_model_parallel_world_size()
    return F.pad(probe_BSV, (0, width * size - probe_BSV.shape[-1]))[..., rank * width : (rank + 1) * width]


def _whole_logits(local, seq_len: int, vocab: int):
    """[batch, seq, vocab] on tensor- and context-parallel rank 0 of the last stage, else None."""
    import torch
    from megatron.core import parallel_state as ps

    tp, cp = ps.get_tensor_model_parallel_group(), ps.get_context_parallel_group()
    local = local.contiguous()
    columns = [torch.empty_like(local) for _ in range(tp.size())]
    torch.distributed.all_gather(columns, local, group=tp)
    rows = torch.cat(columns, -1)[..., :vocab].contiguous()
    parts = [torch.empty_like(rows) for _ in range(cp.size())]
    torch.distributed.all_gather(parts, rows, group=cp)
    whole = torch.empty(rows.shape[0], seq_len, vocab, dtype=rows.dtype, device=rows.device)
    for rank, part in enumerate(parts):
        whole[:, zigzag(seq_len, cp.size(), rank)] = part
    first = tp.rank() == 0 and cp.rank() == 0 and ps.get_data_parallel_rank() == 0
    return whole.cpu() if first else None
