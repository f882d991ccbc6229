"""Sparse attention of csrc/sm90/mla_decode.cuh in the emulator against float64.

Slots of the cache that no index names are poisoned.
"""

from __future__ import annotations

import pytest
import torch

import deepkern
from bench.emulator import ORDERS, build, sources
from deepkern.testing import compare, ops
from deepkern.testing.sparse_attention import OPTIONS, token_mask

from .test_mla_decode import CACHES, caches, scales_of

FAR = 2**31 - 1


def operands(generator, **size) -> tuple:
    """Arguments of mla_sparse_decode; only the slots that an index names are not poisoned."""
    args = deepkern.OPS["mla_sparse_decode"].positional(
        ops.inputs("mla_sparse_decode", generator, **size)
    )
    return poisoned(args)


def poisoned(args: tuple) -> tuple:
    q, cache, indices, scale, topk_length, *rest = args
    pages, page = cache.shape[:2]
    mask = token_mask(indices, pages * page, topk_length)
    named = torch.zeros(pages * page, dtype=torch.bool)
    named[indices[mask].long()] = True
    poison = 0xFF if cache.dtype == torch.uint8 else torch.nan
    cache = cache.masked_fill(~named.view(pages, page, 1, 1), poison)
    return q, cache, indices, scale, topk_length, *rest


def check(emulated_sparse, args: tuple, **how) -> tuple[torch.Tensor, torch.Tensor]:
    got = emulated_sparse(*args, **how)
    want = deepkern.reference.mla_sparse_decode(args[0].double(), *args[1:])
    for mine, exact, name in zip(got, want, ("out", "lse"), strict=True):
        compare.assert_close(mine, exact, f"{name} {how}")
    return got


def assert_same(got: tuple, want: tuple, label: str = "result") -> None:
    for mine, other, name in zip(got, want, ("out", "lse", "max_logits"), strict=False):
        compare.assert_bitwise(mine, other, f"{name} {label}")


pytestmark = pytest.mark.slow  # compiles the emulator
PROOF = pytest.mark.proof


@caches
@pytest.mark.parametrize(("Sq", "H"), [
    (2, 3), (1, 64), *(pytest.param(*x, marks=PROOF) for x in ((1, 1), (2, 16), (2, 128)))
])  # fmt: skip
def test_heads_and_queries(emulated_sparse, H, Sq, kind, generator):
    """From a part of a row tile to several, with lengths and sinks."""
    args = operands(generator, B=3, Sq=Sq, H=H, topk=130, **kind, **OPTIONS)
    check(emulated_sparse, args, seed=generator.seed())


@caches
@pytest.mark.parametrize("topk", [0, 1, 63, 65, 128, pytest.param(200, marks=PROOF)])
def test_any_topk(emulated_sparse, topk, kind, generator):
    check(emulated_sparse, operands(generator, B=2, H=5, topk=topk, tokens=300, **kind))


@caches
@pytest.mark.parametrize("page", [53, *(pytest.param(x, marks=PROOF) for x in (1, 64))])
def test_pages_and_splits(emulated_sparse, page, kind, generator):
    """A split of few rows has 512 tokens or more. A cache with gaps between its pages has the
    bits of one without."""
    size = {"H": 3, "topk": 1100, "tokens": 500, "page": page, "sink": True, **kind}
    q, cache, *rest = operands(generator, **size)
    rest[2] = torch.tensor([1100, 700], dtype=torch.int32)
    q, cache, *rest = poisoned((q, cache, *rest))
    got = check(emulated_sparse, (q, cache, *rest))
    apart = torch.zeros((2 * len(cache), *cache.shape[1:]), dtype=cache.dtype)[::2]
    apart.copy_(cache)
    assert_same(emulated_sparse(q, apart, *rest), got)


@caches
def test_splits_of_more_rows(emulated_sparse, kind, generator):
    """A split of 16 heads has 1024 tokens or more: 2100 are two, 2047 one."""
    args = list(operands(generator, B=2, H=16, topk=2100, tokens=900, sink=True, **kind))
    args[4] = torch.tensor([2100, 2047], dtype=torch.int32)
    check(emulated_sparse, poisoned(tuple(args)))


@caches
@PROOF
def test_splits_of_many_rows(emulated_sparse, kind, generator):
    """From 64 heads on a split has 4096 tokens or more: 8200 are two."""
    size = {"B": 1, "H": 80, "topk": 8200, "tokens": 3000, "sink": True, **kind}
    check(emulated_sparse, operands(generator, **size))


