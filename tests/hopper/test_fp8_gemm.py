"""csrc/sm90/fp8_gemm.cuh in the emulator: every bit of all variants and tiles, error of sums."""

from __future__ import annotations

from ctypes import c_int64

import pytest
import torch

import deepkern
from bench.emulator import ORDERS, build, sources
from bench.studies import accumulation
from deepkern.runtime.contract import FP8
from deepkern.testing import compare, ops

from .conftest import TILES, Tile
from .products import PRODUCTS

pytestmark = pytest.mark.slow  # compiles the emulator
OPS = {
    "dense": "fp8_gemm_nt",
    "contiguous": "m_grouped_fp8_gemm_nt_contiguous",
    "masked": "m_grouped_fp8_gemm_nt_masked",
    "k_grouped": "k_grouped_fp8_gemm_nt",
}
TYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((1, 8, 128), (3, 200, 400), (127, 72, 128), (129, 128, 144), (257, 130, 256), (64, 1, 16))
DENSE = [t for t in TILES if t.variant == "dense"]
SPLIT_K = [t for t in DENSE if t.splits_k]
WHOLE = next(t for t in DENSE if not t.swapped and t.cluster == 1)
# C of k_grouped products is float32.
C_CASES = [
    *((t, dtype) for t in DENSE for dtype in TYPES),
    *((t, torch.float32) for t in TILES if t.variant == "k_grouped"),
]
VARIANTS = tuple(OPS)  # deepkern::GemmVariant
# Variant, M, N, K, groups and rows of B per scale -> rows, columns, stages, clusters, swapped. The
# notes compare these choices with those of DeepGEMM.
CHOICES = {
    ("dense", 4096, 7168, 16384, 1, 128): (256, 128, 3, 1, 2, False),
    ("dense", 4096, 24576, 1536, 1, 128): (256, 128, 3, 1, 2, False),
    ("dense", 4096, 4096, 7168, 1, 128): (256, 128, 3, 1, 2, False),
    ("dense", 4096, 7168, 2048, 1, 128): (256, 128, 3, 1, 2, False),
    ("dense", 4096, 2112, 7168, 1, 128): (128, 128, 5, 2, 1, False),  # two splits of K
    ("dense", 64, 7168, 16384, 1, 128): (64, 64, 12, 1, 2, False),
    ("dense", 16, 4096, 4096, 1, 128): (64, 16, 10, 1, 1, True),
    ("contiguous", 4 * 8192, 4096, 7168, 4, 128): (256, 128, 3, 1, 2, False),
    ("masked", 256, 4096, 7168, 4, 128): (256, 128, 3, 1, 2, False),
    ("k_grouped", 4096, 7168, 4 * 8192, 4, 1): (128, 128, 4, 1, 2, False),
}
every_tile = pytest.mark.parametrize("tile", TILES, ids=str)


def operands(tile: Tile, generator, M, N, K, G=3) -> tuple:
    """The arguments of the tile's op up to `out_dtype`. K is a multiple of 16, as TMA requires."""
    size = {"M": M, "N": N, "K": K}
    if tile.variant != "dense":
        size["G"] = G
    if tile.variant != "k_grouped":
        size["b_rows"] = tile.b_rows
    args = ops.inputs(OPS[tile.variant], generator, **size)
    return args[:4] if tile.variant == "dense" else args[:5]


def reference(tile: Tile, args: tuple, out_dtype=torch.bfloat16, c=None, splits=1) -> torch.Tensor:
    more = {"dense": (out_dtype, c, splits), "k_grouped": (c,)}.get(tile.variant, (out_dtype,))
    return PRODUCTS[OPS[tile.variant]](*args, *more)


def run(emulated, tile: Tile, args: tuple, out_dtype=torch.bfloat16, c=None, **how) -> torch.Tensor:
    sizes = args[4] if len(args) > 4 else None
    return emulated(*args[:4], sizes, out_dtype, c, tile=tile, **how)


def check(emulated, tile, args, out_dtype=torch.bfloat16, c=None, **how) -> torch.Tensor:
    got = run(emulated, tile, args, out_dtype, c, **how)
    want = reference(tile, args, out_dtype, c, how.get("splits", 1))
    compare.assert_bitwise(got, want, f"{tile} {how}")
    return got


