"""The choice of a tile: what may be chosen, that it fits, that every choice is inspected."""

from __future__ import annotations

from dataclasses import replace

import pytest

import deepkern
from deepkern.runtime import tiles
from deepkern.runtime.arch import ARCHS
from deepkern.testing import inputs

TARGETS = pytest.mark.parametrize("target", ARCHS.values(), ids=list(ARCHS))


@TARGETS
@pytest.mark.parametrize("b_rows", [128, 1])
def test_stages_fit_the_shared_memory(target, b_rows):
    for tile in tiles.gemm_tiles(target, b_rows):
        buffered = tile.num_stages if target.name in tiles.ASYNC else tile.num_stages - 1
        assert tile.num_stages >= 2
        assert tile.residents * buffered * tile.step_bytes <= target.shared


@TARGETS
def test_one_family_of_matrix_instruction(target):
    """What batch invariance rests on: see runtime/tiles.py."""
    for tile in tiles.gemm_tiles(target, 128):
        if target.name in ("sm_90", "sm_100"):
            assert (tile.BLOCK_N if tile.swapped else tile.BLOCK_M) >= 64
        options = tile.options(target)
        assert (options.get("matrix_instr_nonkdim") == 16) == (target.backend == "hip")


@TARGETS
def test_every_tile_is_chosen_at_an_inspected_size(target):
    sizes = inputs.sizes("fp8_gemm_nt").inspect
    chosen = {tiles.gemm_tile(target, s["M"], s["N"], s["K"]) for s in sizes}
    assert chosen >= set(tiles.gemm_tiles(target, 128))


@TARGETS
def test_tiles_grow_with_the_number_of_rows(target):
    few, many = (tiles.gemm_tile(target, M, 7168, 2048) for M in (1, 8192))
    assert all(few.BLOCK_M <= tile.BLOCK_M for tile in tiles.gemm_tiles(target, 128))
    assert many.BLOCK_M * many.BLOCK_N > few.BLOCK_M * few.BLOCK_N


def test_scales_per_row_of_b_take_a_smaller_tile():
    sm_90 = ARCHS["sm_90"]
    assert str(tiles.gemm_tile(sm_90, 4096, 4096, 7168)) == "128x128x128, 8 warps, 5 stages"
    smaller = tiles.gemm_tile(sm_90, 4096, 4096, 7168, b_rows=1)
    assert smaller.BLOCK_M * smaller.BLOCK_N < 128 * 128


@TARGETS
def test_estimate_is_not_below_what_the_part_can_do(target):
    for tile in tiles.gemm_tiles(target, 128):
        for M in (1, 64, 4096):
            N, K = 4096, 7168
            rate = 1e12 * (target.fp8_tflops if target.native_fp8 else target.bf16_tflops)
            roof = max(2 * M * N * K / rate, (M * K + N * K) / (target.bandwidth * 1e9))
            assert tiles.seconds(target, tile, M, N, K)[0] >= 0.999 * roof


def test_unknown_architecture_is_named():
    with pytest.raises(LookupError, match="no GEMM tiles are listed for sm_70"):
        tiles.gemm_tile(replace(ARCHS["sm_80"], name="sm_70"), 1, 1, 1)


def test_explain_names_the_tile(generator):
    args = inputs.make("fp8_gemm_nt", generator, M=70, N=130, K=200)
    with deepkern.backend("triton"):
        assert "128, 4 warps" in str(deepkern.explain(deepkern.fp8_gemm_nt, *args))
