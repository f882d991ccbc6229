"""fp8_gemm_nt: any shape and layout, exact accumulation, rows that do not see each other."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import deepkern
from deepkern.runtime import arch, tiles
from deepkern.testing import compare
from deepkern.testing.inputs import matmul

FP32 = torch.float32


def dequantised(q: torch.Tensor, scale: torch.Tensor, rows: int) -> torch.Tensor:
    """float64 values, by a formula that is not the reference's."""
    row = torch.arange(q.shape[0], device=q.device) // rows
    column = torch.arange(q.shape[1], device=q.device) // 128
    return q.double() * scale.double()[row][:, column]


def check(args: tuple) -> torch.Tensor:
    got = deepkern.fp8_gemm_nt(*args)
    compare.assert_matches("fp8_gemm_nt", got, deepkern.reference.fp8_gemm_nt(*args))
    return got


@pytest.mark.parametrize("b_rows", [128, 1])
def test_against_a_plain_formula(backend, b_rows, generator):
    a, a_scale, b, b_scale, _, c = matmul.fp8_gemm_nt(
        generator, 70, 200, 300, b_rows=b_rows, c=torch.bfloat16
    )
    got = deepkern.fp8_gemm_nt(a, a_scale, b, b_scale, out_dtype=FP32, c=c)
    want = dequantised(a, a_scale, 1) @ dequantised(b, b_scale, b_rows).T + c.double()
    compare.assert_close(got, want)


@pytest.mark.parametrize("K", [1, 127, 128, 129, 384])
@pytest.mark.parametrize(("M", "N"), [(1, 1), (127, 129), (129, 127)])
def test_edges(backend, M, N, K, generator):
    check(matmul.fp8_gemm_nt(generator, M, N, K, out_dtype=FP32))


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.integers(0, 150), st.integers(0, 150), st.integers(0, 300),
    st.sampled_from([torch.bfloat16, torch.float16, FP32]),
    st.sampled_from([None, torch.bfloat16, FP32]), st.sampled_from([1, 128]), st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape(backend, device, M, N, K, out_dtype, c, b_rows, seed):
    generator = torch.Generator(device).manual_seed(seed)
    with compare.poison():
        check(matmul.fp8_gemm_nt(generator, M, N, K, out_dtype=out_dtype, c=c, b_rows=b_rows))


def test_strided_operands_and_column_major_scales(backend, generator):
    a, a_scale, b, b_scale, *_ = matmul.fp8_gemm_nt(generator, 40, 150, 260)
    want = deepkern.fp8_gemm_nt(a, a_scale, b, b_scale)

    def widen(x):
        wide = torch.full((2 * x.shape[0], x.shape[1] + 60), 0x7F, dtype=torch.uint8)
        wide = wide.to(x.device)
        wide[::2, 30 : 30 + x.shape[1]] = x.view(torch.uint8)
        return wide.view(torch.float8_e4m3fn)[::2, 30 : 30 + x.shape[1]]

    got = deepkern.fp8_gemm_nt(
        widen(a), a_scale.t().contiguous().t(), widen(b), b_scale.t().contiguous().t()
    )
    compare.assert_bitwise(got, want)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_a_row_does_not_depend_on_m(backend, target, generator):
    """Every tile that a target may choose is among these M, and none changes a bit."""
    a, a_scale, b, b_scale, *_ = matmul.fp8_gemm_nt(generator, 140, 64, 200)
    with arch.compile_for(arch.ARCHS[target]):
        whole = deepkern.fp8_gemm_nt(a, a_scale, b, b_scale, out_dtype=FP32)
        for M in (1, 2, 17, 33, 65, 130):
            got = deepkern.fp8_gemm_nt(a[:M], a_scale[:M], b, b_scale, out_dtype=FP32)
            compare.assert_bitwise(got, whole[:M], f"M = {M}")


