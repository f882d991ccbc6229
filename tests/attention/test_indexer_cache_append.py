"""indexer_cache_append: the bytes of a page, scales of both formats, skipped slots."""

from __future__ import annotations

import pytest
import torch

import deepkern
from deepkern.runtime import arch
from deepkern.testing import caches, compare, ops

FP8 = torch.float8_e4m3fn
INT32_MAX = 2**31 - 1


def append(k, cache, slots, *rest) -> torch.Tensor:
    """A copy of the cache with the keys appended."""
    cache = cache.clone()
    assert deepkern.indexer_cache_append(k, cache, slots, *rest) is None
    return cache


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90", "gfx942"])
@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
def test_bytes_of_a_page(backend, target, scale_format, generator):
    """DeepGEMM's layout: the values of all tokens, then their scales; cast as by cast_per_token."""
    page, D = 3, 128
    k = torch.randn(4, D, generator=generator, device=generator.device).bfloat16()
    k[3] = 0
    cache = caches.empty_indexer_cache(generator, 2, page, D)
    slots = torch.tensor([4, -1, 0, 5], device=k.device)
    with arch.compile_for(arch.ARCHS[target]):
        deepkern.indexer_cache_append(k, cache, slots, scale_format)
    q, scale = deepkern.reference.cast_per_token(k, scale_format)
    pages = cache.flatten(1)
    for token, slot in ((0, 4), (2, 0), (3, 5)):
        block, offset = divmod(slot, page)
        values = pages[block, offset * D : (offset + 1) * D]
        compare.assert_bitwise(values.view(FP8), q[token])
        begin = page * D + 4 * offset
        compare.assert_bitwise(pages[block, begin : begin + 4].view(torch.float32), scale[token])
    written = torch.zeros_like(pages, dtype=torch.bool)
    for slot in (4, 0, 5):
        block, offset = divmod(slot, page)
        written[block, offset * D : (offset + 1) * D] = True
        written[block, page * D + 4 * offset : page * D + 4 * offset + 4] = True
    assert (pages[~written] == 0xFF).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("page", [1, 2, 53])
@pytest.mark.parametrize("D", [1, 64, 130, 300])
def test_widths_and_pages(backend, dtype, page, D, generator):
    """With odd widths the scales are not aligned."""
    k, cache, slots = ops.inputs("indexer_cache_append", generator, 9, D=D, page=page, dtype=dtype)
    want = cache.clone()
    deepkern.reference.indexer_cache_append(k, want, slots, "ue8m0")
    compare.assert_bitwise(append(k, cache, slots, "ue8m0"), want)
    deepkern.indexer_cache_append(k, cache, slots, "ue8m0")  # in place, with strided pages
    compare.assert_bitwise(cache, want)


def test_hostile_slots_write_nothing(backend, generator):
    k, cache, _ = ops.inputs("indexer_cache_append", generator, 7, D=32, page=4)
    slots = cache.shape[0] * cache.shape[1]
    hostile = [-1, -(2**63), 2**63 - 1, slots, INT32_MAX, -INT32_MAX - 1, 2**32]
    slots = torch.tensor(hostile, device=k.device)
    compare.assert_bitwise(append(k, cache, slots), cache)


def test_nan_and_inf_do_not_spread(backend, generator):
    k, cache, _ = ops.inputs("indexer_cache_append", generator, 3, D=64, page=4)
    slots = torch.arange(3, device=k.device)
    clean = append(k, cache, slots)
    k[1, 5], k[2, 0] = torch.inf, torch.nan
    got = append(k, cache, slots)
    values, scales = deepkern.reference.indexer.pages(got, 64)
    assert values[0, 1:3].contiguous().view(FP8).float().isnan().all()
    assert scales[0, 1:3].contiguous().view(torch.float32).isnan().all()
    changed = (got != clean).flatten(1)[0].nonzero().flatten()
    assert (((changed >= 64) & (changed < 192)) | ((changed >= 260) & (changed < 268))).all()


def test_errors(generator, monkeypatch):
    k, cache, slots = ops.inputs("indexer_cache_append", generator, 3, D=32, page=4)
    name = "indexer_cache_append"
    with pytest.raises(ValueError, match=f"{name}: cache: expected last dimension 36"):
        append(k, cache[..., :-1], slots)
    with_gaps = torch.zeros(2, 5, 1, 36, dtype=torch.uint8, device=k.device)[:, ::2]
    with pytest.raises(ValueError, match=f"{name}: cache: expected contiguous pages"):
        deepkern.indexer_cache_append(k, with_gaps, slots)
    with pytest.raises(ValueError, match=f"{name}: scale_format: expected 'fp32' or 'ue8m0'"):
        append(k, cache, slots, "int8")
    monkeypatch.setenv("DEEPKERN_DEBUG", "1")
    for wrong, expected in (([0, -2, 1], "slots in"), ([0, 4, 4], "each slot once")):
        with pytest.raises(ValueError, match=f"{name}: slot_mapping: expected {expected}"):
            append(k, cache, torch.tensor(wrong, device=k.device))
