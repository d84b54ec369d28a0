"""What the stand-ins compute: each against an independent formula, in fp64 where exactness is claimed.

The two-rank parts run in subprocesses: this file, as a script, is one gloo rank.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from shardproof.bridges.host import attention, collectives, deep_ep, recurrences, te_modules

EXACT = {"rtol": 1e-12, "atol": 1e-13}


def rand(*shape: int, dtype=torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed + sum(shape)))


def qkv(s: int = 7, b: int = 2, h: int = 6, g: int = 2, d: int = 4, e: int = 3) -> tuple:
    return rand(s, b, h, d, seed=1), rand(s, b, g, d, seed=2), rand(s, b, g, e, seed=3)


def sdpa(q, k, v, allowed=None, causal=False) -> torch.Tensor:
    """torch's own attention, brought to the stand-in's shapes."""
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=causal, enable_gqa=True)
    return out.permute(2, 0, 1, 3).flatten(2)


def module(h: int = 6, d: int = 4, **options):
    return attention.DotProductAttention(h, d, **options).eval()


# ---------------------------------------------------------------------------------------------- attention
def test_causal_grouped_attention_is_torchs():
    """Law: causal attention with grouped heads and unequal head dims equals torch's, forward and backward."""
    inputs = [t.requires_grad_() for t in qkv()]
    ours, theirs = module()(*inputs), sdpa(*inputs, causal=True)
    torch.testing.assert_close(ours, theirs, **EXACT)
    weight = rand(*ours.shape)
    for a, b in zip(*(torch.autograd.grad((out * weight).sum(), inputs) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("left", [0, 1, 3, 100])
def test_a_window_of_left_zero_sees_left_plus_one_tokens(left):
    """Law: window (left, 0) lets token i see i-left .. i and nothing else. Control: one more or fewer differs."""
    inputs, place = qkv(), torch.arange(7)
    ahead = place[None] - place[:, None]
    ours = module(window_size=(left, 0))(*inputs)
    torch.testing.assert_close(ours, sdpa(*inputs, allowed=(ahead <= 0) & (ahead >= -left)), **EXACT)
    if 0 < left < 6:
        assert not torch.allclose(ours, module(window_size=(left - 1, 0))(*inputs))
        assert not torch.allclose(ours, module(window_size=(left + 1, 0))(*inputs))


def test_a_two_sided_window():
    """Law: without causality a window (2, 1) reaches one token ahead."""
    inputs, place = qkv(), torch.arange(7)
    ahead = place[None] - place[:, None]
    ours = module(attn_mask_type="no_mask", window_size=(2, 1))(*inputs)
    torch.testing.assert_close(ours, sdpa(*inputs, allowed=(ahead >= -2) & (ahead <= 1)), **EXACT)


def test_bottom_right_aligns_the_last_tokens():
    """Law: with fewer queries than keys, bottom-right causality equals the last rows of the full result; top-left does not."""
    q, k, v = qkv()
    whole, last = module()(q, k, v), q[-3:]
    torch.testing.assert_close(module(attn_mask_type="causal_bottom_right")(last, k, v), whole[-3:], **EXACT)
    assert not torch.allclose(module()(last, k, v), whole[-3:])


def test_softcap():
    """Law: softcap 0 changes nothing, a huge one nearly nothing, and a small one is cap*tanh(score/cap)."""
    q, k, v = qkv(g=6)
    plain = module()(q, k, v)
    assert torch.equal(module(softcap=0.0)(q, k, v), plain)
    torch.testing.assert_close(module(softcap=1e5)(q, k, v), plain, rtol=1e-8, atol=1e-8)
    scores = torch.einsum("qbhd,kbhd->bhqk", q, k) / math.sqrt(4)
    scores = (2 * torch.tanh(scores / 2)).masked_fill(torch.ones(7, 7).triu(1).bool(), -math.inf)
    expect = torch.einsum("bhqk,kbhe->qbhe", scores.softmax(-1), v).flatten(2)
    torch.testing.assert_close(module(softcap=2.0)(q, k, v), expect, **EXACT)
    assert torch.equal(module(softcap=2.0)(q, k, v, softcap=0.0), plain)  # an explicit 0 overrides


def test_sinks_take_their_share_and_give_nothing():
    """Law: weights are exp(score) / (sum exp(score) + exp(sink)), per head; a sink of 0 is TE's off-by-one."""
    q, k, v = qkv(s=3, b=1, h=2, g=1)
    sink, allowed = torch.tensor([0.7, -1.5]), torch.ones(3, 3).tril().bool()
    ours, _ = attention.eager_attention(q, k, v, scale=0.5, allowed=allowed, sink_h=sink)
    for head in range(2):
        for i in range(3):
            weights = [math.exp(0.5 * float(q[i, 0, head] @ k[j, 0, 0])) for j in range(i + 1)]
            total = sum(weights) + math.exp(float(sink[head]))
            expect = sum(w * v[j, 0, 0] for j, w in enumerate(weights)) / total
            torch.testing.assert_close(ours[i, 0, 3 * head : 3 * head + 3], expect, **EXACT)


def test_largest_logit():
    """Law: `return_max_logit` gives the largest visible scaled score of each head."""
    q, k, v = qkv()
    scores = torch.einsum("qbhd,kbhd->bhqk", q, k.repeat_interleave(3, 2)) * 0.5
    _, largest = module(return_max_logit=True)(q, k, v)
    expect = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -math.inf).amax((0, 2, 3))
    torch.testing.assert_close(largest, expect, **EXACT)


def test_packed_sequences_do_not_see_each_other():
    """Law: packed sequences, with padding between them, give what each gives alone; padding gives 0."""
    q, k, v = (t.squeeze(1) for t in qkv(s=9, b=1))
    cu, padded = torch.tensor([0, 3, 5, 6]), torch.tensor([0, 4, 6, 9])
    starts = {"cu_seqlens_q": cu, "cu_seqlens_kv": cu, "cu_seqlens_q_padded": padded, "cu_seqlens_kv_padded": padded}
    ours = module(window_size=(1, 0))(q, k, v, qkv_format="thd", attn_mask_type="padding_causal", **starts)
    for first, length in ((0, 3), (4, 2), (6, 1)):
        part = [t[first : first + length].unsqueeze(1) for t in (q, k, v)]
        alone = module(window_size=(1, 0))(*part).squeeze(1)
        torch.testing.assert_close(ours[first : first + length], alone, **EXACT)
    assert torch.equal(ours[[3, 7, 8]], torch.zeros(3, 18, dtype=q.dtype))


def test_padding_and_arbitrary_masks():
    """Law: True hides; padded keys are not seen and padded queries give 0. A mask is ignored where the kind has none."""
    q, k, v = qkv()
    hidden = torch.zeros(2, 1, 1, 7, dtype=torch.bool)
    hidden[1, ..., 5:] = True
    ours = module(attn_mask_type="padding_causal")(q, k, v, attention_mask=hidden)
    torch.testing.assert_close(ours[:5, 1], module()(q[:5], k[:5], v[:5])[:, 1], **EXACT)
    assert not ours[5:, 1].any()
    arbitrary = torch.ones(1, 1, 7, 7).triu(1).bool()
    plain = module()(q, k, v)
    assert torch.equal(module(attn_mask_type="arbitrary")(q, k, v, attention_mask=arbitrary), plain)
    assert torch.equal(module()(q, k, v, attention_mask=~arbitrary), plain)
    with pytest.raises(ValueError, match="needs an attention_mask"):
        module(attn_mask_type="padding")(q, k, v)


def test_bshd_is_a_transpose():
    """Law: "bshd" input gives the "sbhd" result with batch and sequence exchanged."""
    q, k, v = qkv()
    ours = module(qkv_format="bshd")(*(t.transpose(0, 1) for t in (q, k, v)))
    assert torch.equal(ours, module()(q, k, v).transpose(0, 1))


def test_dropout_only_in_training():
    """Law: attention dropout acts in training, from the seed, and not in evaluation."""
    inputs, layer = qkv(), module(attention_dropout=0.5)
    assert torch.equal(layer(*inputs), module()(*inputs))
    layer.train()
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(layer(*inputs))
    assert torch.equal(*results) and not torch.allclose(results[0], module()(*inputs))


@pytest.mark.parametrize("options", [{"core_attention_bias_type": "alibi"}, {"inference_params": object()}])
def test_what_is_not_known_is_refused(options):
    """Law: an option that would change the result is never ignored."""
    with pytest.raises(NotImplementedError):
        module()(*qkv(), **options)


def test_attention_types():
    """Law: fp64 stays fp64 (control: fp32 is outside the tolerance); a bf16 softmax is made in fp32 and rounded once."""
    wide, narrow = module()(*qkv()), module()(*(t.float() for t in qkv()))
    assert wide.dtype == torch.float64 and narrow.dtype == torch.float32
    assert not torch.allclose(narrow.double(), wide, **EXACT)
    q, k, v = (t.bfloat16() for t in qkv(g=6))
    scores = (torch.einsum("qbhd,kbhd->bhqk", q, k) * 0.5).masked_fill(torch.ones(7, 7).triu(1).bool(), -math.inf)
    once = torch.softmax(scores.float(), -1).bfloat16()
    ours = module()(q, k, v)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, torch.einsum("bhqk,kbhe->qbhe", once, v).flatten(2))


