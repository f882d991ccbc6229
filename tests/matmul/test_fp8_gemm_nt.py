"""fp8_gemm_nt: all edges, both scales of b, c, strides, NaN, and a row's bits whatever M is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deepkern
from deepkern.runtime import arch, tiles
from deepkern.runtime.arch import ARCHS
from deepkern.testing import compare, inputs
from deepkern.testing.inputs.quant import values

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
REAL = [BF16, F16, F32]


def make(generator, M, N, K, **kwargs):
    return inputs.make("fp8_gemm_nt", generator, M=M, N=N, K=K, **kwargs)


def check(args) -> float:
    got = deepkern.fp8_gemm_nt(*args)
    return compare.assert_matches("fp8_gemm_nt", got, deepkern.reference.fp8_gemm_nt(*args))


def plain(a, a_scale, b, b_scale, c=None):
    """The product said another way than the reference says it: values first, then one matmul."""
    K, N = a.shape[1], b.shape[0]
    if b_scale.shape[0] != N:
        b_scale = b_scale.repeat_interleave(128, 0)[:N]
    a, b = (
        x.double() * scale.double().repeat_interleave(128, 1)[:, :K]
        for x, scale in ((a, a_scale), (b, b_scale))
    )
    return a @ b.T if c is None else a @ b.T + c.double()


EDGES = [
    (1, 1, 1),
    (7, 127, 129),
    (127, 7, 128),
    (128, 128, 127),
    (129, 1, 7),
    (1, 129, 256),
    (64, 256, 128),
    (65, 64, 16),
    (130, 130, 260),
]


@pytest.mark.parametrize("b_rows", [128, 1])
@pytest.mark.parametrize(("M", "N", "K"), EDGES)
def test_edges(backend, generator, M, N, K, b_rows):
    *tensors, _, c = make(generator, M, N, K, b_rows=b_rows, c=F32)
    got = deepkern.fp8_gemm_nt(*tensors, F32, c)
    compare.assert_close(got, plain(*tensors, c))


@settings(max_examples=12, deadline=None)
@given(
    M=st.integers(0, 140),
    N=st.integers(0, 140),
    K=st.integers(0, 300),
    b_rows=st.sampled_from([1, 128]),
    out_dtype=st.sampled_from(REAL),
    c=st.sampled_from([None, *REAL]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(M, N, K, b_rows, out_dtype, c, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    with deepkern.backend("triton"):
        check(make(generator, M, N, K, b_rows=b_rows, out_dtype=out_dtype, c=c))


@pytest.mark.parametrize("b_rows", [128, 1])
@pytest.mark.parametrize("target", ARCHS.values(), ids=list(ARCHS))
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU does not launch for another one")
def test_every_tile_of_every_target(target, b_rows, generator, monkeypatch):
    """Each gives the same bits: also those of the targets that widen FP8 themselves."""
    args = make(generator, 70, 140, 384, b_rows=b_rows, out_dtype=F32)
    module = deepkern.matmul.fp8_gemm_nt.__wrapped__.__globals__
    with deepkern.backend("triton"):
        want = deepkern.fp8_gemm_nt(*args)
        with arch.compile_for(target):
            for tile in tiles.gemm_tiles(target, b_rows):
                monkeypatch.setitem(module, "gemm_tile", lambda *_, tile=tile, **__: tile)
                compare.assert_bitwise(deepkern.fp8_gemm_nt(*args), want, str(tile))


def test_both_kinds_of_b_scale_give_the_same_bits(backend, generator):
    a, a_scale, b, b_scale, *_ = make(generator, 20, 200, 300)
    per_row = b_scale.repeat_interleave(128, 0)[:200]
    got = deepkern.fp8_gemm_nt(a, a_scale, b, per_row, F32)
    compare.assert_bitwise(got, deepkern.fp8_gemm_nt(a, a_scale, b, b_scale, F32))


def test_fp32_output_is_as_near_as_fp32_sums_can_be(backend, generator):
    args = make(generator, 40, 70, 2048, out_dtype=F32)
    error = compare.diff(deepkern.fp8_gemm_nt(*args), plain(*args[:4]))
    assert error <= 1e-9


@pytest.mark.parametrize("out_dtype", REAL)
def test_error_is_at_most_twice_that_of_torch(backend, generator, out_dtype):
    a, a_scale, b, b_scale, *_ = make(generator, 60, 80, 1024)
    a_scale *= 2**-10  # within float16's range
    exact = plain(a, a_scale, b, b_scale)
    got = deepkern.fp8_gemm_nt(a, a_scale, b, b_scale, out_dtype)
    a = deepkern.reference.cast_back(a, a_scale, (1, 128), out_dtype)
    b = deepkern.reference.cast_back(b, b_scale, (128, 128), out_dtype)
    theirs = compare.diff(a @ b.T, exact)
    assert compare.diff(got, exact) <= 2 * theirs + 1e-6


def test_quantised_product_is_near_the_real_one(backend, generator):
    x, w = values(generator, 50, 500), values(generator, 90, 500)
    q, w_q = deepkern.cast_per_token(x), deepkern.cast_per_block(w)
    assert compare.diff(deepkern.fp8_gemm_nt(*q, *w_q), x.double() @ w.double().T) < 2e-3


ROWS = [1, 2, 16, 17, 33, 64, 65, 130, 257]


@pytest.mark.parametrize("b_rows", [128, 1])
def test_a_row_has_the_same_bits_whatever_else_is_in_the_batch(backend, generator, b_rows):
    a, a_scale, b, b_scale, out_dtype, c = make(
        generator, 257, 130, 260, b_rows=b_rows, c=BF16, out_dtype=F32
    )
    whole = deepkern.fp8_gemm_nt(a, a_scale, b, b_scale, out_dtype, c)
    for M in ROWS:
        for rows in (slice(0, M), slice(257 - M, 257))[: 2 if M in (17, 65) else 1]:
            part = deepkern.fp8_gemm_nt(a[rows], a_scale[rows], b, b_scale, out_dtype, c[rows])
            compare.assert_bitwise(part, whole[rows], f"{M} rows")


@pytest.mark.gpu
@pytest.mark.parametrize(("N", "K"), [(4096, 7168), (576, 7168), (7168, 2048), (1000, 1000)])
def test_a_row_has_the_same_bits_on_a_gpu(generator, N, K):
    """Through all tiles: that the tensor core sums alike in each is the hardware's to keep."""
    a, a_scale, b, b_scale, *_ = make(generator, 4096, N, K)
    with deepkern.backend("triton"):
        whole = deepkern.fp8_gemm_nt(a, a_scale, b, b_scale)
        for M in (*ROWS, 511, 1024, 2049):
            part = deepkern.fp8_gemm_nt(a[:M], a_scale[:M], b, b_scale)
            compare.assert_bitwise(part, whole[:M], f"{M} rows")