@caches
def test_hostile_indices_and_lengths(emulated_sparse, kind, generator):
    """Indices out of range are absent tokens, lengths are clamped."""
    q, cache, indices, *rest = operands(generator, B=5, H=3, topk=200, **kind)
    slots = cache.shape[0] * cache.shape[1]
    outside = torch.tensor([-1, -FAR - 1, FAR, slots, slots + 64, -64], dtype=torch.int32)
    indices[0] = outside.repeat(34)[:200]
    indices[1, :, ::3] = outside.repeat(12)[:67]
    indices[2, :, :64], indices[3, :, 64:] = slots, -2
    indices[4, :, 130:] = FAR
    args = poisoned((q, cache, indices, *rest))
    out, lse = check(emulated_sparse, args)
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all()
    for lengths in ([-1, -FAR - 1, 0, 1, FAR], [200, 63, 64, 65, 201]):
        topk_length = torch.tensor(lengths, dtype=torch.int32)
        check(emulated_sparse, poisoned((q, cache, indices, rest[0], topk_length, *rest[2:])))


@caches
def test_queries_without_tokens(emulated_sparse, kind, generator):
    """All indices -1, a cache without pages; any sink."""
    q, cache, indices, *rest = operands(generator, B=2, H=4, topk=70, **kind)
    rest[2] = torch.tensor([0.0, -torch.inf, torch.inf, torch.nan])
    indices[:] = -1
    for empty in (cache, cache[:0], cache[:, :0]):
        out, lse = emulated_sparse(q, empty, indices, *rest)
        assert (out == 0).all() and (lse == -torch.inf).all()


@caches
def test_duplicates(emulated_sparse, kind, generator):
    """A token counts once for each of its occurrences."""
    q, cache, indices, *rest = operands(generator, H=3, topk=150, tokens=7, holes=False, **kind)
    check(emulated_sparse, (q, cache, indices, *rest))
    indices[:] = indices[..., :1].clone()
    _, lse = check(emulated_sparse, poisoned((q, cache, indices, *rest)))
    _, once = emulated_sparse(q, cache, indices[..., :1].contiguous(), *rest)
    torch.testing.assert_close(lse, once + torch.tensor(150.0).log())


@caches
def test_sinks(emulated_sparse, kind, generator):
    args = list(operands(generator, H=6, topk=90, **kind))
    args[5] = torch.tensor([-torch.inf, torch.inf, 0.0, 300.0, -300.0, torch.nan])
    out, _ = check(emulated_sparse, tuple(args))
    assert (out[:, :, 1] == 0).all() and out[:, :, 5].isnan().all()


@caches
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("seeds", [3, pytest.param(50, marks=PROOF)])
def test_same_bits_for_any_schedule(emulated_sparse, order, seeds, kind, generator):
    args = operands(generator, B=2, H=3, topk=330, tokens=200, **kind, **OPTIONS)
    first = check(emulated_sparse, args, order=order, seed=0)
    for seed in range(1, seeds if order == "random" else 3):
        assert_same(emulated_sparse(*args, order=order, seed=seed), first, f"seed {seed}")


@caches
def test_bits_independent_of_batch_heads_and_blocks(emulated_sparse, kind, generator):
    size = {"B": 2, "Sq": 2, "H": 40, "topk": 140, "sink": True, **kind}
    q, cache, indices, scale, lengths, sink, R = operands(generator, **size)
    out, lse = check(emulated_sparse, (q, cache, indices, scale, lengths, sink, R), blocks=1)
    for blocks in (2, 1000):
        got = emulated_sparse(q, cache, indices, scale, lengths, sink, blocks=blocks)
        assert_same(got, (out, lse), f"{blocks} blocks")
    for b in range(2):
        one = slice(b, b + 1)
        alone = emulated_sparse(q[one, 1:], cache, indices[one, 1:], scale, lengths, sink)
        assert_same(alone, (out[one, 1:], lse[one, :, 1:]), f"sequence {b}")
    few = emulated_sparse(q[:, :, 7:24], cache, indices, scale, lengths, sink[7:24])
    assert_same(few, (out[:, :, 7:24], lse[:, 7:24]))


