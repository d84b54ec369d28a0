"""A pure-torch stand-in of Transformer Engine's `DotProductAttention`: windows, sinks, context parallel, softcap, packing.

Legend: s sequence, b batch, h query heads, g key/value groups, d head dim (keys), e head dim (values), t packed tokens.
Order of operations as in TE's unfused path: scale, softcap, bias, mask, sink, softmax, dropout, values.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .te_modules import TransformerEngineBaseModule, wide


def eager_attention(
    q_sbhd: torch.Tensor, k_sbgd: torch.Tensor, v_sbge: torch.Tensor, *, scale: float, allowed: torch.Tensor,
    softcap: float = 0.0, sink_h: torch.Tensor | None = None, bias: torch.Tensor | None = None, dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Attention written out: returns the context ``[s, b, h*e]`` and the largest score per head ``[h]``.

    ``allowed``: bool, broadcastable to ``[b, h, sq, sk]``, True where a query may look; a query that may look nowhere gets 0.
    ``sink_h``: one extra logit per head that takes its share of the softmax and gives nothing.
    Scores keep q's type, the softmax is made in fp32 for half types (fp64 in fp64), its result rounded to q's type.
    """
    sq, b, h, _ = q_sbhd.shape
    g = k_sbgd.shape[2]
    if h % g:
        raise ValueError(f"{h} query heads cannot share {g} key/value groups: the first must be a multiple of the second")
    if h != g:
        k_sbgd, v_sbge = (t.repeat_interleave(h // g, 2) for t in (k_sbgd, v_sbge))
    scores = torch.einsum("qbhd,kbhd->bhqk", q_sbhd, k_sbgd) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = (scores + bias).to(q_sbhd.dtype)
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    probs = _softmax(scores, sink_h).to(q_sbhd.dtype).masked_fill(~allowed, 0)
    context = torch.einsum("bhqk,kbhd->qbhd", F.dropout(probs, dropout) if dropout else probs, v_sbge)
    return context.reshape(sq, b, -1), scores.detach().amax((0, 2, 3))


def _softmax(scores_bhqk: torch.Tensor, sink_h: torch.Tensor | None) -> torch.Tensor:
    if sink_h is None:
        return torch.softmax(wide(scores_bhqk), -1)
    b, _, sq, _ = scores_bhqk.shape
    sink = sink_h.to(scores_bhqk.dtype).view(1, -1, 1, 1).expand(b, -1, sq, 1)
    return torch.softmax(wide(torch.cat([scores_bhqk, sink], -1)), -1)[..., :-1]


# ---------------------------------------------------------------------------------------------- who may look where
@dataclass(frozen=True)
class Tokens:
    """Where each token stands: its place in its sequence, which sequence, and whether it is one (not padding)."""

    place: torch.Tensor
    sequence: torch.Tensor
    real: torch.Tensor
    lengths: torch.Tensor  # of each sequence


def one_sequence(place: torch.Tensor, length: int) -> Tokens:
    """Tokens of unpacked input: all of one sequence of ``length``."""
    zeros = torch.zeros_like(place)
    return Tokens(place, zeros, torch.ones_like(place, dtype=torch.bool), torch.tensor([length], device=place.device))


def packed_sequences(count: int, cu_seqlens: torch.Tensor, cu_seqlens_padded: torch.Tensor | None, device: Any) -> Tokens:
    """Tokens of packed input ("thd"): ``cu_seqlens [n+1]`` counts real tokens, ``cu_seqlens_padded`` where sequences start."""
    starts = (cu_seqlens if cu_seqlens_padded is None else cu_seqlens_padded).to(device).long()
    lengths = cu_seqlens.to(device).long().diff()
    token = torch.arange(count, device=device)
    sequence = torch.bucketize(token, starts[1:], right=True)
    known = sequence.clamp(max=len(lengths) - 1)  # rows past the last sequence are padding too
    place = token - starts[known]
    return Tokens(place, sequence, (sequence < len(lengths)) & (place < lengths[known]), lengths)


def visible(q: Tokens, k: Tokens, *, causal: bool, bottom_right: bool, window: tuple[int, int]) -> torch.Tensor:
    """bool ``[sq, sk]``: same sequence, not padding, not ahead if causal, within ``window = (left, right)`` (-1: no bound).

    ``(w, 0)`` lets token i see i-w .. i, that is w+1 tokens, as in TE and flash-attention; HF's ``sliding_window`` counts the
    token itself. ``bottom_right`` aligns the last query with the last key where the two lengths differ.
    """
    at = q.place
    if bottom_right:
        at = at + (k.lengths - q.lengths)[q.sequence.clamp(max=len(q.lengths) - 1)]
    ahead = k.place[None] - at[:, None]
    allowed = (q.sequence[:, None] == k.sequence[None]) & q.real[:, None] & k.real[None]
    left, right = window
    if causal:
        right = 0
    if left >= 0:
        allowed = allowed & (ahead >= -left)
    if right >= 0:
        allowed = allowed & (ahead <= right)
    return allowed


def checked_window(kind: str, window: tuple[int, int] | None) -> tuple[int, int]:
    """The window as TE would set it for this mask kind; ValueError for one that TE refuses."""
    left, right = (-1, -1) if window is None else window
    if "causal" in kind:
        if left < 0 and right not in (-1, 0):
            raise ValueError(f"window_size {window} with mask {kind!r}: use (-1, 0) or (n, 0) with n >= 0")
        return left, 0
    if window == (-1, 0):
        return -1, -1
    if (left, right) != (-1, -1) and min(left, right) < 0:
        raise ValueError(f"window_size {window} with mask {kind!r}: use (-1, -1) or (n, m) with n, m >= 0")
    return left, right


# ---------------------------------------------------------------------------------------------- context parallel
def cp_positions(local: int, size: int, rank: int, device: Any = None) -> torch.Tensor:
    """Global positions ``[local]`` of a rank's tokens under megatron's balanced split: chunk r and its mirror image."""
    if size == 1:
        return torch.arange(local, device=device)
    half = local // 2
    chunk = torch.arange(half, device=device)
    return torch.cat([chunk + rank * half, chunk + (2 * size - 1 - rank) * half])


class _AllGatherSequence(torch.autograd.Function):
    """All-gather along dim 0; its backward is a reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        out = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
        torch.distributed.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        out = grad.new_empty(grad.shape[0] // ctx.group.size(), *grad.shape[1:])
        torch.distributed.reduce_scatter_tensor(out, grad.contiguous(), group=ctx.group)
        return out, None


# ---------------------------------------------------------------------------------------------- the module
class DotProductAttention(TransformerEngineBaseModule):
    """``transformer_engine.pytorch.DotProductAttention``.

    ``forward``: q ``[s, b, h, d]``, k ``[s, b, g, d]``, v ``[s, b, g, e]`` ("sbhd"; also "bshd", and "thd" for packed
    sequences ``[t, h, d]`` with ``cu_seqlens_*``) to ``[s, b, h*e]``; with ``return_max_logit`` also ``[h]``. Under context
    parallelism keys and values are all-gathered, whatever ``cp_comm_type`` says: the result is the same.
    Raises NotImplementedError for what it would otherwise get wrong in silence.
    """

    def __init__(
        self, num_attention_heads, kv_channels, num_gqa_groups=None, attention_dropout=0.0, qkv_format="sbhd",
        attn_mask_type="causal", window_size=None, softcap=0.0, sequence_parallel=False, tp_size=1,
        get_rng_state_tracker=None, tp_group=None, layer_number=None, attention_type="self", cp_group=None,
        cp_global_ranks=None, cp_stream=None, cp_comm_type="p2p", softmax_scale=None, softmax_type="vanilla",
        return_max_logit=False, **kwargs,
    ) -> None:  # fmt: skip
        super().__init__()
        self._join(tp_group, tp_size)
        self.num_attention_heads, self.qkv_format, self.attn_mask_type = num_attention_heads, qkv_format, attn_mask_type
        d = kv_channels[0] if isinstance(kv_channels, tuple) else kv_channels
        self.softmax_scale = 1 / math.sqrt(d) if softmax_scale is None else softmax_scale
        self.window_size, self.softcap, self.softmax_type = window_size, softcap, softmax_type
        self.attention_dropout, self.return_max_logit = attention_dropout, return_max_logit
        self.cp_comm_type = cp_comm_type
        self.set_context_parallel_group(cp_group, cp_global_ranks, cp_stream, cp_comm_type)
        # as TE: under sequence parallel the default generator already differs between ranks
        self._tracker = None if sequence_parallel else get_rng_state_tracker
        self._make_sink(num_attention_heads // self.tp_size)
        self.register_load_state_dict_post_hook(_forgive_missing_extra_state)

    def _make_sink(self, heads: int) -> None:
        # fp32 whatever the model's type, as TE makes it; it follows only a later cast of the whole model
        if self.softmax_type == "vanilla":
            self.softmax_offset = None
        elif self.softmax_type == "off-by-one":
            self.softmax_offset = torch.zeros(heads, device="cuda")
        elif self.softmax_type == "learnable":
            self.softmax_offset = torch.nn.Parameter(torch.zeros(heads, device="cuda"))
        else:
            raise ValueError(f"softmax_type {self.softmax_type!r}: use 'vanilla', 'off-by-one' or 'learnable'")

    def set_context_parallel_group(self, group: Any, ranks: Any, stream: Any, comm: str = "p2p") -> None:
        if isinstance(group, list):
            raise NotImplementedError("hierarchical context parallelism (cp_comm_type 'a2a+p2p'): use 'p2p' or 'all_gather'")
        self.cp_group = group

    def forward(
        self, q, k, v, attention_mask=None, qkv_format=None, cu_seqlens_q=None, cu_seqlens_kv=None,
        cu_seqlens_q_padded=None, cu_seqlens_kv_padded=None, max_seqlen_q=None, max_seqlen_kv=None, attn_mask_type=None,
        window_size=None, bottom_right_diagonal=None, softcap=None, checkpoint_core_attention=False,
        core_attention_bias_type="no_bias", core_attention_bias=None, **kwargs,
    ) -> Any:  # fmt: skip
        layout = qkv_format or self.qkv_format
        kind = (attn_mask_type or self.attn_mask_type).replace(",", "_")
        _refuse(kwargs, core_attention_bias_type)
        q, k, v = _to_sbhd(layout, q, k, v)
        packing = (cu_seqlens_q, cu_seqlens_kv, cu_seqlens_q_padded, cu_seqlens_kv_padded) if layout == "thd" else None
        cp = self._cp_size()
        if cp > 1:
            _refuse_under_cp(packing, attention_mask if kind == "arbitrary" else None, core_attention_bias, kind)
        q_at, k_at = self._tokens(q, k, packing, cp)
        if cp > 1:
            k, v = (_AllGatherSequence.apply(t, self.cp_group) for t in (k, v))
        bottom_right = kind not in ("causal", "padding_causal") and bottom_right_diagonal is not False
        window = checked_window(kind, window_size or self.window_size)
        allowed = visible(q_at, k_at, causal="causal" in kind, bottom_right=bottom_right, window=window)[None, None]
        if packing is None:
            allowed = _with_mask(allowed, attention_mask, kind)
        context, max_logit = self._attend(q, k, v, allowed, self.softcap if softcap is None else softcap, core_attention_bias)
        context = context.squeeze(1) if layout == "thd" else context.transpose(0, 1) if layout == "bshd" else context
        return (context, max_logit) if self.return_max_logit else context

    def _attend(self, q: Any, k: Any, v: Any, allowed: torch.Tensor, softcap: float, bias: Any) -> tuple:
        dropout = self.attention_dropout if self.training else 0.0
        with self._tracker().fork() if dropout and self._tracker else nullcontext():
            return eager_attention(
                q, k, v, scale=self.softmax_scale, allowed=allowed, softcap=softcap, sink_h=self.softmax_offset, bias=bias,
                dropout=dropout,
            )  # fmt: skip

    def _cp_size(self) -> int:
        return 1 if self.cp_group is None else self.cp_group.size()

    def _tokens(self, q: torch.Tensor, k: torch.Tensor, packing: tuple | None, cp: int) -> tuple[Tokens, Tokens]:
        (sq, sk), device = (q.shape[0], k.shape[0]), q.device
        if packing is not None:
            cu_q, cu_kv, cu_q_padded, cu_kv_padded = packing
            return packed_sequences(sq, cu_q, cu_q_padded, device), packed_sequences(sk, cu_kv, cu_kv_padded, device)
        rank = 0 if cp == 1 else self.cp_group.rank()
        keys = torch.cat([cp_positions(sk, cp, r, device) for r in range(cp)])
        return one_sequence(cp_positions(sq, cp, rank, device), sq * cp), one_sequence(keys, sk * cp)


def _forgive_missing_extra_state(module: torch.nn.Module, incompatible: Any) -> None:
    """As TE does: checkpoints written before attention had an extra state still load."""
    incompatible.missing_keys[:] = [k for k in incompatible.missing_keys if "core_attention._extra_state" not in k]


def _to_sbhd(layout: str, *tensors: torch.Tensor) -> list[torch.Tensor]:
    if layout not in ("sbhd", "bshd", "thd"):
        raise ValueError(f"qkv_format {layout!r}: use 'sbhd', 'bshd' or 'thd'")
    if layout == "sbhd":
        return list(tensors)
    return [t.transpose(0, 1) if layout == "bshd" else t.unsqueeze(1) for t in tensors]


def _with_mask(allowed: torch.Tensor, mask: Any, kind: str) -> torch.Tensor:
    """Apply the caller's mask (True hides), where this mask kind has one; "causal" and "no_mask" ignore it, as TE does."""
    if kind != "arbitrary" and "padding" not in kind:
        return allowed
    if mask is None:
        raise ValueError(f"attention mask kind {kind!r} needs an attention_mask (or packed sequences, qkv_format 'thd')")
    if kind == "arbitrary":
        return allowed & ~mask
    if kind != "padding" and allowed.shape[-2] != allowed.shape[-1]:
        raise NotImplementedError(f"mask kind {kind!r} with queries and keys of different length: pack them (qkv_format 'thd')")
    for_q, for_k = mask if isinstance(mask, tuple) else (mask, mask)
    if for_k.shape[-2] != 1:
        raise ValueError(f"a padding mask has shape [b, 1, 1, s], got {tuple(for_k.shape)}; use mask kind 'arbitrary' for others")
    return allowed & ~for_k & ~for_q.transpose(-1, -2)


def _refuse(kwargs: dict, bias_type: str) -> None:
    if bias_type not in ("no_bias", "post_scale_bias"):
        raise NotImplementedError(f"core_attention_bias_type {bias_type!r}: the stand-in knows 'post_scale_bias' alone")
    for name in ("inference_params", "score_mod", "alibi_slopes"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{name} is not part of the transformer_engine stand-in: use the real one, on a GPU")


def _refuse_under_cp(packing: Any, mask: Any, bias: Any, kind: str) -> None:
    found = {"packed sequences": packing, "an arbitrary mask": mask, "an attention bias": bias}
    found["a padding mask"] = kind if "padding" in kind else None
    for what, value in found.items():
        if value is not None:
            raise NotImplementedError(f"{what} with context parallelism: not part of the stand-in, use context_parallel_size 1")