@pytest.mark.parametrize("scale_layout", ["row", "column"])
def test_strided_inputs(backend, generator, scale_layout):
    args = make(generator, 30, 140, 600, b_rows=1, c=F32)
    a, a_scale, b, b_scale, _, c = args
    a, b, c = a[::2, 16:400], b[3:, 128:512], c[::2, 3:]
    a_scale, b_scale = a_scale[::2, :3], b_scale[3:, 1:4]
    if scale_layout == "column":
        a_scale, b_scale = a_scale.T.contiguous().T, b_scale.T.contiguous().T
    tensors = (a, a_scale, b, b_scale)
    got = deepkern.fp8_gemm_nt(*tensors, F32, c)
    compare.assert_close(got, plain(*tensors, c))
    compact = deepkern.fp8_gemm_nt(*(x.contiguous() for x in tensors), F32, c.contiguous())
    compare.assert_bitwise(got, compact)


def test_rows_that_are_not_aligned(backend, generator):
    """Views that start at odd bytes, and rows at odd distances."""
    a, a_scale, b, b_scale, *_ = make(generator, 20, 40, 301)
    tensors = (a[:, 1:], a_scale, b[1:, 1:], b_scale)
    compare.assert_close(deepkern.fp8_gemm_nt(*tensors, F32), plain(*tensors))


