"""csrc/sm90/fp8_gemm_nt.cuh in the emulator, against float64."""

from __future__ import annotations

import pytest
import torch

import deepkern
from deepkern.testing import compare

from .conftest import FORMS, ORDERS

SHAPES = ((1, 8, 128), (3, 200, 400), (127, 72, 128), (129, 128, 144), (257, 130, 256), (64, 1, 16))


def operands(generator, M, N, K, scale_format="fp32", scale_layout="row"):
    x, w = (torch.randn(rows, K, generator=generator) for rows in (M, N))
    a = deepkern.cast_per_token(x, scale_format, scale_layout)
    return *a, *deepkern.cast_per_block(w, scale_format)


def check(emulated, args, out_dtype=torch.bfloat16, c=None, **how):
    got = emulated(*args, out_dtype, c, **how)
    want = deepkern.reference.fp8_gemm_nt(*args, out_dtype, c)
    compare.assert_close(got, want, str(how))
    return got


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_ragged_shapes(emulated, form, shape, generator):
    for out_dtype in (torch.bfloat16, torch.float16, torch.float32):
        check(emulated, operands(generator, *shape), out_dtype, form=form, seed=generator.seed())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", ORDERS)
def test_any_schedule_gives_the_same_bits(emulated, form, order, generator):
    """50 seeds in random order; the two extremes have an order of threads to draw, too."""
    args = operands(generator, 140, 136, 640)
    first = check(emulated, args, form=form, order=order, seed=0)
    for seed in range(1, 50 if order == "random" else 5):
        got = emulated(*args, form=form, order=order, seed=seed)
        compare.assert_bitwise(got, first, f"seed {seed}")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("c_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_adds_c(emulated, form, c_dtype, generator):
    args = operands(generator, 70, 100, 256)
    c = torch.randn(70, 100, generator=generator).to(c_dtype)
    check(emulated, args, torch.float32, c, form=form)


@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
@pytest.mark.parametrize("scale_layout", ["row", "column"])
def test_scales(emulated, scale_format, scale_layout, generator):
    check(emulated, operands(generator, 67, 72, 300 + 84, scale_format, scale_layout))


@pytest.mark.parametrize("form", FORMS)
def test_a_row_does_not_see_the_others(emulated, form, generator):
    """The same bits alone, and with any number of blocks at work."""
    a, a_scale, b, b_scale = operands(generator, 150, 72, 256)
    whole = emulated(a, a_scale, b, b_scale, torch.float32, form=form)
    compare.assert_bitwise(
        emulated(a, a_scale, b, b_scale, torch.float32, form=form, blocks=1), whole
    )
    for m in (0, 63, 149):
        one = slice(m, m + 1)
        row = emulated(a[one], a_scale[one], b, b_scale, torch.float32, form=form)
        compare.assert_bitwise(row, whole[one], f"row {m}")


def test_both_ways_to_store_agree(emulated, generator):
    args = operands(generator, 70, 72, 128)
    for dtype in (torch.bfloat16, torch.float32):
        stored = [emulated(*args, dtype, by_tma=by_tma) for by_tma in (True, False)]
        compare.assert_bitwise(*stored)


def test_promotion_outweighs_a_short_accumulator(emulated, generator):
    """With 14 bits kept of a sum within WGMMA the result is still close: the rest is float32."""
    args = operands(generator, 64, 64, 2048)
    want = deepkern.reference.fp8_gemm_nt(*args, torch.float32, None)
    short = emulated(*args, torch.float32, form="64x64", accumulator_bits=14)
    error = compare.diff(short, want)
    assert 1e-12 < error < 1e-6, error
