"""fp8_gemm_nt: edge shapes, both scale layouts of b, c, strides, NaN, batch invariance."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deepkern
from deepkern.matmul.k_major import k_major
from deepkern.runtime import arch, tiles
from deepkern.runtime.arch import ARCHS
from deepkern.testing import compare, ops
from deepkern.testing.random_inputs import values

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NO_GPU = pytest.mark.skipif(
    torch.cuda.is_available(), reason="a GPU cannot launch for another target"
)
REAL = [BF16, F16, F32]


@pytest.fixture(params=["torch", "triton", "cpu"])
def backend(request, device):
    """Forces each backend in turn; `cpu` needs CPU tensors."""
    if request.param == "cpu" and device.type != "cpu":
        pytest.skip("cpu takes CPU tensors")
    with deepkern.backend(request.param):
        yield request.param


def make(generator, M, N, K, **kwargs):
    return ops.inputs("fp8_gemm_nt", generator, M=M, N=N, K=K, **kwargs)


def force_tile(tile: tiles.GemmTile):
    """Launches inside the block use this tile."""
    return tiles.override_tile_choice(lambda *_: tile)


def check(args) -> float:
    got = deepkern.fp8_gemm_nt(*args)
    return compare.assert_matches("fp8_gemm_nt", got, deepkern.reference.fp8_gemm_nt(*args))


def plain(a, a_scale, b, b_scale, c=None):
    """Independent of the reference: dequantize first, then one matmul in float64."""
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
    compare.assert_close(got, plain(*tensors, c), op="fp8_gemm_nt")


# M, N, K and the scale format; none is a multiple of a tile.
ODD_SHAPES = [
    (0, 1, 1, "fp32"),
    (3, 1, 100, "fp32"),
    (129, 1, 128, "fp32"),
    (0, 1, 129, "fp32"),
    (3, 1, 7168, "fp32"),
    (1, 8, 1, "fp32"),
    (127, 8, 100, "ue8m0"),
    (257, 8, 128, "ue8m0"),
    (1, 8, 129, "fp32"),
    (127, 8, 7168, "ue8m0"),
    (3, 100, 1, "fp32"),
    (129, 100, 100, "ue8m0"),
    (0, 100, 128, "fp32"),
    (3, 100, 129, "fp32"),
    (129, 100, 7168, "ue8m0"),
    (127, 576, 1, "fp32"),
    (257, 576, 100, "ue8m0"),
    (1, 576, 128, "ue8m0"),
    (127, 576, 129, "fp32"),
    (129, 2112, 1, "fp32"),
    (0, 2112, 100, "fp32"),
    (3, 2112, 128, "ue8m0"),
    (129, 2112, 129, "fp32"),
]
LARGE_ODD_SHAPES = [
    pytest.param(257, 576, 7168, "ue8m0", marks=pytest.mark.proof),
    pytest.param(0, 2112, 7168, "fp32", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("M", "N", "K", "scale_format"), [*ODD_SHAPES, *LARGE_ODD_SHAPES])
def test_odd_shapes(backend, generator, M, N, K, scale_format):
    """The operands are slices of wider matrices."""
    a, a_scale = deepkern.reference.cast_per_token(values(generator, M, K + 16), scale_format)
    b, b_scale = deepkern.reference.cast_per_block(values(generator, N, K + 16), scale_format)
    blocks = -(-K // 128)
    check((a[:, :K], a_scale[:, :blocks], b[:, :K], b_scale[:, :blocks]))


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


@pytest.mark.proof
@pytest.mark.parametrize("b_rows", [128, 1])
@pytest.mark.parametrize("target", ARCHS.values(), ids=list(ARCHS))
@NO_GPU
def test_all_tiles_give_the_same_bits(target, b_rows, generator):
    """On every target, also those that widen FP8 in the kernel."""
    args = make(generator, 70, 140, 384, b_rows=b_rows, out_dtype=F32)
    with deepkern.backend("triton"):
        want = deepkern.fp8_gemm_nt(*args)
        for tile in tiles.supported_tiles(target, b_rows):
            with arch.compile_for(target), force_tile(tile):
                compare.assert_bitwise(deepkern.fp8_gemm_nt(*args), want, str(tile))


@pytest.mark.proof
@pytest.mark.parametrize("K", [512, 640, 700])
@pytest.mark.parametrize("target", ARCHS.values(), ids=list(ARCHS))
@NO_GPU
def test_both_kinds_of_split_k_give_the_same_bits(target, K, generator):
    """One program per split, and one program for all splits."""
    args = make(generator, 70, 140, K, c=BF16, out_dtype=F32)
    results = []
    with deepkern.backend("triton"), arch.compile_for(target):
        for tile in tiles.supported_tiles(target, 128)[:4]:
            for parallel in (False, True):
                split = replace(tile, num_splits=4, parallel_splits=parallel)
                with force_tile(split):
                    results.append(deepkern.fp8_gemm_nt(*args))
                compare.assert_bitwise(results[-1], results[0], str(split))
    compare.assert_close(results[0], plain(*args[:4], args[5]), op="fp8_gemm_nt")


@pytest.mark.proof
@pytest.mark.parametrize("N", [40, 300])
def test_row_bits_independent_of_m_with_split_k(generator, N):
    """M from 1 to 257 uses parallel splits, then small tiles, then splits in one program."""
    args = make(generator, 257, N, 1100, out_dtype=F32)
    a, a_scale, b, b_scale, *_ = args
    assert tiles.choose_num_splits(ARCHS["sm_90"], N, 1100) > 1
    with deepkern.backend("triton"):
        whole = deepkern.fp8_gemm_nt(*args)
        for M in ROWS:
            part = deepkern.fp8_gemm_nt(a[:M], a_scale[:M], b, b_scale, F32)
            compare.assert_bitwise(part, whole[:M], f"{M} rows")


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize(
    ("M", "N", "K"),
    [(20, 48, 160)]
    + [
        pytest.param(*s, marks=pytest.mark.proof)
        for s in ((33, 70, 129), (1, 16, 128), (64, 1, 40))
    ],
)
@NO_GPU
def test_transposed_operands(name, M, N, K, generator):
    """The layouts nn, tn and tt are views of the same values as nt."""
    a, a_scale, b, b_scale, *_ = make(generator, M, N, K)
    at, bt = (x.view(torch.uint8).t().contiguous().view(x.dtype).t() for x in (a, b))
    with deepkern.backend("triton"), arch.compile_for(ARCHS[name]):
        want = deepkern.fp8_gemm_nt(a, a_scale, b, b_scale, F32)
        for x, y in ((a, bt), (at, b), (at, bt)):
            with compare.poison():
                got = deepkern.fp8_gemm_nt(x, a_scale, y, b_scale.t().contiguous().t(), F32)
            compare.assert_bitwise(got, want)


def test_transposed_view_is_copied_for_native_fp8(generator):
    a, *_ = make(generator, 32, 48, 160)
    transposed = a.view(torch.uint8).t().contiguous().view(a.dtype).t()
    assert k_major(transposed, ARCHS["sm_80"]).data_ptr() == transposed.data_ptr()
    copy = k_major(transposed, ARCHS["sm_90"])
    assert copy.stride() == (160, 1)
    compare.assert_bitwise(copy, a)


def test_both_b_scale_layouts_give_the_same_bits(backend, generator):
    a, a_scale, b, b_scale, *_ = make(generator, 20, 200, 300)
    per_row = b_scale.repeat_interleave(128, 0)[:200]
    got = deepkern.fp8_gemm_nt(a, a_scale, b, per_row, F32)
    compare.assert_bitwise(got, deepkern.fp8_gemm_nt(a, a_scale, b, b_scale, F32))


def test_fp32_output_of_a_long_sum(backend, generator):
    args = make(generator, 40, 70, 2048, out_dtype=F32)
    compare.assert_close(deepkern.fp8_gemm_nt(*args), plain(*args[:4]), op="fp8_gemm_nt")


@pytest.mark.parametrize("out_dtype", REAL)
def test_error_at_most_twice_that_of_torch(backend, generator, out_dtype):
    a, a_scale, b, b_scale, *_ = make(generator, 60, 80, 1024)
    a_scale *= 2**-10  # within float16's range
    exact = plain(a, a_scale, b, b_scale)
    got = deepkern.fp8_gemm_nt(a, a_scale, b, b_scale, out_dtype)
    a = deepkern.reference.cast_back(a, a_scale, (1, 128), out_dtype)
    b = deepkern.reference.cast_back(b, b_scale, (128, 128), out_dtype)
    theirs = compare.diff(a @ b.T, exact)
    assert compare.diff(got, exact) <= 2 * theirs + 1e-6


def test_close_to_the_unquantized_product(backend, generator):
    x, w = values(generator, 50, 500), values(generator, 90, 500)
    q, w_q = deepkern.reference.cast_per_token(x), deepkern.reference.cast_per_block(w)
    assert compare.diff(deepkern.fp8_gemm_nt(*q, *w_q), x.double() @ w.double().T) < 2e-3


ROWS = [1, 2, 3, 6, 16, 17, 33, 64, 65, 130, 257]  # 3 to 6: tiles of the CPU kernels


@pytest.mark.parametrize("b_rows", [128, 1])
def test_row_bits_independent_of_batch(backend, generator, b_rows):
    a, a_scale, b, b_scale, out_dtype, c = make(
        generator, 257, 130, 260, b_rows=b_rows, c=BF16, out_dtype=F32
    )
    whole = deepkern.fp8_gemm_nt(a, a_scale, b, b_scale, out_dtype, c)
    for rows in (*(slice(0, M) for M in ROWS), slice(240, 257), slice(192, 257)):
        part = deepkern.fp8_gemm_nt(a[rows], a_scale[rows], b, b_scale, out_dtype, c[rows])
        compare.assert_bitwise(part, whole[rows], f"rows {rows}")


@pytest.mark.gpu
@pytest.mark.parametrize(("N", "K"), [(4096, 7168), (576, 7168), (7168, 2048), (1000, 1000)])
def test_row_bits_independent_of_batch_on_gpu(generator, N, K):
    """Over all tiles: the tensor core must sum alike in each."""
    a, a_scale, b, b_scale, *_ = make(generator, 4096, N, K)
    with deepkern.backend("triton"):
        whole = deepkern.fp8_gemm_nt(a, a_scale, b, b_scale)
        for M in (*ROWS, 511, 1024, 2049):
            part = deepkern.fp8_gemm_nt(a[:M], a_scale[:M], b, b_scale)
            compare.assert_bitwise(part, whole[:M], f"{M} rows")


@pytest.mark.gpu
@pytest.mark.parametrize(("N", "K"), [(2112, 7168), (576, 7168), (100, 1000)])
def test_row_bits_for_every_m_and_100_runs_on_gpu(generator, N, K):
    a, a_scale, b, b_scale, *_ = make(generator, 257, N, K)
    with deepkern.backend("triton"):
        whole = deepkern.fp8_gemm_nt(a, a_scale, b, b_scale, F32)
        for M in range(1, 258):
            part = deepkern.fp8_gemm_nt(a[:M], a_scale[:M], b, b_scale, F32)
            compare.assert_bitwise(part, whole[:M], f"{M} rows")
        for _ in range(100):
            again = deepkern.fp8_gemm_nt(a, a_scale, b, b_scale, F32)
            compare.assert_bitwise(again, whole, "again")


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
    compare.assert_close(got, plain(*tensors, c), op="fp8_gemm_nt")
    compact = deepkern.fp8_gemm_nt(*(x.contiguous() for x in tensors), F32, c.contiguous())
    compare.assert_bitwise(got, compact)


def test_unaligned_rows(backend, generator):
    """Views that start at odd bytes, and an odd row pitch."""
    a, a_scale, b, b_scale, *_ = make(generator, 20, 40, 301)
    tensors = (a[:, 1:], a_scale, b[1:, 1:], b_scale)
    compare.assert_close(deepkern.fp8_gemm_nt(*tensors, F32), plain(*tensors), op="fp8_gemm_nt")


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize(
    ("size", "strides"),
    [((20, 256), (0, 1)), ((20, 256), (16, 1)), ((20, 256), (128, 1)), ((1, 256), (8, 1))],
    ids=["expanded", "overlap-240", "overlap-128", "one-row"],
)
@NO_GPU
def test_overlapping_rows(name, size, strides, generator):
    """Rows of expanded tensors and sliding windows, for both operands."""
    a, a_scale, b, b_scale, *_ = make(generator, size[0], 40, 256)
    flat = make(generator, 40, 1, 256)[0].flatten()
    x = flat.as_strided(size, strides)
    compact = x.view(torch.uint8).contiguous().view(x.dtype)
    scale = a_scale[:, :1].expand(-1, 2).contiguous()
    with deepkern.backend("triton"), arch.compile_for(ARCHS[name]):
        got = deepkern.fp8_gemm_nt(x, a_scale, b, b_scale, F32)
        compare.assert_bitwise(got, deepkern.fp8_gemm_nt(compact, a_scale, b, b_scale, F32))
        got = deepkern.fp8_gemm_nt(b, b_scale.expand(40, -1), x, scale, F32)
        want = deepkern.fp8_gemm_nt(b, b_scale.expand(40, -1), compact, scale, F32)
        compare.assert_bitwise(got, want)


def test_rows_2_24_elements_apart(backend, generator):
    """Offsets within a tile exceed 32 bits."""
    a, a_scale, b, b_scale, *_ = make(generator, 3, 20, 200)
    far = torch.empty(2 * 2**24 + 200, dtype=torch.uint8, device=a.device).view(a.dtype)
    far = far.as_strided((3, 200), (2**24, 1)).copy_(a)
    got = deepkern.fp8_gemm_nt(far, a_scale, b, b_scale, F32)
    compare.assert_bitwise(got, deepkern.fp8_gemm_nt(a, a_scale, b, b_scale, F32))


@pytest.mark.parametrize("out_dtype", REAL)
@pytest.mark.parametrize("c", REAL)
def test_c_is_added_before_rounding(backend, device, out_dtype, c):
    one = torch.ones(1, 1, device=device)
    eighth = (one / 8).to(torch.float8_e4m3fn)
    # 256 + 1.25: rounding the product first, or c, or the sum twice, would show in bf16.
    addend = (one * 256).to(c)
    got = deepkern.fp8_gemm_nt(eighth, one * 10, eighth, one * 8, out_dtype, addend)
    assert got.item() == torch.tensor(257.25).to(out_dtype).item()


def test_k_of_zero_gives_c_or_zeros(backend, generator):
    a, a_scale, b, b_scale, _, c = make(generator, 70, 40, 0, c=BF16)
    got = deepkern.fp8_gemm_nt(a, a_scale, b, b_scale)
    assert got.shape == (70, 40) and not got.any()
    compare.assert_bitwise(deepkern.fp8_gemm_nt(a, a_scale, b, b_scale, BF16, c), c)


def test_nan_and_inf_stay_in_row_or_column(backend, generator):
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
def test_b_scale_with_wrong_number_of_rows(backend, generator, rows):
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
