"""mla_cache_gather: both formats, chunks, hostile tables and offsets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deepkern
from deepkern.runtime import arch
from deepkern.testing import caches, compare, ops

SMALL = {"R": 32, "D": 8, "page": 4}
FAR = 2**31 - 1
REAL = [torch.bfloat16, torch.float16, torch.float32]


def matches(args: tuple) -> torch.Tensor:
    """The op's result, after a bitwise comparison with the oracle."""
    got = deepkern.mla_cache_gather(*args)
    compare.assert_bitwise(got, deepkern.reference.mla_cache_gather(*args))
    return got


@pytest.mark.parametrize("page", [1, 2, 53, 64])
def test_gather_returns_what_append_wrote(backend, page, generator):
    """bf16 through a bf16 cache: the same bits, in the order of the positions."""
    T, device = 70, generator.device
    latent = torch.randn(T, 64, generator=generator, device=device).bfloat16()
    k_rope = torch.randn(T, 16, generator=generator, device=device).bfloat16()
    blocks = -(-T // page) + 2
    cache = caches.empty_cache(generator, blocks, page, 64, 16)
    table = torch.randperm(blocks, generator=generator, device=device).int()[None]
    token = torch.arange(T, device=device)
    deepkern.mla_cache_append(
        latent, k_rope, cache, table[0].long()[token // page] * page + token % page
    )
    for start, end in ((0, T), (0, 33), (33, T), (7, 8), (9, 9)):
        offsets = torch.tensor([0, end - start], dtype=torch.int32, device=device)
        starts = torch.tensor([start], dtype=torch.int32, device=device)
        got = deepkern.mla_cache_gather(cache, table, offsets, end - start, 64, starts)
        compare.assert_bitwise(got, torch.cat((latent, k_rope), 1)[start:end])


@pytest.mark.parametrize("out_dtype", REAL, ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_fp8_is_value_times_scale(backend, target, out_dtype, generator):
    """The V3.2 layout, read here byte by byte through numpy."""
    with arch.compile_for(arch.ARCHS[target]):
        args = ops.inputs(
            "mla_cache_gather",
            generator,
            (5, 3),
            page=2,
            cache_dtype=torch.uint8,
            out_dtype=out_dtype,
        )
        got = deepkern.mla_cache_gather(*args)
    cache, table = args[:2]
    row = 0
    for b, length in enumerate((5, 3)):
        for position in range(length):
            entry = cache[table[b, position // 2], position % 2, 0].cpu().numpy()
            values = torch.from_numpy(entry[:512].copy()).view(torch.float8_e4m3fn).float()
            scales = torch.from_numpy(entry[512:528].view("float32").copy())
            rope = torch.from_numpy(entry[528:].copy()).view(torch.bfloat16).float()
            want = torch.cat(((values.view(4, 128) * scales[:, None]).flatten(), rope))
            compare.assert_bitwise(got[row].cpu(), want.to(out_dtype))
            row += 1


@pytest.mark.parametrize("cache_dtype", REAL, ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("out_dtype", REAL, ids=["bf16", "fp16", "fp32"])
def test_dtypes(kernel_backend, cache_dtype, out_dtype, generator):
    matches(ops.inputs("mla_cache_gather", 
        generator, (5, 2), **SMALL, cache_dtype=cache_dtype, out_dtype=out_dtype
    ))  # fmt: skip


def test_rows_without_token_are_zero(backend, generator):
    args = list(ops.inputs("mla_cache_gather", generator, (5, 0, 3), **SMALL, more=20))
    got = matches(tuple(args))
    assert (got[8:] == 0).all() and (got[:8] != 0).any(1).all()
    args[2] = args[2] + 4  # four rows before the first sequence
    shifted = matches(tuple(args))
    assert (shifted[:4] == 0).all()
    compare.assert_bitwise(shifted[4:12], got[:8])


@pytest.mark.parametrize(
    "hostile",
    [-1, -FAR - 1, FAR, "blocks", caches.ABSENT],
    ids=["-1", "min", "max", "end", "unused"],
)
def test_pages_out_of_range_give_zeros(backend, hostile, generator):
    args = ops.inputs("mla_cache_gather", generator, (10,), **SMALL)
    table = args[1].clone()
    table[0, 1] = args[0].shape[0] if hostile == "blocks" else hostile
    got = matches((args[0], table, *args[2:]))
    assert (got[4:8] == 0).all()
    want = deepkern.mla_cache_gather(*args)
    compare.assert_bitwise(got[:4], want[:4])
    compare.assert_bitwise(got[8:], want[8:])


def test_tokens_outside_the_table_give_zeros(backend, generator):
    args = ops.inputs("mla_cache_gather", generator, (8,), (8,), **SMALL)
    starts = args[5]
    for moved, zeros in ((-3, slice(0, 3)), (3, slice(5, 8))):
        got = matches((*args[:5], starts + moved, args[6]))
        assert (got[zeros] == 0).all() and (got != 0).any(1).sum() == 5
    for far in (FAR, -FAR - 1, FAR - 3):
        assert (matches((*args[:5], torch.full_like(starts, far), args[6])) == 0).all()


numbers = st.one_of(
    st.integers(-3, 12), st.sampled_from([FAR, -FAR - 1, caches.ABSENT, FAR - 2, 2**30])
)


@settings(max_examples=40, deadline=None)
@given(
    table=st.lists(numbers, min_size=6, max_size=6),
    offsets=st.lists(numbers, min_size=4, max_size=4),
    starts=st.lists(numbers, min_size=3, max_size=3),
    fp8=st.booleans(),
)
def test_any_table_and_offsets_are_safe(table, offsets, starts, fp8):
    """The interpreter checks every access; the result equals the oracle's."""
    generator = torch.Generator().manual_seed(0)
    cache = caches.empty_cache(generator, 4, 3, 20, 4, torch.uint8 if fp8 else torch.bfloat16)
    cache.copy_(torch.randint(0, 100, cache.shape, generator=generator).to(cache.dtype))
    ints = [torch.tensor(x, dtype=torch.int32) for x in (table, offsets, starts)]
    args = cache, ints[0].view(3, 2), ints[1], 11, 20, ints[2], torch.float32
    with deepkern.backend("triton"):
        matches(args)


def test_debug_errors_name_the_argument(generator, monkeypatch):
    monkeypatch.setenv("DEEPKERN_DEBUG", "1")
    cache, table, offsets, total, R, starts, dtype = ops.inputs(
        "mla_cache_gather", generator, (10, 6), (4, 6), **SMALL
    )
    deepkern.mla_cache_gather(cache, table, offsets, total, R, starts, dtype)
    for change, argument, words in (
        ({"total_tokens": total - 1}, "cu_seqlens", "offsets ascending in"),
        ({"cu_seqlens": offsets.flip(0)}, "cu_seqlens", "offsets ascending in"),
        ({"starts": starts - 7}, "starts", "tokens in"),
        ({"starts": starts + 7}, "starts", "tokens in"),
        ({"block_table": table + 50}, "block_table", "pages in"),
    ):
        given = {"cache": cache, "block_table": table, "cu_seqlens": offsets,
                 "total_tokens": total, "v_head_dim": R, "starts": starts} | change  # fmt: skip
        with pytest.raises(ValueError, match=f"mla_cache_gather: {argument}: expected {words}"):
            deepkern.mla_cache_gather(**given)


def test_errors(generator):
    cache, table, offsets, total, R, *_ = ops.inputs("mla_cache_gather", generator, (5,), **SMALL)
    with pytest.raises(ValueError, match="mla_cache_gather: total_tokens: expected at least 0"):
        deepkern.mla_cache_gather(cache, table, offsets, -1, R)
    with pytest.raises(ValueError, match="mla_cache_gather: v_head_dim: expected latents that fit"):
        deepkern.mla_cache_gather(cache, table, offsets, total, 41)
    with pytest.raises(ValueError, match="mla_cache_gather: out_dtype: expected torch.bfloat16"):
        deepkern.mla_cache_gather(cache, table, offsets, total, R, out_dtype=torch.float64)