@pytest.mark.parametrize("target", sorted(tiles.GEMM_TILES))
def test_every_tile_gives_the_same_bits(target, generator, monkeypatch):
    """The choice of tile is one of speed: batch invariance rests on it."""
    module = sys.modules["deepkern.matmul.fp8_gemm_nt"]
    facts = arch.ARCHS[target]
    args = matmul.fp8_gemm_nt(generator, 70, 130, 200, out_dtype=FP32)
    with arch.compile_for(facts), deepkern.backend("triton"):
        results = []
        for tile in tiles.gemm_tiles(facts, b_rows=128):
            monkeypatch.setattr(module, "gemm_tile", lambda *_, tile=tile, **__: tile)
            results.append(deepkern.fp8_gemm_nt(*args))
    assert len(results) > 1
    for got in results[1:]:
        compare.assert_bitwise(got, results[0])


def test_nan_stays_in_its_row_and_column(backend, generator):
    args = matmul.fp8_gemm_nt(generator, 20, 140, 256, out_dtype=FP32)
    clean = deepkern.fp8_gemm_nt(*args)
    a, b = args[0].clone(), args[2].clone()
    a.view(torch.uint8)[3, 200] = 0x7F
    b.view(torch.uint8)[7, 5] = 0x7F
    got = deepkern.fp8_gemm_nt(a, args[1], b, *args[3:])
    assert got[3].isnan().all() and got[:, 7].isnan().all()
    got[3], got[:, 7] = clean[3], clean[:, 7]
    compare.assert_bitwise(got, clean)


@pytest.mark.parametrize("K", [128, 1024])
def test_no_worse_than_twice_plain_pytorch(backend, K, generator):
    a, a_scale, b, b_scale, *_ = matmul.fp8_gemm_nt(generator, 64, 128, K)
    exact = dequantised(a, a_scale, 1) @ dequantised(b, b_scale, 128).T
    plain = dequantised(a, a_scale, 1).bfloat16() @ dequantised(b, b_scale, 128).bfloat16().T
    got = deepkern.fp8_gemm_nt(a, a_scale, b, b_scale)
    assert compare.diff(got, exact) <= 2 * compare.diff(plain, exact) + 1e-6


def test_long_sums_are_promoted(backend, generator):
    """Over K = 4096 the error of fp32 output stays that of fp32 sums."""
    check(matmul.fp8_gemm_nt(generator, 16, 64, 4096, out_dtype=FP32))


def test_k_of_zero_gives_zeros_or_c(backend, generator):
    *args, c = matmul.fp8_gemm_nt(generator, 3, 5, 0, out_dtype=FP32, c=FP32)
    assert torch.equal(deepkern.fp8_gemm_nt(*args), torch.zeros_like(c))
    assert torch.equal(deepkern.fp8_gemm_nt(*args, c), c)


def test_wrong_b_scale_and_out_dtype(generator):
    a, a_scale, b, b_scale, *_ = matmul.fp8_gemm_nt(generator, 4, 300, 128)
    with pytest.raises(ValueError, match=r"fp8_gemm_nt: b_scale: expected .*3 or 300 rows.*\(2, 1\)"):
        deepkern.fp8_gemm_nt(a, a_scale, b, b_scale[:2])
    with pytest.raises(ValueError, match="fp8_gemm_nt: out_dtype: expected"):
        deepkern.fp8_gemm_nt(a, a_scale, b, b_scale, out_dtype=torch.float64)


def test_explain_shows_the_tile(generator):
    args = matmul.fp8_gemm_nt(generator, 4, 300, 128)
    with deepkern.backend("triton"):
        explained = deepkern.explain("fp8_gemm_nt", *args)
    assert explained.tile in tiles.gemm_tiles(arch.ARCHS[explained.arch], b_rows=128)
    assert str(explained.tile) in str(explained)


@pytest.mark.gpu
@pytest.mark.parametrize("size", matmul.SIZES["fp8_gemm_nt"].gpu)
def test_full_sizes(size, generator):
    args = matmul.fp8_gemm_nt(generator, **size)
    with deepkern.backend("triton"):
        check(args)