@caches
def test_bits_of_splits_independent_of_batch_heads_and_topk(emulated_sparse, kind, generator):
    """Two splits of 3 heads; alone, with fewer heads, with more indices than the length."""
    size = {"B": 2, "Sq": 2, "H": 3, "topk": 1100, "tokens": 500, "sink": True, **kind}
    q, cache, indices, scale, _, sink, R = operands(generator, **size)
    lengths = torch.tensor([1100, 1030], dtype=torch.int32)
    out, lse = check(emulated_sparse, (q, cache, indices, scale, lengths, sink, R), blocks=1)
    for b in range(2):
        one = slice(b, b + 1)
        wide = torch.nn.functional.pad(indices[one, 1:], (0, 900), value=3)
        alone = emulated_sparse(q[one, 1:], cache, wide, scale, lengths[one], sink, blocks=5)
        assert_same(alone, (out[one, 1:], lse[one, :, 1:]), f"sequence {b}")
    few = emulated_sparse(q[:, :, 1:2], cache, indices, scale, lengths, sink[1:2])
    assert_same(few, (out[:, :, 1:2], lse[:, 1:2]))


@caches
@PROOF
def test_more_queries_than_lanes(emulated_sparse, kind, generator):
    """The producer walks over the queries 32 at a time; the lengths differ."""
    size = {"B": 35, "Sq": 2, "H": 2, "topk": 70, **kind, **OPTIONS}
    check(emulated_sparse, operands(generator, **size), blocks=2)


