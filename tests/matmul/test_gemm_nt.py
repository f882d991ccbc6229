"""gemm_nt: any layout, fp32 precision, special values, batch invariance, gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import deepkern
from deepkern.matmul.real_gemm import choose_real_tile
from deepkern.runtime import arch, tiles
from deepkern.runtime.arch import ARCHS
from deepkern.testing import compare
from deepkern.testing.random_inputs import values

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
REAL = [BF16, F16, F32]
gemm_nt = deepkern.gemm_nt


def check(a, b, out_dtype=None) -> torch.Tensor:
    with compare.poison():
        got = gemm_nt(a, b, out_dtype)
    compare.assert_matches("gemm_nt", got, deepkern.reference.gemm_nt(a, b, out_dtype))
    return got


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize(("M", "N", "K"), [(1, 1, 1), (2, 129, 65), (17, 64, 128), (65, 33, 90)])
def test_odd_shapes(kernel_backend, generator, M, N, K, dtype):
    check(values(generator, M, K, dtype=dtype), values(generator, N, K, dtype=dtype), F32)


@pytest.mark.parametrize("out_dtype", [None, *REAL])
def test_out_dtype(backend, generator, out_dtype):
    a, b = values(generator, 5, 70, dtype=F16), values(generator, 9, 70, dtype=F16)
    got = check(a, b, out_dtype)
    assert got.dtype == (out_dtype or F16) and got.is_contiguous()
    compare.assert_bitwise(gemm_nt(a, b, F32).to(got.dtype), got)


@pytest.mark.parametrize("dtype", REAL)
def test_against_f_linear(backend, generator, dtype):
    """Not the reference: torch's own product of the same values in float64."""
    a, b = values(generator, 7, 300, dtype=dtype), values(generator, 20, 300, dtype=dtype)
    compare.assert_close(gemm_nt(a, b, F32), F.linear(a.double(), b.double()).float())


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The values of x [rows, K] in every layout that the contract allows."""
    rows, K = x.shape
    larger = x.new_full((2 * rows + 3, 3 * K + 5), torch.nan)
    embedded = larger[1 : rows + 1, 3 : 3 + K].copy_(x)
    stepped = larger.clone()[3::2, 4 : 4 + 3 * K : 3][:rows].copy_(x)
    return {
        "transposed": x.t().contiguous().t(),
        "embedded": embedded,
        "transposed and embedded": embedded.t().contiguous().t(),
        "no contiguous dimension": stepped,
    }


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("M", [1, 20])
def test_bits_independent_of_strides(backend, generator, M, dtype):
    a, b = values(generator, M, 90, dtype=dtype), values(generator, 40, 90, dtype=dtype)
    want = gemm_nt(a, b, F32)
    for name, view in layouts(b).items():
        compare.assert_bitwise(gemm_nt(a, view, F32), want, f"b {name}")
    for name, view in layouts(a).items():
        compare.assert_bitwise(gemm_nt(view, b, F32), want, f"a {name}")


def test_expanded_operands(backend, generator):
    a, b = values(generator, 1, 70).expand(6, -1), values(generator, 33, 1).expand(-1, 70)
    got = check(a, b, F32)
    compare.assert_bitwise(got, got[:1].expand(6, -1).contiguous())


@pytest.mark.parametrize(
    ("dtype", "transposed"), [(BF16, False), (F32, True), (F16, True), (F32, False)]
)
def test_row_bits_independent_of_batch(backend, generator, dtype, transposed):
    """Alone, in a batch of any size and at any position."""
    a, b = values(generator, 37, 72, dtype=dtype), values(generator, 40, 72, dtype=dtype)
    b = b.t().contiguous().t() if transposed else b
    whole = gemm_nt(a, b, F32)
    for first, count in ((0, 1), (17, 1), (5, 2), (9, 3), (20, 16)):
        part = gemm_nt(a[first : first + count], b, F32)
        compare.assert_bitwise(part, whole[first : first + count], f"{count} rows from {first}")
    repeated = gemm_nt(a.repeat(5, 1), b, F32)
    compare.assert_bitwise(repeated, whole.repeat(5, 1), "185 rows")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize(("N", "K"), [(4096, 7168), (576, 7168), (100, 1000)])
def test_row_bits_independent_of_batch_on_gpu(generator, N, K, dtype):
    a, b = values(generator, 257, K, dtype=dtype), values(generator, N, K, dtype=dtype)
    with deepkern.backend("triton"):
        whole = check(a, b, F32)
        for M in range(1, 258):
            compare.assert_bitwise(gemm_nt(a[:M], b, F32), whole[:M], f"{M} rows")
        compare.assert_bitwise(gemm_nt(a, b.t().contiguous().t(), F32), whole, "transposed b")


@pytest.mark.proof
@pytest.mark.parametrize("target", ARCHS.values(), ids=list(ARCHS))
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU cannot launch for another target")
def test_all_tiles_give_the_same_bits(target, generator):
    """Batch invariance requires it, because the choice of tile depends on M."""
    a, b = values(generator, 150, 128), values(generator, 140, 128)
    with deepkern.backend("triton"), arch.compile_for(target):
        want = check(a, b, F32)
        for tile in tiles.candidate_tiles(target, 140, 2 * 128, 128, "real"):
            with tiles.override_tile_choice(lambda *_, t=tile: t):
                assert choose_real_tile(a, b, 150).BLOCK_M == tile.BLOCK_M
                compare.assert_bitwise(gemm_nt(a, b, F32), want, str(tile))


@settings(max_examples=12, deadline=None)
@given(
    M=st.integers(0, 70),
    N=st.integers(0, 140),
    K=st.integers(0, 200),
    dtype=st.sampled_from(REAL),
    transposed=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(M, N, K, dtype, transposed, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    a, b = values(generator, M, K, dtype=dtype), values(generator, N, K, dtype=dtype)
    with deepkern.backend("triton"):
        check(a, b.t().contiguous().t() if transposed else b)


def test_nan_and_inf_stay_in_their_row(backend, generator):
    a, b = values(generator, 20, 100), values(generator, 30, 100)
    good = gemm_nt(a, b)
    a[3, 7], a[11, 99] = torch.nan, torch.inf
    got = check(a, b)
    bad = torch.zeros(20, dtype=torch.bool, device=a.device)
    bad[[3, 11]] = True
    assert not got[bad].isfinite().any()
    compare.assert_bitwise(got[~bad], good[~bad])


@pytest.mark.parametrize("out_dtype", [None, F32])
def test_gradients(backend, generator, out_dtype):
    a, b = values(generator, 9, 40, dtype=F32), values(generator, 12, 40, dtype=F32)
    grad = values(generator, 9, 12, dtype=F32)
    leaves = a.clone().requires_grad_(), b.clone().requires_grad_()
    gemm_nt(*leaves, out_dtype).backward(grad)
    compare.assert_close(leaves[0].grad, (grad.double() @ b.double()).float())
    compare.assert_close(leaves[1].grad, (grad.double().T @ a.double()).float())


def test_gradient_of_one_operand(backend, generator):
    a, b = values(generator, 3, 40), values(generator, 12, 40).requires_grad_()
    gemm_nt(a, b, F32).sum().backward()
    assert a.grad is None and b.grad.dtype == BF16
    compare.assert_close(b.grad, a.double().sum(0).expand(12, -1).to(BF16))


def test_operands_of_different_dtypes(backend, generator):
    a, b = values(generator, 3, 40), values(generator, 12, 40, dtype=F16)
    with pytest.raises(TypeError, match=r"gemm_nt: b: expected dtype torch.bfloat16 .*, got"):
        gemm_nt(a, b)


def test_unsupported_out_dtype(backend, generator):
    a = values(generator, 3, 40)
    with pytest.raises(ValueError, match="gemm_nt: out_dtype: expected .*, got torch.float64"):
        gemm_nt(a, a, torch.float64)
