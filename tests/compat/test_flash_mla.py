"""compat.flash_mla: every function against float64, with FlashMLA's calls and layouts."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import deepkern
import deepkern.compat.flash_mla as flash_mla
from deepkern.testing import caches, compare, ops

INF = math.inf
BYTES = [torch.uint8, torch.int8, torch.float8_e4m3fn]


def values(cache, R=512):
    """Every token of a cache in float64, [slots, R + D]."""
    return deepkern.reference.attention.unpack(cache.flatten(0, 2), R)


def attend(q, keys, key_mask, scale, R, sink=None):
    """FlashMLA's definition: q [H, W], keys [n, W], key_mask [n] -> out [H, R], lse [H]."""
    keys = keys.masked_fill(~key_mask[:, None], 0.0)
    scores = (q.double() @ keys.T * scale).masked_fill(~key_mask, -INF)
    lse = scores.logsumexp(-1)
    total_lse = lse if sink is None else torch.logaddexp(lse, sink.double())
    out = (scores - total_lse.masked_fill(total_lse == -INF, 0.0)[:, None]).exp() @ keys[:, :R]
    no_keys = lse == -INF
    return out.masked_fill(no_keys[:, None], 0.0), lse.masked_fill(no_keys, INF)


def check(got, want):
    for g, w in zip(got, want, strict=True):
        compare.assert_close(g, w)