@caches
def test_dense_decode_has_the_same_bits(emulated_sparse, emulated_mla, kind, generator):
    """The indices 0, 1, 2 .. of a contiguous sequence."""
    args = ops.inputs("mla_decode", generator, lengths=(300,), H=16, page=64, **kind)
    q, cache, table, _, scale, *_ = args
    slots = torch.arange(300)
    indices = (table[0, slots // 64] * 64 + (slots % 64).int()).view(1, 1, 300)
    assert_same(emulated_sparse(q, cache, indices, scale), emulated_mla(*args))


def test_nan_reaches_only_its_queries(emulated_sparse, generator):
    args = operands(generator, B=2, H=3, topk=100, holes=False, **CACHES["fp8"])
    q, cache, indices, *rest = args
    shared = int(indices[0, 0, 70])
    indices[1][indices[1] == shared] = -1
    page = cache.shape[1]
    scales_of(cache)[shared // page, shared % page, 0, 1] = torch.nan
    out, _ = check(emulated_sparse, (q, cache, indices, *rest))
    assert out[0].isnan().any() and not out[1].isnan().any()


def prefill_operands(generator, **size) -> tuple:
    return deepkern.OPS["mla_sparse_prefill"].positional(
        ops.inputs("mla_sparse_prefill", generator, **size)
    )


def run_prefill(emulated_sparse, args: tuple, **how) -> tuple[torch.Tensor, ...]:
    """Queries are sequences, rows of kv are pages of one token."""
    q, kv, indices, scale, _, sink, lengths = args
    out, lse, largest = emulated_sparse(
        q[:, None], kv[:, None], indices, scale, lengths, sink, largest=True, **how
    )
    return out[:, 0], largest[..., 0], lse[..., 0]


def check_prefill(emulated_sparse, args: tuple, **how) -> tuple[torch.Tensor, ...]:
    got = run_prefill(emulated_sparse, args, **how)
    want = deepkern.reference.mla_sparse_prefill(args[0].double(), *args[1:])
    for mine, exact, name in zip(got, want, ("out", "max_logits", "lse"), strict=True):
        compare.assert_close(mine, exact, f"{name} {how}")
    return got


@pytest.mark.parametrize("H", [1, 9, 64, pytest.param(128, marks=PROOF)])
def test_prefill(emulated_sparse, H, generator):
    args = prefill_operands(generator, S=5, Skv=300, H=H, topk=150, **OPTIONS)
    got = check_prefill(emulated_sparse, args, seed=generator.seed())
    again = run_prefill(emulated_sparse, args, blocks=1, order="latest")
    assert_same(again, got)


def test_copies_of_two_tiles_are_in_flight(emulated_sparse, emulated_mla, generator):
    """A thread does not wait for the 36 copies of a tile before it starts those of the next one. It
    does in mla_decode."""
    library = build(sources())
    library.emulate_most_copies()
    args = prefill_operands(generator, S=1, Skv=300, H=3, topk=300)
    check_prefill(emulated_sparse, args, order="latest")
    assert library.emulate_most_copies() == 2 * 36
    args = ops.inputs("mla_decode", generator, lengths=(300,), H=3, page=16)
    emulated_mla(*deepkern.OPS["mla_decode"].positional(args), order="latest")
    assert library.emulate_most_copies() == 36


def test_prefill_has_no_splits(emulated_sparse, generator):
    check_prefill(emulated_sparse, prefill_operands(generator, S=2, Skv=300, H=2, topk=1100))


def test_prefill_scores_of_any_size(emulated_sparse, generator):
    """One key with almost all the weight; scale 0 and negative; NaN in a query."""
    q, kv, indices, _, *rest = prefill_operands(generator, S=3, Skv=90, H=3, topk=130)
    indices[2] = -1
    for scale in (0.0, -3.0, 20.0):
        check_prefill(emulated_sparse, (q, kv, indices, scale, *rest))
    q[0, 1] = torch.nan
    out, largest, lse = check_prefill(emulated_sparse, (q, kv, indices, 0.04, *rest))
    assert out[0, 1].isnan().all() and largest[0, 1].isnan() and lse[0, 1].isnan()


@pytest.mark.parametrize("scale", [0.04, -0.04])
def test_prefill_infinite_scores(emulated_sparse, scale, generator):
    """+inf, also together with NaN, in keys that some queries name; -inf has no weight."""
    q, kv, indices, _, *rest = prefill_operands(generator, S=6, Skv=90, H=3, topk=70)
    indices[:] = torch.arange(70, dtype=torch.int32)
    q[..., 5] = q[..., 5].abs() + 1
    kv[70:, 0, 5] = torch.tensor([1.0, -1.0, torch.nan] * 7)[:20] * torch.inf * scale
    for query, named in enumerate(([70], [71], [72], [70, 72], [71, 72], [70, 71])):
        indices[query, 0, 40 : 40 + len(named)] = torch.tensor(named, dtype=torch.int32)
    _, largest, lse = check_prefill(emulated_sparse, (q, kv, indices, scale, *rest))
    assert (largest[0] == torch.inf).all() and (largest[5] == torch.inf).all()
    assert largest[1].isfinite().all() and lse[1].isfinite().all()
    assert largest[2:5].isnan().all() and lse[2:].isnan().all() and lse[0].isnan().all()


@pytest.mark.parametrize("topk", [1, 3, 150])
@caches
def test_no_worse_than_twice_plain_pytorch(emulated_sparse, topk, kind, generator):
    """Plain PyTorch: softmax in fp32, the rest in bf16, an FP8 cache dequantized to bf16."""
    args = operands(generator, B=1, H=8, topk=topk, tokens=200, holes=False, **kind)
    q, cache, indices, scale, *_ = args
    slot = indices[0, 0].long()
    page = cache.shape[1]
    keys = deepkern.reference.attention.unpack(cache[slot // page, slot % page, 0], 512)
    queries = q[0, 0].double()
    exact = (queries @ keys.T * scale).softmax(-1) @ keys[:, :512]
    keys = keys.bfloat16()
    scores = (q[0, 0].float() @ keys.float().T * scale).softmax(-1)
    plain = scores.bfloat16() @ keys[:, :512]
    got = emulated_sparse(*args)[0][0, 0]
    assert compare.diff(got, exact) <= 2 * compare.diff(plain, exact) + 1e-6


def test_unsupported_arguments(generator):
    """Other arguments use the Triton kernel; the reason is what `explain` prints."""
    decode = deepkern.OPS["mla_sparse_decode"].limits["cuda"]
    prefill = deepkern.OPS["mla_sparse_prefill"].limits["cuda"]
    for kind in CACHES.values():
        q, cache, *rest = operands(generator, **kind)
        assert decode(q, cache, *rest) is None
        apart = torch.nn.functional.pad(cache, (0, 4))[..., :-4]
        assert "tokens at multiples of 16 bytes" in decode(q, apart, *rest)
        assert "q in bfloat16" in decode(q.half(), cache, *rest)
    q, kv, *rest = prefill_operands(generator)
    assert prefill(q, kv, *rest) is None
    assert "q in bfloat16" in prefill(q.half(), kv.half(), *rest)
    assert "512 + 64 values" in prefill(*prefill_operands(generator, D=32))