@every_tile
@pytest.mark.parametrize("shape", SHAPES, ids="{0[0]}x{0[1]}x{0[2]}".format)
@pytest.mark.parametrize("all_types", [False, pytest.param(True, marks=pytest.mark.proof)])
def test_ragged_shapes(emulated, tile, shape, all_types, generator):
    """Over the shapes, each tile stores every type of D; with `proof` at each shape."""
    args = operands(tile, generator, *shape)
    one = (TILES.index(tile) + SHAPES.index(shape)) % len(TYPES)
    for out_dtype in TYPES if all_types else TYPES[one : one + 1]:
        check(emulated, tile, args, out_dtype, seed=generator.seed())


@every_tile
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("seeds", [2, pytest.param(50, marks=pytest.mark.proof)])
def test_same_bits_for_any_schedule(emulated, tile, order, seeds, generator):
    """Many seeds of the random order; the other orders draw the order of threads only."""
    args = operands(tile, generator, 140, 136, 384 if tile.variant == "dense" else 256, G=2)
    first = check(emulated, tile, args, order=order, seed=0)
    for seed in range(1, seeds if order == "random" else min(seeds, 5)):
        got = run(emulated, tile, args, order=order, seed=seed)
        compare.assert_bitwise(got, first, f"seed {seed}")


@pytest.mark.parametrize(("tile", "c_dtype"), C_CASES, ids=str)
def test_adds_c(emulated, tile, c_dtype, generator):
    for N in (100, 101):  # rows of pairs, and rows of single values
        args = operands(tile, generator, 70, N, 256)
        shape = (3, 70, N) if tile.variant == "k_grouped" else (70, N)
        c = torch.randn(shape, generator=generator).to(c_dtype)
        check(emulated, tile, args, torch.float32, c)


@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
@pytest.mark.parametrize("scale_layout", ["row", "column"])
def test_scales(emulated, scale_format, scale_layout, generator):
    x, w = (torch.randn(rows, 384, generator=generator) for rows in (67, 72))
    a = deepkern.cast_per_token(x, scale_format, scale_layout)
    check(emulated, WHOLE, (*a, *deepkern.cast_per_block(w, scale_format)))


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("b_rows", [128, 1])
def test_row_bits_independent_of_tile(emulated, b_rows, splits, generator):
    """Large, small and swapped tiles; all rows or one row; one block or many."""
    dense = [t for t in DENSE if t.b_rows == b_rows and (splits == 1 or t.splits_k)]
    a, a_scale, b, b_scale = operands(dense[0], generator, 150, 72, 128 + 128 * splits)
    whole = run(emulated, dense[0], (a, a_scale, b, b_scale), torch.float32, splits=splits)
    for tile in dense:
        for blocks in (1, 5):
            args = a, a_scale, b, b_scale
            got = run(emulated, tile, args, torch.float32, blocks=blocks, splits=splits)
            compare.assert_bitwise(got, whole, f"{tile}")
        for m in (0, 63, 149):
            one = slice(m, m + 1)
            args = a[one], a_scale[one], b, b_scale
            row = run(emulated, tile, args, torch.float32, splits=splits)
            compare.assert_bitwise(row, whole[one], f"{tile}, row {m}")


@pytest.mark.parametrize("splits", [1, 2])
def test_sign_of_zero_independent_of_tile(emulated, splits):
    """Negative products that round to -0. 0 + -0 would be +0."""
    a, b = torch.zeros(3, 256), torch.zeros(16, 256)
    a[:, ::128], b[:, ::128] = 2**-9, -(2**-9)
    a, b = a.to(FP8), b.to(FP8)
    for tile in DENSE if splits == 1 else SPLIT_K:
        a_scale, b_scale = torch.full((3, 2), 1e-40), torch.ones(16 if tile.b_rows == 1 else 1, 2)
        got = run(emulated, tile, (a, a_scale, b, b_scale), torch.float32, splits=splits)
        assert (got == 0).all() and got.signbit().all(), tile


@pytest.mark.parametrize("tile", SPLIT_K, ids=str)
@pytest.mark.parametrize(("splits", "K"), [(2, 144), (4, 1040), (8, 640), (8, 1152)])
def test_splits_of_k(emulated, tile, splits, K, generator):
    """Uneven and empty splits; unaligned rows of D; with and without C."""
    for M, N, dtype in ((3, 264, torch.bfloat16), (70, 131, torch.float16), (17, 8, torch.float32)):
        c = torch.randn(M, N, generator=generator).to(dtype) if M == 70 else None
        args = operands(tile, generator, M, N, K)
        check(emulated, tile, args, dtype, c, splits=splits, blocks=8, seed=generator.seed())