# ---------------------------------------------------------------------------------------------- norms and linear layers
@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_norms_are_torchs(kind, zero_centered):
    """Law: norms equal torch's in fp64; a zero-centred weight is stored less 1."""
    layer = getattr(te_modules, kind)(8, eps=1e-6, zero_centered_gamma=zero_centered, dtype=torch.float64)
    assert torch.equal(layer.weight, torch.full((8,), float(not zero_centered), dtype=torch.float64))
    gain, shift, x = rand(8, seed=1), rand(8, seed=2), rand(5, 8)
    with torch.no_grad():
        layer.weight.copy_(gain - 1 if zero_centered else gain)
        if kind == "LayerNorm":
            layer.bias.copy_(shift)
    expect = F.rms_norm(x, (8,), gain, 1e-6) if kind == "RMSNorm" else F.layer_norm(x, (8,), gain, shift, 1e-6)
    torch.testing.assert_close(layer(x), expect, **EXACT)
    # control: fp32 arithmetic, which an fp64 comparison must not hide, would be far outside the tolerance
    assert not torch.allclose(layer.float()(x.float()).double(), expect, **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_norms_round_once(dtype):
    """Law: the weight is applied in fp32 before the one rounding. Control: HF's order (round, then apply) differs."""
    x, gain = rand(64, 32).to(dtype), rand(32, seed=1).to(dtype)
    normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    ours = te_modules.norm(x, gain, None, 1e-6, "RMSNorm", False)
    assert ours.dtype == dtype and torch.equal(ours, (normed * gain.float()).to(dtype))
    assert not torch.equal(ours, normed.to(dtype) * gain)


def test_norm_then_linear():
    """Law: LayerNormLinear is a norm and a linear layer; the normed input is returned where asked for."""
    options = {"normalization": "RMSNorm", "params_dtype": torch.float64, "device": "cpu", "init_method": torch.nn.init.normal_}
    layer = te_modules.LayerNormLinear(8, 4, 1e-6, bias=True, return_layernorm_output=True, **options)
    y, normed = layer(x := rand(5, 8))
    torch.testing.assert_close(normed, F.rms_norm(x, (8,), None, 1e-6), **EXACT)
    torch.testing.assert_close(y, F.linear(normed, layer.weight, layer.bias), **EXACT)
    assert [name for name, _ in layer.named_parameters()] == ["layer_norm_weight", "weight", "bias"]


def test_grouped_linear_is_one_linear_layer_per_expert():
    """Law: rows go to the expert their split names; an expert without rows is fine."""
    options = {"params_dtype": torch.float64, "device": "cpu", "init_method": torch.nn.init.normal_}
    layer, x = te_modules.GroupedLinear(3, 8, 4, bias=False, **options), rand(5, 8)
    expect = torch.cat([F.linear(x[:2], layer.weight0), F.linear(x[2:], layer.weight2)])
    torch.testing.assert_close(layer(x, torch.tensor([2, 0, 3])), expect, **EXACT)


def test_sizes_that_do_not_divide_are_refused():
    """Law: an uneven shard is an error that names the number."""
    with pytest.raises(ValueError, match="out_features 9 .* size 2"):
        te_modules.Linear(8, 9, tp_size=2, parallel_mode="column", device="cpu")


# ---------------------------------------------------------------------------------------------- recurrences
def test_state_space_recurrence_is_its_matrix_form():
    """Law: y_t = sum over s<=t of C_t.B_s exp(sum of dt A after s) dt_s x_s + D x_t, in fp64."""
    b, s, h, p, g, n = 2, 5, 4, 3, 2, 6
    x, dt, A = rand(b, s, h, p), rand(b, s, h).abs(), -rand(h).abs()
    B, C, D = rand(b, s, g, n, seed=1), rand(b, s, g, n, seed=2), rand(h, seed=3)
    y, state = recurrences.ssd(x, dt, A, B, C, D=D)
    expect = D.view(1, 1, h, 1) * x
    for t in range(s):
        for j in range(t + 1):
            decay = torch.exp((dt[:, j + 1 : t + 1] * A).sum(1))
            match = torch.einsum("bgn,bgn->bg", C[:, t], B[:, j]).repeat_interleave(h // g, 1)
            expect[:, t] += (match * decay * dt[:, j]).unsqueeze(-1) * x[:, j]
    torch.testing.assert_close(y, expect, **EXACT)
    assert y.dtype == state.dtype == torch.float64


def test_gated_delta_rule_is_its_matrix_form():
    """Law: state_t = exp(g_t) (I - beta_t k_t k_t^T) state + beta_t k_t v_t^T, out = state^T q / sqrt(k), in fp64."""
    b, s, h, kd, vd = 1, 6, 2, 4, 3
    q, k, v = rand(b, s, h, kd, seed=1), F.normalize(rand(b, s, h, kd, seed=2), dim=-1), rand(b, s, h, vd)
    g, beta = -rand(b, s, h, seed=4).abs(), rand(b, s, h, seed=5).sigmoid()
    ours, last = recurrences.chunk_gated_delta_rule(q, k, v, g, beta, output_final_state=True)
    for head in range(h):
        state = torch.zeros(kd, vd, dtype=q.dtype)
        for t in range(s):
            kt, bt = k[0, t, head], beta[0, t, head]
            state = g[0, t, head].exp() * (torch.eye(kd, dtype=q.dtype) - bt * torch.outer(kt, kt)) @ state
            state = state + bt * torch.outer(kt, v[0, t, head])
            torch.testing.assert_close(ours[0, t, head], state.T @ q[0, t, head] / 2, **EXACT)
        torch.testing.assert_close(last[0, head], state, **EXACT)


def test_convolution_and_packing():
    """Law: the convolution is causal and depthwise, and packed sequences give what each gives alone."""
    x, weight, bias = rand(1, 5, 9), rand(5, 4), rand(5, seed=1)
    expect = sum(F.pad(x, (3, 0))[..., j : j + 9] * weight[:, j].view(1, -1, 1) for j in range(4)) + bias.view(1, -1, 1)
    torch.testing.assert_close(recurrences.causal_conv1d_fn(x, weight, bias, activation="silu"), F.silu(expect), **EXACT)
    cu = torch.tensor([0, 2, 9])
    packed, _ = recurrences.fla_conv1d(x.transpose(1, 2), weight, bias, cu_seqlens=cu)
    for a, b in ((0, 2), (2, 9)):
        alone, _ = recurrences.fla_conv1d(x.transpose(1, 2)[:, a:b], weight, bias)
        torch.testing.assert_close(packed[:, a:b], alone, **EXACT)


def test_kernels_refuse_what_they_would_ignore():
    """Law: an option that would change a kernel's result is an error that names it."""
    with pytest.raises(NotImplementedError, match="initial_states"):
        recurrences.causal_conv1d_fn(rand(1, 2, 3), rand(2, 2), initial_states=rand(1, 2, 1))


# ---------------------------------------------------------------------------------------------- two ranks
def two_ranks(rank: int, store: str) -> dict:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    collectives.fill_gloo_gaps()
    collectives.fill_gloo_gaps()  # twice is once
    out = {"collectives": uneven_collectives(rank), "cp": context_parallel(rank)}
    out["deep_ep"] = round_trip(rank)
    dist.barrier()
    dist.destroy_process_group()
    return out


def uneven_collectives(rank: int) -> dict:
    import torch.distributed as dist

    pieces = [torch.arange(3.0).view(3, 1), 10 + torch.arange(5.0).view(5, 1)]
    gathered = [torch.empty_like(p) for p in pieces]
    work = dist.all_gather(gathered, pieces[rank], async_op=True)
    work.wait()
    reduced = torch.empty_like(pieces[rank])
    dist.reduce_scatter(reduced, [p * (rank + 1) for p in pieces])
    even = [torch.empty(2), torch.empty(2)]
    dist.all_gather(even, torch.full((2,), float(rank)))
    send, received = torch.arange(3.0) + 10 * rank, torch.empty(4 if rank else 2)
    sizes = (torch.tensor([2, 2]), torch.tensor([1, 2])) if rank else (torch.tensor([1, 1]), torch.tensor([1, 2]))
    dist.all_to_all_single(received, send, *sizes)
    return {
        "gathered": [t.flatten().tolist() for t in gathered], "reduced": torch.equal(reduced, 3 * pieces[rank]),
        "even": [t.tolist() for t in even], "exchanged": received.tolist(),
    }  # fmt: skip


def context_parallel(rank: int) -> dict:
    """Attention over two context-parallel ranks against the whole, outputs and gradients."""
    import torch.distributed as dist

    whole = [t.requires_grad_() for t in qkv(s=12)]
    mine = attention.cp_positions(6, 2, rank)
    parts = [t.detach()[mine].requires_grad_() for t in whole]
    layer = module(window_size=(4, 0), cp_group=dist.group.WORLD)
    expect, ours, weight = module(window_size=(4, 0))(*whole), layer(*parts), rand(12, 2, 18)
    (expect * weight).sum().backward()
    (ours * weight[mine]).sum().backward()
    gaps = [(ours - expect[mine]).abs().max().item()]
    gaps += [(p.grad - w.grad[mine]).abs().max().item() for p, w in zip(parts, whole, strict=True)]
    return {"positions": mine.tolist(), "gap": max(gaps)}


def round_trip(rank: int) -> dict:
    """DeepEP's buffer: every token comes back once per rank that has one of its experts, and the weights with it."""
    import torch.distributed as dist

    x = rand(4, 3, seed=rank)
    experts = torch.tensor([[0, 1], [0, 3], [2, -1], [-1, -1]])
    weights = rand(4, 2, seed=9 + rank)
    buffer = deep_ep.Buffer(dist.group.WORLD)
    buffer.get_dispatch_layout(experts, 4)
    tokens, numbers, sent, per_expert, handle, _ = buffer.dispatch(x, topk_idx=experts, topk_weights=weights)
    back, weights_back, _ = buffer.combine(tokens, handle, topk_weights=sent)
    copies = torch.tensor([1.0, 2.0, 1.0, 0.0], dtype=x.dtype).unsqueeze(1)
    kept = torch.where(experts >= 0, weights, 0.0)
    right = torch.allclose(back, x * copies) and torch.allclose(weights_back, kept)
    return {"right": right, "per_expert": per_expert, "numbers": numbers.tolist()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What the two ranks found."""
    store = tmp_path_factory.mktemp("gloo") / "store"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, __file__, str(rank), str(store)] for rank in range(2)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    running = [subprocess.Popen(command, **pipes) for command in commands]
    done = [process.communicate(timeout=120) for process in running]
    assert all(process.returncode == 0 for process in running), [error[-2000:] for _, error in done]
    return [json.loads(out.strip().splitlines()[-1]) for out, _ in done]


def test_uneven_collectives(ranks):
    """Law: pieces of unequal length are gathered and reduce-scattered exactly; split sizes may be tensors."""
    for rank, found in enumerate(ranks):
        got = found["collectives"]
        assert got["gathered"] == [[0, 1, 2], [10, 11, 12, 13, 14]]
        assert got["reduced"] and got["even"] == [[0, 0], [1, 1]]
        assert got["exchanged"] == ([1, 2, 11, 12] if rank else [0, 10])


def test_context_parallel_attention(ranks):
    """Law: two ranks holding megatron's balanced halves compute the whole's outputs and gradients, with a window."""
    assert [found["cp"]["positions"] for found in ranks] == [[0, 1, 2, 9, 10, 11], [3, 4, 5, 6, 7, 8]]
    assert all(found["cp"]["gap"] < 1e-12 for found in ranks), ranks


def test_deep_ep_round_trip(ranks):
    """Law: dispatch sends each token once to each rank that has its experts, with local numbers; combine sums it back."""
    assert all(found["deep_ep"]["right"] for found in ranks)
    assert [found["deep_ep"]["per_expert"] for found in ranks] == [[4, 2], [2, 2]]
    assert ranks[0]["deep_ep"]["numbers"] == [[0, 1], [0, -1]] * 2
    assert ranks[1]["deep_ep"]["numbers"] == [[-1, 1], [0, -1]] * 2


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(two_ranks(int(sys.argv[1]), sys.argv[2])))
