"""Choice of GEMM tiles: candidates fit shared memory, and every choice is inspected."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

import deepkern
from deepkern.runtime import tiles
from deepkern.runtime.arch import ARCHS
from deepkern.testing import ops

TARGETS = pytest.mark.parametrize("target", ARCHS.values(), ids=list(ARCHS))


@TARGETS
@pytest.mark.parametrize("b_rows", [128, 1])
def test_stages_fit_shared_memory(target, b_rows):
    for tile in tiles.supported_tiles(target, b_rows):
        buffered = tile.num_stages if target.name in tiles.ASYNC else tile.num_stages - 1
        assert tile.num_stages >= 2
        assert tile.programs_per_sm * buffered * tile.step_bytes <= target.smem


@TARGETS
def test_one_family_of_matrix_instruction(target):
    """Batch invariance depends on this; see runtime/tiles.py."""
    for tile in tiles.supported_tiles(target, 128):
        if target.name in ("sm_90", "sm_100"):
            assert (tile.BLOCK_N if tile.swapped else tile.BLOCK_M) >= 64
        options = tile.options(target)
        assert (options.get("matrix_instr_nonkdim") == 16) == (target.backend == "hip")


def compiled_tile(tile: tiles.GemmTile) -> tiles.GemmTile:
    """The tile without its number of splits, which is not compiled into the kernel."""
    return replace(tile, num_splits=min(tile.num_splits, 2))


M_SIZES = (1, 16, 17, 32, 48, 64, 65, 100, 128, 160, 256, 300, 512, 1024, 1500, 4096, 32768)
N_SIZES = (1, 64, 100, 256, 512, 576, 1024, 1280, 1536, 2112, 3072, 4096, 7168, 24576, 129280)
K_SIZES = (1, 128, 512, 1024, 2048, 4096, 7168, 16384)
SHAPES = list(itertools.product(M_SIZES, N_SIZES, K_SIZES))


@TARGETS
@pytest.mark.parametrize("b_rows", [128, 1])
def test_every_choice_is_inspected(target, b_rows):
    sizes = [s for s in ops.sizes("fp8_gemm_nt").inspect if s.get("b_rows", 128) == b_rows]
    inspected = {
        compiled_tile(tiles.choose_gemm_tile(target, s["M"], s["N"], s["K"], b_rows)) for s in sizes
    }
    assert {
        compiled_tile(tiles.choose_gemm_tile(target, *shape, b_rows)) for shape in SHAPES
    } <= inspected


@TARGETS
@pytest.mark.parametrize(
    ("op", "variant", "b_rows"),
    [
        ("m_grouped_fp8_gemm_nt_contiguous", "m_grouped", 128),
        ("m_grouped_fp8_gemm_nt_contiguous", "m_grouped", 1),
        ("m_grouped_fp8_gemm_nt_masked", "m_grouped", 128),
        ("m_grouped_fp8_gemm_nt_masked", "m_grouped", 1),
        ("k_grouped_fp8_gemm_nt", "k_grouped", 1),
    ],
)
def test_every_grouped_choice_is_inspected(target, op, variant, b_rows):
    def chosen(M, N, K, groups):
        return tiles.choose_gemm_tile(target, M, N, K, b_rows, groups=groups, variant=variant)

    inspected = set()
    for size in ops.sizes(op).inspect:
        M, K, G = size["M"], size["K"], size["G"]
        M = -(-M // G) if "contiguous" in op else M
        K = -(-K // G) if variant == "k_grouped" else K
        if size.get("b_rows", 1) == b_rows:
            inspected.add(chosen(M, size["N"], K, G))
    assert {chosen(*shape, G) for shape in SHAPES for G in (1, 8, 256)} <= inspected


@TARGETS
def test_tiles_grow_with_the_number_of_rows(target):
    few, many = (tiles.fastest_modelled_tile(target, M, 7168, 2048) for M in (1, 8192))
    assert all(few.BLOCK_M <= tile.BLOCK_M for tile in tiles.supported_tiles(target, 128))
    assert many.BLOCK_M * many.BLOCK_N > few.BLOCK_M * few.BLOCK_N


@pytest.mark.parametrize(("name", "smaller"), [("sm_89", True), ("sm_90", False)])
def test_scales_per_row_of_b_use_a_smaller_tile(name, smaller):
    """Except on sm_90, where 128x128 does not spill with them."""
    large = tiles.fastest_modelled_tile(ARCHS[name], 4096, 4096, 7168)
    assert (large.BLOCK_M, large.BLOCK_N, large.num_warps) == (128, 128, 8)
    tile = tiles.fastest_modelled_tile(ARCHS[name], 4096, 4096, 7168, b_rows=1)
    assert (tile.BLOCK_M * tile.BLOCK_N < 128 * 128) == smaller


@TARGETS
def test_estimate_respects_the_roofline(target):
    for tile in tiles.supported_tiles(target, 128):
        for M in (1, 64, 4096):
            N, K = 4096, 7168
            rate = 1e12 * (target.fp8_tflops if target.native_fp8 else target.bf16_tflops)
            roofline = max(2 * M * N * K / rate, (M * K + N * K) / (target.bandwidth * 1e9))
            assert tiles.estimate_seconds(target, tile, M, N, K)[0] >= 0.999 * roofline


def test_unknown_architecture():
    with pytest.raises(LookupError, match="no GEMM tiles are listed for sm_70"):
        tiles.choose_gemm_tile(replace(ARCHS["sm_80"], name="sm_70"), 1, 1, 1)


def test_explain_names_the_tile(generator):
    args = ops.inputs("fp8_gemm_nt", generator, M=70, N=130, K=200)
    with deepkern.backend("triton"):
        assert "128, 4 warps" in str(deepkern.explain(deepkern.fp8_gemm_nt, *args))


def test_explain_of_an_empty_product(generator):
    args = ops.inputs("fp8_gemm_nt", generator, M=0, N=130, K=200)
    with deepkern.backend("triton"):
        assert "tile" in str(deepkern.explain(deepkern.fp8_gemm_nt, *args))