@pytest.mark.parametrize("tile", [t for t in SPLIT_K if t.columns < 128], ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("seeds", [2, pytest.param(50, marks=pytest.mark.proof)])
def test_same_bits_for_any_schedule_of_splits(emulated, tile, order, seeds, generator):
    """Blocks of a cluster work on different tiles at the same time."""
    args = operands(tile, generator, 17, 264, 640)
    how = {"splits": 4, "blocks": 4 if tile.swapped else 1, "order": order}
    first = check(emulated, tile, args, seed=0, **how)
    for seed in range(1, seeds if order == "random" else min(seeds, 5)):
        compare.assert_bitwise(run(emulated, tile, args, seed=seed, **how), first, f"seed {seed}")


def test_choice_of_splits_and_tile():
    """N and K alone give the splits: at most 8, of at least four K blocks."""
    library = build(sources())
    want = {(4096, 4096): 1, (4032, 4096): 2, (2048, 2048): 4, (2049, 2048): 2,
            (2112, 7168): 2, (576, 7168): 8, (1, 1 << 20): 8, (1, 1023): 2, (1, 9): 1}  # fmt: skip
    for shape, splits in want.items():
        assert library.chosen_splits(*map(c_int64, shape)) == splits, shape
    for (variant, *sizes), want in CHOICES.items():
        chosen = library.chosen_tile(VARIANTS.index(variant), *map(c_int64, sizes))
        assert TILES[chosen][1:7] == want, (variant, sizes)


def test_repeated_row_scales_match_block_scales(emulated, generator):
    per_block = WHOLE
    per_row = next(t for t in TILES if t.variant == "dense" and t.b_rows == 1 and not t.swapped)
    a, a_scale, b, b_scale = operands(per_block, generator, 70, 136, 256)
    repeated = b_scale.repeat_interleave(128, 0)[:136].contiguous()
    first = run(emulated, per_block, (a, a_scale, b, b_scale))
    compare.assert_bitwise(run(emulated, per_row, (a, a_scale, b, repeated)), first)


def test_tma_and_direct_stores_agree(emulated, generator):
    args = operands(WHOLE, generator, 70, 72, 128)
    for dtype in (torch.bfloat16, torch.float32):
        stored = [run(emulated, WHOLE, args, dtype, by_tma=by_tma) for by_tma in (True, False)]
        compare.assert_bitwise(*stored)


HOSTILE = {
    "contiguous": ([2, 0, 1, 0, 2, 1] * 12, [5, -7, 2**31 - 1, -(2**31), 1, 1] * 12, [-1] * 72),
    "masked": ([0, 0, 0], [-5, 2**31 - 1, 72], [-(2**31), 1, 71]),
    "k_grouped": ([0, 0, 0, 0], [-9, 100, 2**31 - 1, 256], [256, 256, 0, 256], [0, 130, 50, 256]),
}


@pytest.mark.parametrize("tile", [t for t in TILES if t.variant in HOSTILE], ids=str)
def test_hostile_sizes(emulated, tile, generator):
    """Results match the oracle. The emulator reports any access outside the tensors."""
    args = operands(tile, generator, 72, 136, 256)
    for sizes in HOSTILE[tile.variant]:
        broken = *args[:4], torch.tensor(sizes, dtype=torch.int32)
        check(emulated, tile, broken)


def test_nan_stays_in_its_group(emulated, generator):
    tile = next(t for t in TILES if t.variant == "k_grouped")
    a, a_scale, b, b_scale, _ = operands(tile, generator, 40, 40, 256, G=2)
    offsets = torch.tensor([0, 100, 256], dtype=torch.int32)
    for x in (a, b):
        x.view(torch.uint8)[3, 100:] = 0x7F
    got = check(emulated, tile, (a, a_scale, b, b_scale, offsets))
    assert got[0].isfinite().all() and got[1, 3].isnan().all()


@pytest.mark.parametrize("tile", [t for t in DENSE if t.b_rows == 128], ids=str)
def test_has_the_bits_of_hoppers_tensor_core(emulated, tile, generator):
    """Sums of 128 products with the bits of MMA-Sim's model, promoted by a fused multiply-add."""
    M, N, K = 70, 136, 1024
    a, a_scale, b, b_scale = operands(tile, generator, M, N, K)
    got = run(emulated, tile, (a, a_scale, b, b_scale), torch.float32)
    per_row = b_scale.repeat_interleave(128, 0)[:N]
    compare.assert_bitwise(got, accumulation.product(a, a_scale, b, per_row, 128))
    float32 = accumulation.product(a, a_scale, b, per_row, 128, exact=True)
    assert 1e-9 < compare.diff(got, float32) < compare.FP8_SUM_TOLERANCE
