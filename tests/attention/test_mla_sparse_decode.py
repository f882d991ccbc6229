"""mla_sparse_decode: FlashMLA's grid at sizes for the interpreter, hostile indices, sinks.

Slots that no index selects are NaN in every cache here.
"""

from __future__ import annotations

import math

import pytest
import torch

import deepkern
from deepkern.testing import compare, ops

FP32 = {"dtype": torch.float32, "cache_dtype": torch.float32}
FP8 = {"cache_dtype": torch.uint8}
SMALL = {"R": 64, "D": 16, "page": 16}
FAR = 2**31 - 1
HOSTILE = [-1, -FAR - 1, FAR, "slots"]


def check(args: tuple) -> tuple:
    """The op's results, after a comparison with the oracle.

    Tokens that no valid index selects are NaN. The oracle's result stays in float64, so that only
    the op's rounding counts.
    """
    q, cache, indices, scale, topk_length, *rest = args
    args = (q, poisoned(cache, indices, topk_length), indices, scale, topk_length, *rest)
    got = deepkern.mla_sparse_decode(*args)
    want = deepkern.reference.mla_sparse_decode(q.double(), *args[1:])
    for g, w in zip(got, want, strict=True):
        compare.assert_close(g, w)
    return got


def poisoned(cache: torch.Tensor, indices: torch.Tensor, topk_length) -> torch.Tensor:
    """A copy of the cache with NaN (bytes of ones) where no valid index points."""
    blocks, page = cache.shape[:2]
    if topk_length is not None:
        place = torch.arange(indices.shape[-1], device=indices.device)
        indices = indices.masked_fill(place >= topk_length[:, None, None], -1)
    slots = indices[(indices >= 0) & (indices < blocks * page)].long()
    copy = cache.clone()
    copy.view(torch.uint8).fill_(0xFF)
    copy[slots // page, slots % page] = cache[slots // page, slots % page]
    return copy


def float64_attention(args: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """By torch's softmax in float64, the sink one more column. A real cache and valid indices."""
    q, cache, indices, scale, _, sink, R = args
    tokens = torch.cat(list(cache))[:, 0].double()[indices.long()]  # [B, Sq, topk, R + D]
    scores = torch.einsum("bshw,bsnw->bshn", q.double(), tokens) * scale
    column = sink.double()[None, None, :, None].expand(*scores.shape[:3], 1)
    weights = torch.cat((scores, column), -1).softmax(-1)[..., :-1]
    out = torch.einsum("bshn,bsnr->bshr", weights, tokens[..., :R])
    return out, scores.logsumexp(-1).transpose(1, 2)


def test_matches_torch_softmax(backend, generator):
    args = ops.inputs(
        "mla_sparse_decode", generator, Sq=3, H=5, topk=37, sink=True, holes=False, **SMALL, **FP32
    )
    for got, want in zip(deepkern.mla_sparse_decode(*args), float64_attention(args), strict=True):
        compare.assert_close(got, want.to(torch.float64))


@pytest.mark.parametrize("H", [1, 3, 9, 16, 63, 64, 126, 128])
def test_any_number_of_heads(kernel_backend, H, generator):
    check(ops.inputs("mla_sparse_decode", generator, H=H, lengths=True, sink=True, **SMALL))


@pytest.mark.parametrize("kind", [{}, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("Sq", [1, 2, 4])
@pytest.mark.parametrize("page", [1, 2, 16, 53, 64, 576])
def test_page_sizes_and_new_tokens(kernel_backend, page, Sq, kind, generator):
    check(
        ops.inputs(
            "mla_sparse_decode",
            generator,
            B=1,
            Sq=Sq,
            H=3,
            topk=33,
            R=64,
            D=16,
            page=page,
            sink=True,
            **kind,
        )
    )


@pytest.mark.parametrize(
    "kind",
    [{}, FP8, FP32, {**FP32, "cache_dtype": torch.bfloat16}],
    ids=["bf16", "fp8", "fp32", "fp32-q-bf16-cache"],
)
def test_v3_widths(kernel_backend, kind, generator):
    check(ops.inputs("mla_sparse_decode", generator, B=1, H=4, topk=100, **kind))


@pytest.mark.parametrize("kind", [{}, FP8], ids=["bf16", "fp8"])
def test_odd_widths(kernel_backend, kind, generator):
    check(ops.inputs("mla_sparse_decode", generator, H=2, topk=20, R=130, D=6, page=3, **kind))


@pytest.mark.parametrize("topk", [0, 1, 255, 256, 257, 700])
def test_split_boundaries(kernel_backend, topk, generator):
    """A split has 256 indices at 2 heads. Lengths move the boundaries."""
    size = {"H": 2, "topk": topk, "R": 32, "D": 16, "page": 16, "sink": True, **FP32}
    q, cache, indices, scale, _, *rest = ops.inputs("mla_sparse_decode", generator, **size)
    check((q, cache, indices, scale, None, *rest))
    lengths = torch.tensor([topk - 1, topk // 2], dtype=torch.int32, device=q.device)
    check((q, cache, indices, scale, lengths, *rest))


def test_lengths_clamp_and_limit_indices(backend, generator):
    args = ops.inputs("mla_sparse_decode", generator, B=4, Sq=2, H=2, topk=40, **SMALL)
    q, cache, indices, scale, _, *rest = args
    lengths = torch.tensor([-5, 7, FAR, -FAR - 1], dtype=torch.int32, device=q.device)
    out, lse = check((q, cache, indices, scale, lengths, *rest))
    assert (out[[0, 3]] == 0).all() and (lse[[0, 3]] == -math.inf).all()
    short = deepkern.mla_sparse_decode(q[1:2], cache, indices[1:2, :, :7], scale, None, *rest)
    compare.assert_bitwise(out[1:2], short[0])
    compare.assert_bitwise(lse[1:2], short[1])


@pytest.mark.parametrize("hostile", HOSTILE, ids=["-1", "min", "max", "end"])
def test_indices_out_of_range_are_ignored(backend, hostile, generator):
    args = ops.inputs("mla_sparse_decode", generator, B=1, H=2, topk=40, sink=True, **SMALL, **FP32)
    q, cache, indices, *rest = args
    hostile = cache.shape[0] * cache.shape[1] if hostile == "slots" else hostile
    some = indices.clone()
    some[..., ::3] = hostile
    out, lse = check((q, cache, some, *rest))
    kept = torch.arange(40, device=q.device) % 3 != 0
    want = deepkern.reference.mla_sparse_decode(q, cache, indices[..., kept], *rest)
    compare.assert_close(out, want[0])
    compare.assert_close(lse, want[1])
    out, lse = check((q, cache, torch.full_like(indices, hostile), *rest))
    assert (out == 0).all() and (lse == -math.inf).all()


def test_repeated_index_counts_again(backend, generator):
    """One token 3 times and another once: weights 3/4 and 1/4 where their scores are equal."""
    args = ops.inputs("mla_sparse_decode", generator, B=1, H=2, topk=4, tokens=2, **SMALL, **FP32)
    q, cache, _, scale, *rest = args
    slots = (~cache[..., 0, 0].isnan()).flatten().nonzero()[:, 0].int()  # of the two tokens
    indices = slots[[0, 0, 1, 0]][None, None]
    check((q, cache, indices, scale, *rest))
    out, lse = deepkern.mla_sparse_decode(torch.zeros_like(q), cache, indices, scale, *rest)
    tokens = torch.cat(list(cache))[slots.long(), 0, :64].double()
    want = (0.75 * tokens[0] + 0.25 * tokens[1]).expand(1, 1, 2, 64)
    compare.assert_close(out, want)
    compare.assert_close(lse, torch.full_like(lse, math.log(4)).double())


@pytest.mark.parametrize("topk", [30, 300])
def test_sinks(backend, topk, generator):
    """-inf changes no bit, +inf gives 0; lse stays the same. Also for queries without tokens."""
    args = ops.inputs("mla_sparse_decode", generator, B=2, H=4, topk=topk, **SMALL)
    q, cache, indices, scale, _, _, R = args
    indices[1] = -1
    sink = torch.tensor([math.inf, -math.inf, 0.5, -3.0], device=q.device)
    out, lse = check((q, cache, indices, scale, None, sink, R))
    plain, plain_lse = deepkern.mla_sparse_decode(q, cache, indices, scale, None, None, R)
    compare.assert_bitwise(lse, plain_lse)
    compare.assert_bitwise(out[:, :, 1], plain[:, :, 1])
    assert (out[:, :, 0] == 0).all() and (out[0, :, 1:] != 0).any()
    assert (out[1] == 0).all() and (lse[1] == -math.inf).all()


@pytest.mark.parametrize("kind", [{}, FP8], ids=["bf16", "fp8"])
def test_bits_independent_of_batch(backend, kind, generator):
    """Alone, and in a batch with other queries, of the same sequence too."""
    size = {"B": 3, "Sq": 2, "H": 3, "topk": 600, "lengths": True, "sink": True}
    args = ops.inputs("mla_sparse_decode", generator, **size, **SMALL, **kind)
    q, cache, indices, scale, lengths, *rest = args
    lengths[0] = 599
    out, lse = deepkern.mla_sparse_decode(*args)
    for b in range(3):
        for s in range(2):
            alone, alone_lse = deepkern.mla_sparse_decode(
                q[b : b + 1, s : s + 1], cache, indices[b : b + 1, s : s + 1], scale,
                lengths[b : b + 1], *rest,
            )  # fmt: skip
            compare.assert_bitwise(alone[0, 0], out[b, s])
            compare.assert_bitwise(alone_lse[0, :, 0], lse[b, :, s])


@pytest.mark.parametrize("kind", [{}, FP8], ids=["bf16", "fp8"])
def test_all_indices_equal_mla_decode(backend, kind, generator):
    args = ops.inputs("mla_decode", generator, (300,), Sq=2, H=3, causal=False, **SMALL, **kind)
    q, cache, table, _, scale, _, R = args
    token = torch.arange(300, device=q.device)
    slots = (table[0, token // 16] * 16 + token % 16).int()
    got = deepkern.mla_sparse_decode(
        q, cache, slots.expand(1, 2, 300), scale, None, None, v_head_dim=R
    )
    out, lse = deepkern.mla_decode(*args)
    compare.assert_close(got[0], out)
    compare.assert_close(got[1], lse)


@pytest.mark.parametrize("kind", [{}, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("topk", [1, 2, 200])
def test_error_at_most_twice_that_of_pytorch(backend, kind, topk, generator):
    """Plain PyTorch on the cached tokens in bf16."""
    args = ops.inputs("mla_sparse_decode", generator, B=1, H=16, topk=topk, holes=False, **kind)
    q, cache, indices, scale, *_ = args
    slot = indices[0, 0].long()
    exact_tokens = deepkern.reference.attention.unpack(cache[slot // 64, slot % 64, 0], 512)
    weights = (q[0, 0].double() @ exact_tokens.T * scale).softmax(-1)
    exact = weights @ exact_tokens[:, :512]
    tokens = exact_tokens.bfloat16()
    plain = (q[0, 0].float() @ tokens.float().T * scale).softmax(-1).bfloat16() @ tokens[:, :512]
    got = deepkern.mla_sparse_decode(*args)[0][0, 0]
    compare.assert_close(got, exact)
    assert compare.diff(got, exact) <= 2 * compare.diff(plain, exact) + 1e-6


def test_any_indices_are_safe(generator):
    """Any int32 for an index or a length: the interpreter raises for an access out of bounds."""
    device = generator.device

    def hostile(high, *shape):
        """A third in bounds, a third near the bounds, a third any int32."""
        kind = torch.randint(0, 3, shape, generator=generator, device=device)
        near = torch.randint(-2, high + 3, shape, generator=generator, device=device)
        wide = torch.randint(-FAR - 1, FAR, shape, generator=generator, device=device)
        return torch.where(kind == 0, near.clamp(0, high), torch.where(kind == 1, near, wide)).int()

    for kind in ({}, FP8, FP8):
        args = ops.inputs("mla_sparse_decode", generator, B=3, Sq=2, H=2, topk=300, **SMALL, **kind)
        q, cache, _, scale, _, _, R = args
        slots = cache.shape[0] * cache.shape[1]
        cache = torch.where(cache.isnan(), 0, cache) if cache.dtype != torch.uint8 else cache % 100
        indices, lengths = hostile(slots, 3, 2, 300), hostile(300, 3)
        with deepkern.backend("triton"):
            got = deepkern.mla_sparse_decode(q, cache, indices, scale, lengths, None, R)
        args = q.double(), cache, indices, scale, lengths, None, R
        for g, w in zip(got, deepkern.reference.mla_sparse_decode(*args), strict=True):
            compare.assert_close(g, w)


def test_debug_errors_name_the_argument(generator, monkeypatch):
    args = ops.inputs("mla_sparse_decode", generator, B=1, H=1, topk=5, lengths=True, **SMALL)
    q, cache, indices, scale, lengths, *rest = args
    monkeypatch.setenv("DEEPKERN_DEBUG", "1")
    lengths.fill_(4)
    indices[..., 4] = FAR  # past the length
    deepkern.mla_sparse_decode(*args)
    with pytest.raises(ValueError, match=r"mla_sparse_decode: topk_length: expected lengths in"):
        deepkern.mla_sparse_decode(q, cache, indices, scale, lengths + 2, *rest)
    with pytest.raises(ValueError, match=r"mla_sparse_decode: indices: expected values in \[-1"):
        deepkern.mla_sparse_decode(q, cache, indices, scale, lengths + 1, *rest)


def test_errors(generator):
    args = ops.inputs("mla_sparse_decode", generator, B=1, H=1, **SMALL)
    with pytest.raises(ValueError, match="mla_sparse_decode: v_head_dim: expected a part of"):
        deepkern.mla_sparse_decode(*args[:-1], 81)
    with pytest.raises(ValueError, match="mla_sparse_decode: cache: expected last dimension 80"):
        deepkern.mla_sparse_decode(args[0], args[1][..., :-1], *args[2:])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [{}, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("page", [1, 2, 16, 53, 64, 576])
@pytest.mark.parametrize("Sq", [1, 2, 4])
@pytest.mark.parametrize("H", [1, 3, 9, 16, 63, 64, 126, 128])
def test_flashmla_grid(H, Sq, page, kind, generator):
    for topk, tokens in ((64, 512), (576, 1024), (2048, 2046), (2048, 32768)):
        size = {"B": 4, "topk": topk, "tokens": tokens, "lengths": True, "sink": True}
        args = ops.inputs("mla_sparse_decode", generator, Sq=Sq, H=H, page=page, **size, **kind)
        with deepkern.backend("triton"):
            check(args)
