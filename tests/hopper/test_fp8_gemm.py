"""csrc/sm90/fp8_gemm.cuh in the emulator, in all forms and tiles, against float64."""

from __future__ import annotations

import pytest
import torch

import deepkern
from bench.emulator import ORDERS
from deepkern.testing import compare, inputs

from .conftest import TILES, Tile

OPS = {
    "dense": "fp8_gemm_nt",
    "contiguous": "m_grouped_fp8_gemm_nt_contiguous",
    "masked": "m_grouped_fp8_gemm_nt_masked",
    "k_grouped": "k_grouped_fp8_gemm_nt",
}
SHAPES = ((1, 8, 128), (3, 200, 400), (127, 72, 128), (129, 128, 144), (257, 130, 256), (64, 1, 16))
every_tile = pytest.mark.parametrize("tile", TILES, ids=str)


def operands(tile: Tile, generator, M, N, K, G=3) -> tuple:
    """The arguments of the tile's op up to `out_dtype`; K is a multiple of 16, as for TMA."""
    size = {"M": M, "N": N, "K": K}
    if tile.form != "dense":
        size["G"] = G
    if tile.form != "k_grouped":
        size["b_rows"] = tile.b_rows
    args = inputs.make(OPS[tile.form], generator, **size)
    return args[:4] if tile.form == "dense" else args[:5]


def reference(tile: Tile, args: tuple, out_dtype=torch.bfloat16, c=None) -> torch.Tensor:
    op = getattr(deepkern.reference, OPS[tile.form])
    more = {"dense": (out_dtype, c), "k_grouped": (c,)}.get(tile.form, (out_dtype,))
    return op(*args, *more)


def run(emulated, tile: Tile, args: tuple, out_dtype=torch.bfloat16, c=None, **how) -> torch.Tensor:
    sizes = args[4] if len(args) > 4 else None
    return emulated(*args[:4], sizes, out_dtype, c, tile=tile, **how)


def check(emulated, tile, args, out_dtype=torch.bfloat16, c=None, **how) -> torch.Tensor:
    got = run(emulated, tile, args, out_dtype, c, **how)
    compare.assert_close(got, reference(tile, args, out_dtype, c), f"{tile} {how}")
    return got


@every_tile
@pytest.mark.parametrize("shape", SHAPES)
def test_ragged_shapes(emulated, tile, shape, generator):
    args = operands(tile, generator, *shape)
    for out_dtype in (torch.bfloat16, torch.float16, torch.float32):
        check(emulated, tile, args, out_dtype, seed=generator.seed())


