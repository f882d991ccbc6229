"""csrc/sm90/mla_decode.cuh in the emulator against float64, with bf16 and FP8 caches."""

from __future__ import annotations

import math

import pytest
import torch

import deepkern
from bench.emulator import ORDERS
from deepkern.testing import compare, ops
from deepkern.testing.caches import ABSENT

pytestmark = pytest.mark.slow  # compiles the emulator
LENGTHS = (0, 1, 63, 64, 65, 130)
CACHES = {"bf16": {}, "fp8": {"cache_dtype": torch.uint8}}
# The rounding of this scale to fp16 has the largest error: half an ulp. Weights are scaled by it.
WORST_SCALE = (1 + 2**-11) * 2**-6
caches = pytest.mark.parametrize("kind", CACHES.values(), ids=CACHES)


def check(emulated_mla, args: tuple, **how) -> tuple[torch.Tensor, torch.Tensor]:
    got, want = emulated_mla(*args, **how), deepkern.reference.mla_decode(*args)
    for mine, exact, name in zip(got, want, ("out", "lse"), strict=True):
        compare.assert_close(mine, exact, f"{name} {how}")
    return got


def operands(generator, **size) -> tuple:
    return deepkern.OPS["mla_decode"].positional(ops.inputs("mla_decode", generator, **size))


def assert_same(got: tuple, want: tuple, label: str = "result") -> None:
    for mine, other, name in zip(got, want, ("out", "lse"), strict=True):
        compare.assert_bitwise(mine, other, f"{name} {label}")


# (H, Sq): a part of a row tile, a whole one, two; `proof` has all pairs.
FEW_ROWS = [(1, 1), (3, 2), (16, 4), (40, 2)]
MORE_ROWS = [(H, Sq) for H in (1, 3, 16, 64, 128) for Sq in (1, 2, 4) if (H, Sq) not in FEW_ROWS]


@caches
@pytest.mark.parametrize(
    ("H", "Sq"),
    [*FEW_ROWS, *(pytest.param(*rows, marks=pytest.mark.proof) for rows in MORE_ROWS)],
)
def test_heads_and_queries(emulated_mla, H, Sq, kind, generator):
    """All lengths; from a part of a row tile to several; causal and not."""
    for causal in (True, False):
        args = operands(generator, lengths=LENGTHS, Sq=Sq, H=H, causal=causal, **kind)
        check(emulated_mla, args, seed=generator.seed())


@caches
@pytest.mark.parametrize(
    "page", [1, 64, *(pytest.param(page, marks=pytest.mark.proof) for page in (16, 53, 128))]
)
def test_pages_and_splits(emulated_mla, page, kind, generator):
    """A split of few rows has 512 tokens or more: 1100 are two splits, 1023 one, not combined."""
    args = operands(generator, lengths=(1100, *LENGTHS, 1023), Sq=2, H=3, page=page, **kind)
    got = check(emulated_mla, args)
    assert_same(emulated_mla(*args, by_tma=False), got)


@caches
def test_splits_of_more_rows(emulated_mla, kind, generator):
    """A split of 16 rows has 1024 tokens or more."""
    check(emulated_mla, operands(generator, lengths=(2100, 2047), H=16, **kind))


@caches
@pytest.mark.proof
def test_splits_of_many_rows(emulated_mla, kind, generator):
    """From 64 rows on a split has 4096 tokens or more."""
    check(emulated_mla, operands(generator, lengths=(8200, 8100), H=80, **kind))


@caches
@pytest.mark.parametrize(
    "others", [(7,), pytest.param((2, 7, 1000), marks=pytest.mark.proof)], ids=str
)
def test_bits_independent_of_number_of_blocks(emulated_mla, others, kind, generator):
    """One block for all items; a block with several; more sequences than lanes of a warp."""
    lengths = (1100, 0, 130, *(40 + i for i in range(32)), 64, 1300)
    args = operands(generator, lengths=lengths, Sq=2, H=2, **kind)
    first = check(emulated_mla, args, blocks=1)
    for blocks in others:
        assert_same(emulated_mla(*args, blocks=blocks), first, f"{blocks} blocks")


@caches
@pytest.mark.proof
def test_more_than_64_splits_of_512_tokens(emulated_mla, kind, generator):
    check(emulated_mla, operands(generator, lengths=(33000, 32768), H=2, **kind))


@caches
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("seeds", [2, pytest.param(50, marks=pytest.mark.proof)])
def test_same_bits_for_any_schedule(emulated_mla, order, seeds, kind, generator):
    args = operands(generator, lengths=(200, 70, 1030), Sq=2, H=3, **kind)
    first = check(emulated_mla, args, order=order, seed=0)
    for seed in range(1, seeds if order == "random" else min(seeds, 5)):
        got = emulated_mla(*args, order=order, seed=seed)
        assert_same(got, first, f"seed {seed}")