def test_rows_far_apart(backend, generator):
    """Beyond 32-bit offsets within a tile; the rows between are not touched."""
    a, a_scale, b, b_scale, *_ = make(generator, 3, 20, 200)
    far = torch.empty(2 * 2**24 + 200, dtype=torch.uint8, device=a.device).view(a.dtype)
    far = far.as_strided((3, 200), (2**24, 1)).copy_(a)
    got = deepkern.fp8_gemm_nt(far, a_scale, b, b_scale, F32)
    compare.assert_bitwise(got, deepkern.fp8_gemm_nt(a, a_scale, b, b_scale, F32))


@pytest.mark.parametrize("out_dtype", REAL)
@pytest.mark.parametrize("c", REAL)
def test_c_is_added_before_the_one_rounding(backend, device, out_dtype, c):
    one = torch.ones(1, 1, device=device)
    eighth = (one / 8).to(torch.float8_e4m3fn)
    # 256 + 1.25: rounding the product first, or c, or the sum twice, would show in bf16.
    addend = (one * 256).to(c)
    got = deepkern.fp8_gemm_nt(eighth, one * 10, eighth, one * 8, out_dtype, addend)
    assert got.item() == torch.tensor(257.25).to(out_dtype).item()


def test_no_k_gives_c_or_zeros(backend, generator):
    a, a_scale, b, b_scale, _, c = make(generator, 70, 40, 0, c=BF16)
    got = deepkern.fp8_gemm_nt(a, a_scale, b, b_scale)
    assert got.shape == (70, 40) and not got.any()
    compare.assert_bitwise(deepkern.fp8_gemm_nt(a, a_scale, b, b_scale, BF16, c), c)


def test_nan_and_inf_stay_in_their_row_or_column(backend, generator):
    a, a_scale, b, b_scale, *_ = make(generator, 70, 300, 300)
    good = deepkern.fp8_gemm_nt(a, a_scale, b, b_scale, F32)
    a[3, 299], a_scale[66, 1], b[7, 0] = float("nan"), float("nan"), float("nan")
    b_scale[1, 2] = float("inf")
    got = deepkern.fp8_gemm_nt(a, a_scale, b, b_scale, F32)
    spoilt = torch.zeros(70, 300, dtype=torch.bool, device=a.device)
    spoilt[3], spoilt[66], spoilt[:, 7], spoilt[:, 128:256] = True, True, True, True
    assert torch.equal(got.isfinite(), ~spoilt)
    assert got[3].isnan().all() and got[66].isnan().all() and got[:, 7].isnan().all()
    compare.assert_bitwise(got[~spoilt], good[~spoilt])
    check((a, a_scale, b, b_scale, F32))


def test_float16_overflow_is_inf(backend, device):
    a = torch.full((1, 128), 448.0, device=device).to(torch.float8_e4m3fn)
    one = torch.ones(1, 1, device=device)
    got = deepkern.fp8_gemm_nt(a, one, torch.cat([a.float(), -a.float()]).to(a.dtype), one, F16)
    assert got.tolist() == [[float("inf"), float("-inf")]]


@pytest.mark.parametrize("rows", [1, 2, 299, 301])
def test_b_scale_of_another_number_of_rows(backend, generator, rows):
    a, a_scale, b, b_scale, *_ = make(generator, 4, 300, 200)
    wrong = torch.ones(rows, 2, device=a.device)
    with pytest.raises(ValueError) as caught:
        deepkern.fp8_gemm_nt(a, a_scale, b, wrong)
    assert str(caught.value) == (
        "fp8_gemm_nt: b_scale: expected [N/128, K/128] or [N, K/128], so 3 or 300 rows, "
        f"got shape ({rows}, 2)"
    )


def test_bad_out_dtype(backend, generator):
    args = make(generator, 4, 30, 20)
    with pytest.raises(ValueError, match="^fp8_gemm_nt: out_dtype: expected torch.bfloat16 or"):
        deepkern.fp8_gemm_nt(*args[:4], torch.float64)