@every_tile
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("seeds", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_any_schedule_gives_the_same_bits(emulated, tile, order, seeds, generator):
    """Seeds in random order; the two extremes have an order of threads to draw, too."""
    args = operands(tile, generator, 140, 136, 384 if tile.form == "dense" else 256, G=2)
    first = check(emulated, tile, args, order=order, seed=0)
    for seed in range(1, seeds if order == "random" else 5):
        got = run(emulated, tile, args, order=order, seed=seed)
        compare.assert_bitwise(got, first, f"seed {seed}")


@pytest.mark.parametrize("tile", [t for t in TILES if t.form in ("dense", "k_grouped")], ids=str)
@pytest.mark.parametrize("c_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_adds_c(emulated, tile, c_dtype, generator):
    if tile.form == "k_grouped" and c_dtype != torch.float32:
        c_dtype = torch.float32
    args = operands(tile, generator, 70, 100, 256)
    shape = (3, 70, 100) if tile.form == "k_grouped" else (70, 100)
    c = torch.randn(shape, generator=generator).to(c_dtype)
    check(emulated, tile, args, torch.float32, c)


@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
@pytest.mark.parametrize("scale_layout", ["row", "column"])
def test_scales(emulated, scale_format, scale_layout, generator):
    x, w = (torch.randn(rows, 384, generator=generator) for rows in (67, 72))
    a = deepkern.cast_per_token(x, scale_format, scale_layout)
    check(emulated, TILES[1], (*a, *deepkern.cast_per_block(w, scale_format)))


def test_every_tile_gives_a_row_the_same_bits(emulated, generator):
    """Large, small and swapped tiles, all rows or one, one block at work or many."""
    dense = [t for t in TILES if t.form == "dense" and t.b_rows == 128]
    a, a_scale, b, b_scale = operands(dense[0], generator, 150, 72, 256)
    whole = run(emulated, dense[0], (a, a_scale, b, b_scale), torch.float32)
    for tile in dense:
        for blocks in (1, 5):
            args = a, a_scale, b, b_scale
            got = run(emulated, tile, args, torch.float32, blocks=blocks)
            compare.assert_bitwise(got, whole, f"{tile}")
        for m in (0, 63, 149):
            one = slice(m, m + 1)
            row = run(emulated, tile, (a[one], a_scale[one], b, b_scale), torch.float32)
            compare.assert_bitwise(row, whole[one], f"{tile}, row {m}")


def test_scales_per_row_that_repeat_give_the_bits_of_scales_per_block(emulated, generator):
    per_block = [t for t in TILES if t.form == "dense"][1]
    per_row = next(t for t in TILES if t.form == "dense" and t.b_rows == 1 and not t.swapped)
    a, a_scale, b, b_scale = operands(per_block, generator, 70, 136, 256)
    repeated = b_scale.repeat_interleave(128, 0)[:136].contiguous()
    first = run(emulated, per_block, (a, a_scale, b, b_scale))
    compare.assert_bitwise(run(emulated, per_row, (a, a_scale, b, repeated)), first)


def test_both_ways_to_store_agree(emulated, generator):
    args = operands(TILES[1], generator, 70, 72, 128)
    for dtype in (torch.bfloat16, torch.float32):
        stored = [run(emulated, TILES[1], args, dtype, by_tma=by_tma) for by_tma in (True, False)]
        compare.assert_bitwise(*stored)


HOSTILE = {
    "contiguous": ([2, 0, 1, 0, 2, 1] * 12, [5, -7, 2**31 - 1, -(2**31), 1, 1] * 12, [-1] * 72),
    "masked": ([0, 0, 0], [-5, 2**31 - 1, 72], [-(2**31), 1, 71]),
    "k_grouped": ([0, 0, 0, 0], [-9, 100, 2**31 - 1, 256], [256, 256, 0, 256], [0, 130, 50, 256]),
}


@pytest.mark.parametrize("tile", [t for t in TILES if t.form in HOSTILE], ids=str)
def test_hostile_sizes(emulated, tile, generator):
    """What the oracle takes them for, and no access outside: the emulator would say so."""
    args = operands(tile, generator, 72, 136, 256)
    for sizes in HOSTILE[tile.form]:
        broken = *args[:4], torch.tensor(sizes, dtype=torch.int32)
        check(emulated, tile, broken)


def test_a_groups_nan_stays_in_its_group(emulated, generator):
    tile = next(t for t in TILES if t.form == "k_grouped")
    a, a_scale, b, b_scale, _ = operands(tile, generator, 40, 40, 256, G=2)
    offsets = torch.tensor([0, 100, 256], dtype=torch.int32)
    for x in (a, b):
        x.view(torch.uint8)[3, 100:] = 0x7F
    got = check(emulated, tile, (a, a_scale, b, b_scale, offsets))
    assert got[0].isfinite().all() and got[1, 3].isnan().all()


def test_promotion_outweighs_a_short_accumulator(emulated, generator):
    """With 14 bits kept of a sum within WGMMA the result is still close: the rest is float32."""
    tile = TILES[2]
    args = operands(tile, generator, 64, 64, 2048)
    want = reference(tile, args, torch.float32)
    error = compare.diff(run(emulated, tile, args, torch.float32, accumulator_bits=14), want)
    assert 1e-12 < error < 1e-6, error