@pytest.mark.parametrize("kind", ["bf16", *BYTES])
@pytest.mark.parametrize("style", ["new", "old"])
def test_dense_decode(backend, kind, style, generator):
    cache_dtype = torch.bfloat16 if kind == "bf16" else torch.uint8
    q, cache, table, seqlens, *_ = ops.inputs(
        "mla_decode", generator, (70, 0, 3), Sq=2, H=5, cache_dtype=cache_dtype
    )
    if style == "new":
        metadata = flash_mla.get_mla_metadata()
    else:  # earlier releases passed two tensors, which are ignored
        flash_mla.get_mla_metadata(seqlens, 2 * 5, 1)
        metadata = torch.full((132, 8), -7, dtype=torch.int32), seqlens
    given = cache if kind == "bf16" else cache.view(kind)
    out, lse = flash_mla.flash_mla_with_kvcache(
        q, given, table, seqlens, 512, *metadata, causal=True, is_fp8_kvcache=kind != "bf16"
    )
    keys, page = values(cache), cache.shape[1]
    for b, length in enumerate((70, 0, 3)):
        n = torch.arange(length, device=q.device)
        slots = table[b, n // page].long() * page + n % page
        for s in range(2):
            want = attend(q[b, s], keys[slots], n < length - 1 + s, 576**-0.5, 512)
            check((out[b, s], lse[b, :, s]), want)
    assert (out[1] == 0).all() and (lse[1] == INF).all()
    assert lse[2].isfinite().all()


def sparse_case(generator, topk, Sq=2, H=4, page=16, pages=3, fp8=True):
    device = generator.device
    cache = caches.empty_cache(
        generator, pages, page, 512, 64, torch.uint8 if fp8 else torch.bfloat16
    )
    slots = torch.arange(pages * page, device=device)
    latent = torch.randn(len(slots), 512, generator=generator, device=device)
    k_rope = torch.randn(len(slots), 64, generator=generator, device=device)
    used = slots[slots % 3 > 0]  # the others stay NaN and no index names them
    deepkern.reference.mla_cache_append(latent[used], k_rope[used], cache, used)
    q = torch.randn(2, Sq, H, 576, generator=generator, device=device).bfloat16()
    pick = torch.randint(len(used), (2, Sq, topk), generator=generator, device=device)
    indices = used[pick].int()
    indices[0, 0, 1::3] = -1
    indices[1, 1] = torch.tensor([-1, pages * page, 2147483647, -2147483648],
                                 dtype=torch.int32, device=device).repeat(topk)[:topk]  # fmt: skip
    return q, cache, indices


def attend_indices(q, scopes, scale, sink=None):
    """`scopes`: (cache, indices [B, Sq, topk], topk_length [B] or None), attended to together."""
    B, Sq, H, _ = q.shape
    out = torch.zeros(B, Sq, H, 512, dtype=torch.float64, device=q.device)
    lse = torch.zeros(B, H, Sq, dtype=torch.float64, device=q.device)
    for b in range(B):
        for s in range(Sq):
            keys, masks = [], []
            for cache, indices, length in scopes:
                token, index = values(cache), indices[b, s].long()
                count = len(index) if length is None else int(length[b])
                valid = (index >= 0) & (index < len(token))
                valid &= torch.arange(len(index), device=q.device) < count
                keys.append(token[index.where(valid, 0)])
                masks.append(valid)
            out[b, s], lse[b, :, s] = attend(
                q[b, s], torch.cat(keys), torch.cat(masks), scale, 512, sink
            )
    return out, lse


def sinks(device):
    return torch.tensor([0.3, -INF, INF, 5.0], device=device)


@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize("with_length", [False, True])
def test_sparse_decode(backend, with_sink, with_length, generator):
    q, cache, indices = sparse_case(generator, 20)
    sink = sinks(q.device) if with_sink else None
    length = None
    if with_length:
        length = torch.tensor([7, 20], dtype=torch.int32, device=q.device)
    got = flash_mla.flash_mla_with_kvcache(
        q, cache.view(torch.float8_e4m3fn), None, None, 512, *flash_mla.get_mla_metadata(),
        0.05, False, True, indices, sink, topk_length=length,
    )  # fmt: skip
    check(got, attend_indices(q, [(cache, indices, length)], 0.05, sink))
    assert (got[0][1, 1] == 0).all() and (got[1][1, :, 1] == INF).all()


@pytest.mark.parametrize("with_sink", [False, True])
def test_sparse_decode_over_two_caches(backend, with_sink, generator):
    q, cache, indices = sparse_case(generator, 20)
    _, extra, more = sparse_case(generator, 9, page=4, pages=5)
    more[0, 0] = -1  # no key in one of the caches, or in both
    sink = sinks(q.device) if with_sink else None
    length = torch.tensor([4, 9], dtype=torch.int32, device=q.device)
    got = flash_mla.flash_mla_with_kvcache(
        q, cache, None, None, 512, flash_mla.get_mla_metadata()[0], None, 0.05,
        is_fp8_kvcache=True, indices=indices, attn_sink=sink, extra_k_cache=extra,
        extra_indices_in_kvcache=more, extra_topk_length=length,
    )  # fmt: skip
    check(got, attend_indices(q, [(cache, indices, None), (extra, more, length)], 0.05, sink))
    assert (got[0][1, 1] == 0).all() and (got[1][1, :, 1] == INF).all()


@pytest.mark.parametrize("with_sink", [False, True])
def test_sparse_prefill(backend, with_sink, generator):
    device = generator.device
    q = torch.randn(3, 4, 576, generator=generator, device=device).bfloat16()
    kv = torch.randn(30, 1, 576, generator=generator, device=device).bfloat16()
    indices = torch.randint(-5, 35, (3, 1, 20), generator=generator, device=device).int()
    indices[2] = -1
    length = torch.tensor([20, 6, 20], dtype=torch.int32, device=device)
    sink = sinks(device) if with_sink else None
    out, max_logits, lse = flash_mla.flash_mla_sparse_fwd(
        q, kv, indices, 0.05, attn_sink=sink, topk_length=length
    )
    for s in range(3):
        index = indices[s, 0].long()
        valid = (index >= 0) & (index < 30) & (torch.arange(20, device=device) < length[s])
        keys = kv[index.where(valid, 0), 0].double()
        check((out[s], lse[s]), attend(q[s], keys, valid, 0.05, 512, sink))
        row_max = (q[s].double() @ keys.T * 0.05).masked_fill(~valid, -INF).amax(-1)
        compare.assert_close(max_logits[s], row_max)
    assert (lse[2] == INF).all() and (max_logits[2] == -INF).all()


def varlen(generator, Hk=2):
    device = generator.device
    lengths_q, lengths_k = (5, 0, 3), (9, 4, 2)
    offsets = [torch.tensor([0, *x], device=device).cumsum(0).int() for x in (lengths_q, lengths_k)]
    q, k, v = (
        torch.randn(*shape, generator=generator, device=device).bfloat16().requires_grad_()
        for shape in ((8, 4, 192), (15, Hk, 192), (15, Hk, 128))
    )
    return q, k, v, *offsets


def attend_varlen(q, k, v, offsets_q, offsets_k, scale, causal):
    """Sequence by sequence with torch's softmax, in q's dtype float64."""
    outs, lses = [], []
    for b in range(len(offsets_q) - 1):
        rows, keys = (slice(int(o[b]), int(o[b + 1])) for o in (offsets_q, offsets_k))
        group = q.shape[1] // k.shape[1]
        kb, vb = (x[keys].repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[rows], kb) * scale
        if causal:
            Sq, Sk = scores.shape[1:]
            future = torch.ones(Sq, Sk, device=q.device).triu(Sk - Sq + 1).bool()
            scores = scores.masked_fill(future, -INF)
        no_keys = (scores == -INF).all(-1, keepdim=True)
        weights = scores.masked_fill(no_keys, 0.0).softmax(-1).masked_fill(no_keys, 0.0)
        outs.append(torch.einsum("hqk,khd->qhd", weights, vb))
        lses.append(scores.logsumexp(-1).T)
    return torch.cat(outs), torch.cat(lses)


@pytest.mark.parametrize("causal", [False, True])
def test_varlen_forward_and_backward(backend, causal, generator):
    q, k, v, offsets_q, offsets_k = varlen(generator)
    out, lse = flash_mla.flash_attn_varlen_func(
        q, k, v, offsets_q, offsets_k, 5, 9, causal=causal, is_varlen=True
    )
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want, want_lse = attend_varlen(*wide, offsets_q, offsets_k, 192**-0.5, causal)
    assert lse.shape == (8, 4)
    compare.assert_close(out, want.detach())
    compare.assert_close(lse.detach(), want_lse.detach())
    grad = torch.randn(out.shape, generator=generator, device=out.device).bfloat16()
    got = torch.autograd.grad(out, (q, k, v), grad)
    for g, w in zip(got, torch.autograd.grad(want, wide, grad.double()), strict=True):
        assert compare.diff(g, w) < 1e-5


def test_varlen_packed(backend, generator):
    q, k, v, _, offsets = varlen(generator, Hk=4)
    with torch.no_grad():
        whole = torch.randn(15, 4, 512, generator=generator, device=q.device).bfloat16()
        got = flash_mla.flash_attn_varlen_qkvpacked_func(whole, offsets, 9, 192, causal=True)
        parts = whole.split((192, 192, 128), -1)
        want = flash_mla.flash_attn_varlen_func(*parts, offsets, offsets, 9, 9, causal=True)
        packed = torch.cat(parts[1:], -1)
        again = flash_mla.flash_attn_varlen_kvpacked_func(
            parts[0], packed, offsets, offsets, 9, 9, 192, causal=True
        )
    for one, other, third in zip(got, want, again, strict=True):
        compare.assert_bitwise(one, other)
        compare.assert_bitwise(third, other)


def test_metadata_is_valid_for_every_call(backend, generator):
    """One object for several shapes and lengths: it has no state that could be stale."""
    metadata, rest = flash_mla.get_mla_metadata(cache_seqlens=1, anything="else")
    assert rest is None and not vars(metadata)
    for lengths in ((20,), (3, 40)):
        q, cache, table, seqlens, scale, _, R = ops.inputs(
            "mla_decode", generator, lengths, H=2, R=64, D=16, page=16
        )
        got = flash_mla.flash_mla_with_kvcache(q, cache, table, seqlens, R, metadata)
        want = deepkern.mla_decode(q, cache, table, seqlens, scale, False, R)
        check(got, [x.double() for x in want])
        assert not vars(metadata)


def test_no_device_to_host_copy():
    """Fake tensors have no values, so no read: a CUDA graph can capture the call."""
    with FakeTensorMode(), deepkern.backend("torch"):
        q = torch.empty(2, 1, 16, 576, dtype=torch.bfloat16)
        cache = torch.empty(4, 64, 1, 576, dtype=torch.bfloat16)
        table, seqlens = (torch.empty(s, dtype=torch.int32) for s in ((2, 2), (2,)))
        out, lse = flash_mla.flash_mla_with_kvcache(q, cache, table, seqlens, 512)
    assert out.shape == (2, 1, 16, 512) and lse.shape == (2, 16, 1)


def test_incompatible_arguments_raise(generator):
    q, cache, table, seqlens, *_ = ops.inputs(
        "mla_decode", generator, (5,), H=2, R=64, D=16, page=4
    )
    indices = torch.zeros(1, 1, 3, dtype=torch.int32, device=q.device)
    call = flash_mla.flash_mla_with_kvcache
    for error, arguments in (
        ("is_fp8_kvcache: expected False", {"is_fp8_kvcache": True}),
        ("attn_sink: expected None", {"attn_sink": torch.zeros(2)}),
        ("topk_length: expected None", {"topk_length": seqlens}),
        ("causal: expected False", {"indices": indices, "causal": True}),
        ("block_table: expected a tensor", {"block_table": None}),
        ("extra_topk_length: expected None", {"indices": indices, "extra_topk_length": seqlens}),
        ("extra_indices_in_kvcache: expected a", {"indices": indices, "extra_k_cache": cache}),
    ):
        given = {"block_table": table, "cache_seqlens": seqlens, "head_dim_v": 64} | arguments
        with pytest.raises(ValueError, match=f"flash_mla_with_kvcache: {error}"):
            call(q, cache, **given)
    with pytest.raises(ValueError, match="dropout_p: expected 0.0"):
        flash_mla.flash_attn_varlen_func(q, q, q, seqlens, seqlens, 1, 1, dropout_p=0.1)


def test_signatures():
    """Names and order of FlashMLA's arguments, which callers pass by position."""
    expected = {
        "flash_mla_with_kvcache": "q k_cache block_table cache_seqlens head_dim_v "
        "tile_scheduler_metadata num_splits softmax_scale causal is_fp8_kvcache indices attn_sink "
        "extra_k_cache extra_indices_in_kvcache topk_length extra_topk_length "
        "enable_batch_invariant",
        "flash_mla_sparse_fwd": "q kv indices sm_scale d_v attn_sink topk_length",
        "flash_attn_varlen_func": "q k v cu_seqlens_qo cu_seqlens_kv max_seqlen_qo max_seqlen_kv "
        "dropout_p softmax_scale causal deterministic is_varlen",
        "flash_attn_varlen_qkvpacked_func": "qkv cu_seqlens max_seqlen head_dim_qk dropout_p "
        "softmax_scale causal deterministic is_varlen",
        "flash_attn_varlen_kvpacked_func": "q kv cu_seqlens_qo cu_seqlens_kv max_seqlen_qo "
        "max_seqlen_kv head_dim_qk dropout_p softmax_scale causal deterministic is_varlen",
    }
    for name, arguments in expected.items():
        assert list(inspect.signature(getattr(flash_mla, name)).parameters) == arguments.split()
