"""mla_decode: FlashMLA's grid at sizes for the interpreter, hostile inputs and batch invariance.

Slots without a token are NaN in every cache here; unused block table entries are 2147480000.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deepkern
from deepkern.runtime import arch
from deepkern.testing import caches, compare, ops

FP32 = {"dtype": torch.float32, "cache_dtype": torch.float32}
FP8 = {"cache_dtype": torch.uint8}
SMALL = {"R": 64, "D": 16}
FAR = 2**31 - 1


def check(args: tuple) -> tuple:
    """The op's results, after a comparison with the oracle."""
    got = deepkern.mla_decode(*args)
    compare.assert_matches("mla_decode", got, deepkern.reference.mla_decode(*args))
    return got


def float64_attention(args: tuple, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of sequence b by torch's softmax in float64, token by token."""
    q, cache, table, seqlens, scale, causal, R = args
    page, length = cache.shape[1], int(seqlens[b])
    keys = torch.stack([cache[table[b, n // page], n % page, 0] for n in range(length)]).double()
    scores = torch.einsum("shw,nw->hsn", q[b].double(), keys) * scale
    if causal:
        Sq = q.shape[1]
        future = torch.ones(Sq, length, device=q.device).triu(length - Sq + 1).bool()
        scores.masked_fill_(future, -math.inf)
    out = torch.einsum("hsn,nr->shr", scores.softmax(-1), keys[:, :R])
    return out, scores.logsumexp(-1)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_matches_torch_softmax(backend, causal, generator):
    args = ops.inputs(
        "mla_decode", generator, (40, 7), Sq=3, H=5, page=16, causal=causal, **SMALL, **FP32
    )
    out, lse = deepkern.mla_decode(*args)
    for b in range(2):
        want_out, want_lse = float64_attention(args, b)
        compare.assert_close(out[b], want_out)
        compare.assert_close(lse[b], want_lse)


@pytest.mark.parametrize("H", [1, 3, 9, 16, 63, 64, 126, 128])
def test_any_number_of_heads(kernel_backend, H, generator):
    check(ops.inputs("mla_decode", generator, (70, 0, 20), H=H, page=64, **SMALL))


@pytest.mark.parametrize("Sq", [1, 2, 4])
@pytest.mark.parametrize("page", [1, 2, 16, 53, 64, 576])
def test_page_sizes_and_new_tokens(kernel_backend, page, Sq, generator):
    check(ops.inputs("mla_decode", generator, (0, 20, 140), Sq=Sq, H=3, page=page, **SMALL))


@pytest.mark.parametrize(
    "kind",
    [{}, FP8, FP32, {**FP32, "cache_dtype": torch.bfloat16}],
    ids=["bf16", "fp8", "fp32", "fp32-q-bf16-cache"],
)
def test_v3_widths(kernel_backend, kind, generator):
    check(ops.inputs("mla_decode", generator, (33, 100), Sq=1, H=4, **kind))


@pytest.mark.parametrize("length", [511, 512, 513, 1024, 1300])
def test_split_boundaries(kernel_backend, length, generator):
    check(ops.inputs("mla_decode", generator, (length,), H=2, R=32, D=16, **FP32))


@pytest.mark.parametrize("kind", [{}, FP8], ids=["bf16", "fp8"])
def test_empty_sequences_between_long_ones(kernel_backend, kind, generator):
    """FlashMLA's lengths: up to eight splits in one sequence, no token in the next."""
    lengths = (0, 4096, 0, 20, 140, 0)
    check(ops.inputs("mla_decode", generator, lengths, Sq=2, H=2, R=32, D=16, **kind))


def test_more_queries_than_tokens(backend, generator):
    """The first queries of a sequence shorter than Sq have no token: out 0, lse -inf."""
    args = ops.inputs("mla_decode", generator, (2, 0), Sq=4, H=3, page=16, **SMALL)
    out, lse = check(args)
    assert (out[0, :2] == 0).all() and (lse[0, :, :2] == -math.inf).all()
    assert (out[0, 2:] != 0).any() and lse[0, :, 2:].isfinite().all()
    assert (out[1] == 0).all() and (lse[1] == -math.inf).all()


@pytest.mark.parametrize("kind", [{}, FP8], ids=["bf16", "fp8"])
def test_bits_independent_of_batch(backend, kind, generator):
    """Alone, in a batch, and with a wider table, which allows more splits."""
    lengths = (600, 3, 77)
    args = ops.inputs("mla_decode", generator, lengths, Sq=2, H=3, page=64, **SMALL, **kind)
    q, cache, table, seqlens, *rest = args
    out, lse = deepkern.mla_decode(*args)
    wide = torch.full((3, 40), caches.ABSENT, dtype=torch.int32, device=q.device)
    wide[:, : table.shape[1]] = table
    compare.assert_bitwise(deepkern.mla_decode(q, cache, wide, seqlens, *rest)[0], out)
    for b in range(3):
        one = slice(b, b + 1)
        alone, alone_lse = deepkern.mla_decode(q[one], cache, table[one], seqlens[one], *rest)
        compare.assert_bitwise(alone[0], out[b])
        compare.assert_bitwise(alone_lse[0], lse[b])
    narrow = table[2:, :2]
    alone, _ = deepkern.mla_decode(q[2:], cache, narrow, seqlens[2:], *rest)
    compare.assert_bitwise(alone[0], out[2])


@pytest.mark.parametrize(
    "hostile",
    [-1, -FAR - 1, FAR, "blocks", caches.ABSENT],
    ids=["-1", "min", "max", "end", "unused"],
)
def test_pages_out_of_range_are_masked(backend, hostile, generator):
    """The tokens of a page outside the cache are masked, the others are not."""
    args = ops.inputs("mla_decode", generator, (60,), H=2, page=16, causal=False, **SMALL, **FP32)
    q, cache, table, seqlens, *rest = args
    broken = table.clone()
    broken[0, 1] = cache.shape[0] if hostile == "blocks" else hostile
    out, lse = check((q, cache, broken, seqlens, *rest))
    without = torch.cat((table[:, :1], table[:, 2:]), 1)
    want, want_lse = deepkern.reference.mla_decode(q, cache, without, seqlens - 16, *rest)
    compare.assert_close(out, want)
    compare.assert_close(lse, want_lse)
    nothing = torch.full_like(table, -1)
    out, lse = deepkern.mla_decode(q, cache, nothing, seqlens, *rest)
    assert (out == 0).all() and (lse == -math.inf).all()


def test_lengths_are_clamped(backend, generator):
    q, cache, table, seqlens, *rest = ops.inputs(
        "mla_decode", generator, (32, 32, 32), H=2, page=16, **SMALL
    )
    lengths = torch.tensor([-5, FAR, -FAR - 1], dtype=torch.int32, device=q.device)
    out, lse = deepkern.mla_decode(q, cache, table, lengths, *rest)
    clamped = torch.tensor([0, 32, 0], dtype=torch.int32, device=q.device)
    want, want_lse = deepkern.mla_decode(q, cache, table, clamped, *rest)
    compare.assert_bitwise(out, want)
    compare.assert_bitwise(lse, want_lse)


@pytest.mark.parametrize("kind", [{}, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("length", [1, 3, 150])
def test_error_at_most_twice_that_of_pytorch(backend, kind, length, generator):
    """Plain PyTorch: softmax in fp32, the rest in bf16; an FP8 cache is dequantised to bf16."""
    args = ops.inputs("mla_decode", generator, (length,), H=8, R=256, D=16, **kind)
    q, cache, table, seqlens, scale, causal, R = args
    unpack = deepkern.reference.attention.unpack
    keys = unpack(torch.cat([cache[i] for i in table[0]])[:length, 0], R)
    wide = keys.view(1, -1, 1, keys.shape[1]), table.new_zeros(1, 1)
    exact, _ = float64_attention((q, *wide, seqlens, scale, causal, R), 0)
    keys = keys.bfloat16()
    scores = (q[0, 0].float() @ keys.float().T * scale).softmax(-1)
    plain = (scores.bfloat16() @ keys[:, :R])[None]
    got = deepkern.mla_decode(*args)[0][0]
    assert compare.diff(got, exact) <= 2 * compare.diff(plain, exact) + 1e-6


@pytest.mark.parametrize("kind", [{}, FP8], ids=["bf16", "fp8"])
def test_targets_without_e4m3(kind, generator):
    args = ops.inputs("mla_decode", generator, (70,), H=3, page=16, R=128, D=16, **kind)
    for target in ("sm_80", "gfx942"):
        with arch.compile_for(arch.ARCHS[target]), deepkern.backend("triton"):
            check(args)


def test_append_then_decode(backend, generator):
    """Absorbed attention over the cache equals attention with up-projected keys and values."""
    T, H, R, D, nope, v = 21, 3, 32, 8, 24, 20
    device = generator.device

    def randn(*shape):
        return torch.randn(shape, generator=generator, device=device)

    latent, k_rope, up_k, up_v = randn(T, R), randn(T, D), randn(H, nope, R), randn(H, v, R)
    q_nope, q_rope = randn(1, 2, H, nope), randn(1, 2, H, D)
    cache = caches.empty_cache(generator, 8, 4, R, D, torch.float32)
    table = torch.randperm(8, generator=generator, device=device).int()[None, :6]
    token = torch.arange(T, device=device)
    slots = table[0].long()[token // 4] * 4 + token % 4
    deepkern.mla_cache_append(latent, k_rope, cache, slots)
    q = torch.cat((torch.einsum("bshd,hdr->bshr", q_nope, up_k), q_rope), -1)
    seqlens = torch.tensor([T], dtype=torch.int32, device=device)
    out, _ = deepkern.mla_decode(q, cache, table, seqlens, 0.2, v_head_dim=R)
    got = torch.einsum("bshr,hdr->bshd", out, up_v)

    x = latent.double()
    k = torch.cat(
        (torch.einsum("tr,hdr->htd", x, up_k.double()), k_rope.double().expand(H, T, D)), -1
    )
    values = torch.einsum("tr,hdr->htd", x, up_v.double())
    query = torch.cat((q_nope, q_rope), -1)[0].transpose(0, 1).double()  # [H, 2, nope + D]
    mask = torch.ones(2, T, device=device).tril(T - 2).bool()
    want = torch.nn.functional.scaled_dot_product_attention(
        query, k, values, attn_mask=mask, scale=0.2
    )
    compare.assert_close(got[0], want.transpose(0, 1))


numbers = st.one_of(
    st.integers(-2, 8), st.sampled_from([FAR, -FAR - 1, caches.ABSENT, FAR - 5, 2**30])
)


@settings(max_examples=25, deadline=None)
@given(
    table=st.lists(numbers, min_size=6, max_size=6),
    lengths=st.lists(st.one_of(numbers, st.integers(0, 20)), min_size=2, max_size=2),
    fp8=st.booleans(),
    causal=st.booleans(),
)
def test_any_table_and_lengths_are_safe(table, lengths, fp8, causal):
    """The interpreter checks every access; the result equals the oracle's."""
    generator = torch.Generator().manual_seed(0)
    kind = FP8 if fp8 else FP32
    q, cache, _, _, scale, _, R = ops.inputs(
        "mla_decode", generator, (21, 20), Sq=2, H=2, R=32, D=16, page=7, **kind
    )
    cache = cache.nan_to_num() if not fp8 else cache.masked_fill(cache == 0xFF, 0)
    table, lengths = (torch.tensor(x, dtype=torch.int32) for x in (table, lengths))
    with deepkern.backend("triton"):
        check((q, cache, table.view(2, 3), lengths, scale, causal, R))


def test_debug_errors_name_the_argument(generator, monkeypatch):
    q, cache, table, seqlens, *rest = ops.inputs(
        "mla_decode", generator, (30,), H=1, page=16, **SMALL
    )
    monkeypatch.setenv("DEEPKERN_DEBUG", "1")
    with pytest.raises(ValueError, match="mla_decode: cache_seqlens: expected lengths in"):
        deepkern.mla_decode(q, cache, table, seqlens + 16, *rest)
    with pytest.raises(ValueError, match="mla_decode: block_table: expected pages in"):
        deepkern.mla_decode(q, cache, table - 100, seqlens, *rest)


def test_errors(generator):
    q, cache, table, seqlens, scale, causal, R = ops.inputs(
        "mla_decode", generator, (5,), H=1, **SMALL
    )
    with pytest.raises(ValueError, match="mla_decode: v_head_dim: expected a part of"):
        deepkern.mla_decode(q, cache, table, seqlens, scale, causal, 81)
    with pytest.raises(ValueError, match="mla_decode: cache: expected last dimension 80"):
        deepkern.mla_decode(q, cache[..., :-1], table, seqlens, scale, causal, R)
    big = torch.empty(1, 2**20, 1, 1, dtype=torch.bfloat16, device=q.device)
    pages = table.new_zeros(1, 2**10 + 1)
    with pytest.raises(ValueError, match=r"mla_decode: block_table: expected at most 2\*\*30 tok"):
        deepkern.mla_decode(q[..., :1], big, pages, seqlens, scale, causal, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [{}, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("page", [1, 2, 16, 53, 64, 576])
@pytest.mark.parametrize("Sq", [1, 2, 4])
@pytest.mark.parametrize("H", [1, 3, 9, 16, 63, 64, 126, 128])
def test_flashmla_grid(H, Sq, page, kind, generator):
    lengths = [n * (i % 2) for n in (20, 140, 4096) for i in range(4)]
    with deepkern.backend("triton"):
        check(ops.inputs("mla_decode", generator, lengths, Sq=Sq, H=H, page=page, **kind))