@caches
def test_bits_independent_of_batch_table_and_rows(emulated_mla, kind, generator):
    q, cache, table, lengths, *rest = operands(
        generator, lengths=(1100, 130, 65), Sq=2, H=40, **kind
    )
    out, lse = emulated_mla(q, cache, table, lengths, *rest)
    for i in range(3):
        one = slice(i, i + 1)
        wide = torch.full((1, 60), ABSENT, dtype=torch.int32)
        wide[:, : table.shape[1]] = table[one]
        got = emulated_mla(q[one], cache, wide, lengths[one], *rest)
        assert_same(got, (out[one], lse[one]), f"sequence {i}")
    # A subset of the heads, in other rows of a row tile.
    few = emulated_mla(q[:, :, 7:24], cache, table, lengths, *rest)
    assert_same(few, (out[:, :, 7:24], lse[:, 7:24]))


@caches
@pytest.mark.parametrize("page", [16, 64])
def test_hostile_tables_and_lengths(emulated_mla, page, kind, generator):
    """Missing pages are masked, lengths are clamped, NaN in unused pages does not spread."""
    q, cache, table, lengths, *rest = operands(
        generator, lengths=(200, 200, 200, 200, 200), Sq=2, H=3, page=page, **kind
    )
    table[0] = torch.tensor([-1, len(cache), 2**31 - 1, -(2**31)]).repeat(table.shape[1])[
        : table.shape[1]
    ]
    table[1, 1], table[2, 0], table[3, -1] = -1, len(cache), ABSENT
    args = q, cache, table, lengths, *rest
    out, lse = check(emulated_mla, args)
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all()
    for hostile in ([-1, -(2**31), 0, 1, 200], [2, 3, 64, 65, 199]):
        check(emulated_mla, (*args[:3], torch.tensor(hostile, dtype=torch.int32), *rest))
    poison = cache == 0xFF if kind else cache.isnan()
    filled = cache.masked_fill(poison, 0)
    most = torch.full((5,), 2**31 - 1, dtype=torch.int32)
    check(emulated_mla, (q, filled, table, most, *rest))


@caches
def test_strides_and_no_tokens(emulated_mla, kind, generator):
    """Any order of heads and queries; a table without pages, a cache without pages."""
    q, cache, table, lengths, *rest = operands(generator, lengths=(70, 9), Sq=2, H=5, **kind)
    permuted = q.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    got = check(emulated_mla, (permuted, cache, table, lengths, *rest))
    assert_same(got, emulated_mla(q, cache, table, lengths, *rest))
    for no_cache, no_table in ((cache, table[:, :0]), (cache[:0], table)):
        out, lse = emulated_mla(q, no_cache, no_table, lengths, *rest)
        assert (out == 0).all() and (lse == -torch.inf).all()


@caches
def test_scores_of_any_size(emulated_mla, kind, generator):
    """One token with almost all the weight; scores far below zero."""
    q, cache, table, lengths, _, *rest = operands(generator, lengths=(130, 65), H=3, **kind)
    for scale in (0.0, -3.0, 20.0):
        check(emulated_mla, (q, cache, table, lengths, scale, *rest))
    q[0, 0, 1] = torch.nan
    out, lse = emulated_mla(q, cache, table, lengths, 0.04, *rest)
    assert out[0, 0, 1].isnan().all() and lse[0, 1, 0].isnan()
    assert not out[0, 0, ::2].isnan().any() and not out[1].isnan().any()


def scales_of(cache: torch.Tensor) -> torch.Tensor:
    """A view of the scales of an FP8 cache."""
    return cache[..., 512:528].view(torch.float32)


def test_scales_of_any_size(emulated_mla, generator):
    """Zero, subnormal, huge and negative scales; the largest codes."""
    kind = CACHES["fp8"]
    q, cache, table, lengths, *rest = operands(generator, lengths=(130, 65), Sq=2, H=3, **kind)
    used = ~(cache == 0xFF).all(-1, keepdim=True)
    scale = scales_of(cache)
    for extreme in (0.0, 1e-40, 1e-45, 1e-30, 1e4, -3e-3):
        for block in range(4):
            scale[:, block::5, :, block] = extreme
        cache[:, ::3, :, :128] = 0x7E  # 448
        poisoned = cache.masked_fill(~used, 0xFF)
        check(emulated_mla, (q, poisoned, table, lengths, *rest))


