"""The state-space and delta-rule kernels that megatron-core imports, as plain recurrences in torch.

Differentiable, one Python step per token: fit for tiny models. Half types are computed in fp32, fp64 stays.
Legend: b batch, s sequence, h heads, p head dim, g groups, n state size, c channels, w kernel width, k key dim, v value dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .te_modules import wide


def _refuse(where: str, **given: Any) -> None:
    for name, value in given.items():
        if value is not None and value is not False:
            raise NotImplementedError(f"{where}: {name} is not part of the stand-in; use the real package, on a GPU")


# ---------------------------------------------------------------------------------------------- causal convolution
def _conv(x_bcs: torch.Tensor, weight_cw: torch.Tensor, bias_c: Any, activation: str | None, sequence_bs: Any) -> torch.Tensor:
    """Causal depthwise convolution; ``sequence_bs`` numbers packed sequences, which must not see each other."""
    s, w = x_bcs.shape[-1], weight_cw.shape[-1]
    if sequence_bs is None:
        y = F.conv1d(x_bcs, weight_cw.unsqueeze(1), bias_c, padding=w - 1, groups=x_bcs.shape[1])[..., :s]
    else:
        y = torch.zeros_like(x_bcs)
        for back in range(w):
            earlier = F.pad(x_bcs, (back, 0))[..., :s]
            same = F.pad(sequence_bs, (back, 0), value=-1)[..., :s] == sequence_bs
            y = y + earlier * same.unsqueeze(1) * weight_cw[:, w - 1 - back].view(1, -1, 1)
        y = y if bias_c is None else y + bias_c.view(1, -1, 1)
    return F.silu(y) if activation in ("silu", "swish") else y


def causal_conv1d_fn(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, final_states_out=None, activation=None
):
    """``causal_conv1d.causal_conv1d_fn``: x ``[b, c, s]``, weight ``[c, w]`` to ``[b, c, s]``."""
    _refuse("causal_conv1d_fn", initial_states=initial_states, return_final_states=return_final_states)
    return _conv(x, weight, bias, activation, seq_idx)


def fla_conv1d(
    x, weight, bias=None, residual=None, initial_state=None, output_final_state=False, activation=None, cu_seqlens=None, **kwargs
):
    """``fla.modules.convolution.causal_conv1d``: x ``[b, s, c]``, weight ``[c, w]`` to (``[b, s, c]``, None)."""
    _refuse("fla causal_conv1d", initial_state=initial_state, output_final_state=output_final_state, residual=residual)
    sequence = None
    if cu_seqlens is not None:
        token = torch.arange(x.shape[1], device=x.device)
        sequence = torch.bucketize(token, cu_seqlens[1:].long(), right=True)[None]
    return _conv(x.transpose(1, 2), weight, bias, activation, sequence).transpose(1, 2), None


# ---------------------------------------------------------------------------------------------- Mamba-2
def ssd(
    x_bshp, dt_bsh, A_h, B_bsgn, C_bsgn, *, D=None, z_bshp=None, dt_bias=None, dt_softplus=False,
    dt_limit=(0.0, float("inf")), seq_idx=None,
):  # fmt: skip
    """Mamba-2's state-space recurrence: returns y ``[b, s, h, p]`` and the last state ``[b, h, p, n]``.

    ``state = state * exp(dt A) + (x dt) B``, ``y = state C + D x``, gated by ``silu(z)`` where z is given.
    """
    b, s, h, p = x_bshp.shape
    x = wide(x_bshp)
    dt = wide(dt_bsh) if dt_bias is None else wide(dt_bsh) + dt_bias
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    B, C = (wide(t).repeat_interleave(h // t.shape[2], 2) for t in (B_bsgn, C_bsgn))
    decay, state, ys = torch.exp(dt * A_h), x.new_zeros(b, h, p, B.shape[-1]), []
    for t in range(s):
        if seq_idx is not None and t:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1]).view(b, 1, 1, 1)
        new = torch.einsum("bhp,bhn->bhpn", x[:, t] * dt[:, t, :, None], B[:, t])
        state = state * decay[:, t, :, None, None] + new
        ys.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]))
    y = torch.stack(ys, 1)
    if D is not None:
        y = y + x * wide(D).view(1, 1, h, -1)
    return (y if z_bshp is None else y * F.silu(wide(z_bshp))).to(x_bshp.dtype), state


def mamba_chunk_scan_combined(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None,
    dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False, return_varlen_states=False, state_dtype=None,
):  # fmt: skip
    """``mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined``; the chunk size does not change the result."""
    unknown = {"initial_states": initial_states, "cu_seqlens": cu_seqlens, "return_varlen_states": return_varlen_states}
    _refuse("mamba_chunk_scan_combined", **unknown)
    options = {"dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit, "seq_idx": seq_idx}
    y, state = ssd(x, dt, A, B, C, D=D, z_bshp=z, **options)
    return (y, state) if return_final_states else y


def mamba_split_conv1d_scan_combined(
    zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, initial_states=None, seq_idx=None,
    dt_limit=(0.0, float("inf")), return_final_states=False, activation="silu", rmsnorm_weight=None, rmsnorm_eps=1e-6,
    outproj_weight=None, outproj_bias=None, headdim=None, ngroups=1, norm_before_gate=True, state_dtype=None,
):  # fmt: skip
    """``mamba_ssm``'s fused block: zxbcdt ``[b, s, 2*h*p + 2*g*n + h]`` to ``[b, s, h*p]``."""
    name, refused = "mamba_split_conv1d_scan_combined", {"rmsnorm_weight": rmsnorm_weight, "outproj_weight": outproj_weight}
    _refuse(name, initial_states=initial_states, return_final_states=return_final_states, **refused)
    b, s, width = zxbcdt.shape
    h = A.shape[0]
    p = headdim or D.shape[-1]
    inner = h * p
    gn = (width - 2 * inner - h) // 2
    z, xbc, dt = torch.split(zxbcdt, [inner, inner + 2 * gn, h], -1)
    xbc = _conv(xbc.transpose(1, 2), conv1d_weight, conv1d_bias, activation, seq_idx).transpose(1, 2)
    x, B, C = torch.split(xbc, [inner, gn, gn], -1)
    x, z, B, C = x.reshape(b, s, h, p), z.reshape(b, s, h, p), B.reshape(b, s, ngroups, -1), C.reshape(b, s, ngroups, -1)
    options = {"dt_bias": dt_bias, "dt_softplus": True, "dt_limit": dt_limit, "seq_idx": seq_idx}
    return ssd(x, dt, A, B, C, D=D, z_bshp=z, **options)[0].reshape(b, s, inner)