def test_the_largest_scale(emulated_mla, generator):
    """A token with scale 2^126 has all the weight, or the same as each other one."""
    kind = CACHES["fp8"]
    q, cache, table, lengths, *rest = operands(generator, lengths=(130,), H=3, **kind)
    q[:] = 0.0
    q[..., 0] = 2.0**-20
    cache[..., :512] = 0x38  # 1
    scales_of(cache)[:] = 1.0
    page, slot = table[0, 70 // cache.shape[1]], 70 % cache.shape[1]
    scales_of(cache)[page, slot] = 2.0**126
    out, _ = check(emulated_mla, (q, cache, table, lengths, *rest))
    assert (out.float() == 2.0**126).all()
    q[:] = 0.0
    out, _ = check(emulated_mla, (q, cache, table, lengths, *rest))
    assert (out.float() > 2.0**118).all() and out.isfinite().all()


def small_weights(generator) -> tuple:
    """A token with the weight 1 and small values, and one with a small weight and large values."""
    args = operands(generator, lengths=(2,), H=3, page=64, **CACHES["fp8"])
    q, cache, table, lengths, _, *rest = args
    score = torch.tensor(-math.log(22.5 * 2.0**-24))  # of the first; that of the second is 0
    high = score.bfloat16()
    cache[table[0, 0], :2, :, :512] = 0x38  # 1
    scales_of(cache)[table[0, 0], :2] = torch.tensor([2.0**-20, 1.0])[:, None, None]
    rope = cache[table[0, 0], :2, 0, 528:].view(torch.bfloat16)
    q[:], rope[:] = 0.0, 0.0
    q[..., 512:514], rope[0, 0], rope[0, 1] = 1.0, high, score - high
    return q, cache, table, lengths, 1.0, *rest


def test_small_weights(emulated_mla, generator):
    """A weight of 22.5 · 2^-24 is between two values of fp16, and not when it is larger by 2^7."""
    check(emulated_mla, small_weights(generator))


def test_infinite_scale(emulated_mla, generator):
    """It makes the row NaN, as codes of both signs do in the oracle."""
    args = operands(generator, lengths=(130, 65), H=3, **CACHES["fp8"])
    q, cache, table, *_ = args
    page = cache.shape[1]
    for block, scale in enumerate((torch.inf, -torch.inf)):
        scales_of(cache)[table[0, 70 // page], 70 % page, 0, block] = scale
        out, lse = check(emulated_mla, args)
        assert out[0].isnan().all() and lse[0].isnan().all() and not out[1].isnan().any()


@pytest.mark.parametrize("at", [0, 300, 511, 512, 524, 600])
def test_nan_reaches_only_its_token(emulated_mla, at, generator):
    """NaN in a code, a scale or a RoPE value. If a query masks the token, the result matches the
    oracle: NaN in the columns of that NaN only."""
    kind = CACHES["fp8"]
    q, cache, table, lengths, *rest = operands(
        generator, lengths=(130, 65), Sq=2, H=3, page=64, **kind
    )
    for token in (69, 129):
        spoiled = cache.clone()
        spoiled[table[0, token // 64], token % 64, 0, at : at + 4] = 0xFF
        out, _ = check(emulated_mla, (q, spoiled, table, lengths, *rest))
        assert out[0, 1].isnan().all() and not out[1].isnan().any()
        assert out[0, 0].isnan().all() == (token == 69)
        shorter = torch.tensor([token, 65], dtype=torch.int32)
        out, _ = check(emulated_mla, (q, spoiled, table, shorter, *rest))
        assert not out.isnan().any()


def test_rounding_of_scales_is_small_for_one_token(emulated_mla, generator):
    q, cache, table, lengths, *rest = operands(generator, lengths=(1,) * 4, H=3, **CACHES["fp8"])
    scales_of(cache)[table[:, 0], 0] = WORST_SCALE
    args = q, cache, table, lengths, *rest
    got, want = emulated_mla(*args)[0], deepkern.reference.mla_decode(*args)[0]
    assert compare.diff(got, want) < 1e-6


@pytest.mark.parametrize("length", [1, 3, 150])
@caches
def test_no_worse_than_twice_plain_pytorch(emulated_mla, length, kind, generator):
    """Plain PyTorch: softmax in fp32, the rest in bf16, an FP8 cache dequantized to bf16."""
    args = operands(generator, lengths=(length,), H=8, **kind)
    q, cache, table, _, scale, *_ = args
    tokens = torch.cat([cache[i] for i in table[0]])[:length, 0]
    keys = deepkern.reference.attention.unpack(tokens, 512)
    queries = q[0, 0].double()
    exact = (queries @ keys.T * scale).softmax(-1) @ keys[:, :512]
    keys = keys.bfloat16()
    scores = (q[0, 0].float() @ keys.float().T * scale).softmax(-1)
    plain = scores.bfloat16() @ keys[:, :512]
    got = emulated_mla(*args)[0][0, 0]
    assert compare.diff(got, exact) <= 2 * compare.diff(plain, exact) + 1e-6


def test_unsupported_arguments(generator):
    """Other arguments use the Triton kernel; the reason is what `explain` prints."""
    unsupported_reason = deepkern.OPS["mla_decode"].limits["cuda"]
    for kind in CACHES.values():
        q, cache, *rest = operands(generator, lengths=(9,), **kind)
        assert unsupported_reason(q, cache, *rest) is None
        page_0 = cache[:1].as_strided(cache[:1].shape, (7, *cache.stride()[1:]))
        assert unsupported_reason(q, page_0, *rest) is None
        apart = torch.nn.functional.pad(cache, (0, 4))[..., :-4]
        assert "tokens at multiples of 16 bytes" in unsupported_reason(q, apart, *rest)
        assert "a cache at a multiple of 16 bytes" in unsupported_reason(q, cache[..., 1:], *rest)
        assert "q in bfloat16" in unsupported_reason(q.half(), cache, *rest)
    assert "512 + 64 values" in unsupported_reason(*operands(generator, lengths=(9,), D=32))