class RMSNormGated(torch.nn.Module):
    """``mamba_ssm``'s RMSNorm over groups of channels, gated by ``silu(z)`` before or after."""

    def __init__(self, hidden_size, eps=1e-5, group_size=None, norm_before_gate=True, device=None, dtype=None):
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size or hidden_size, norm_before_gate
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.bias = None

    def forward(self, x: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
        y = wide(x)
        if z is not None and not self.norm_before_gate:
            y = y * F.silu(wide(z))
        groups = y.unflatten(-1, (-1, self.group_size))
        y = (groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + self.eps)).flatten(-2) * wide(self.weight)
        if z is not None and self.norm_before_gate:
            y = y * F.silu(wide(z))
        return y.to(x.dtype)


# ---------------------------------------------------------------------------------------------- gated delta rule
def l2norm(x, eps=1e-6, output_dtype=None):
    """``fla.modules.l2norm.l2norm`` over the last dim."""
    return (wide(x) * torch.rsqrt(wide(x).pow(2).sum(-1, keepdim=True) + eps)).to(output_dtype or x.dtype)


def chunk_gated_delta_rule(
    q,
    k,
    v,
    g,
    beta,
    scale=None,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    cu_seqlens=None,
    **kwargs,
):
    """``fla.ops.gated_delta_rule.chunk_gated_delta_rule``: q, k ``[b, s, h, k]``, v ``[b, s, h, v]``, g (log) and beta
    ``[b, s, h]`` to (``[b, s, h, v]``, last state ``[b, h, k, v]`` or None).

    ``state = state * exp(g)``, then ``state += k (beta (v - state k))``, ``out = state q``; states start anew at cu_seqlens.
    """
    if cu_seqlens is not None:
        _refuse("chunk_gated_delta_rule with cu_seqlens", initial_state=initial_state, output_final_state=output_final_state)
    dtype = v.dtype
    q, k, v, g, beta = (wide(t) for t in (q, k, v, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q), l2norm(k)
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    b, s, h, key_dim = q.shape
    state = q.new_zeros(b, h, key_dim, v.shape[-1]) if initial_state is None else wide(initial_state)
    starts, outs = set() if cu_seqlens is None else set(cu_seqlens.tolist()), []
    for t in range(s):
        if t in starts:
            state = torch.zeros_like(state)
        state = state * g[:, t].exp()[..., None, None]
        update = (v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])) * beta[:, t, :, None]
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], update)
        outs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outs, 1).to(dtype), state if output_final_state else None
