"""The native CPU fp8_gemm_nt on each instruction set: shapes, bits, special values, threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deepkern
from deepkern.runtime import native
from deepkern.testing import compare, ops
from deepkern.testing.isas import cpu_isas
from deepkern.testing.random_inputs import values

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
REAL = [BF16, F16, F32]
pytestmark = pytest.mark.skipif(
    native.native_op("fp8_gemm_nt") is None, reason=str(native.missing_reason())
)


@pytest.fixture
def generator(seed) -> torch.Generator:
    """A CPU generator, also where the other tests run on a GPU."""
    return torch.Generator().manual_seed(seed)


def make(generator, M, N, K, **kwargs):
    return ops.inputs("fp8_gemm_nt", generator, M=M, N=N, K=K, **kwargs)


def gemm(a, a_scale, b, b_scale, out_dtype=F32, c=None):
    return native.native_op("fp8_gemm_nt")(a, a_scale, b, b_scale, out_dtype, c)


def check(args) -> None:
    compare.assert_matches("fp8_gemm_nt", gemm(*args), deepkern.reference.fp8_gemm_nt(*args))


def codes(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.uint8).view(torch.float8_e4m3fn)


# (M, N, K). Up to 12 rows are multiplied in tiles of 1, 2 or 4 rows, more in tiles of 3 to 6. Up to
# 256 rows are widened at once, a strip has 32 columns, a block of K has 128 values.
SHAPES = {
    "all 1": (1, 1, 1),
    "1 row": (1, 33, 200),
    "2 rows, K = 128 + 1": (2, 95, 129),
    "3 rows, 1 block of K": (3, 16, 128),
    "4 rows, 5 blocks of K": (4, 130, 640),
    "5 rows, N and K partial": (5, 31, 127),
    "12 rows, 5 blocks of K": (12, 33, 600),
    "13 rows": (13, 64, 200),
    "63 rows": (63, 65, 300),
    "256 + 4 rows": (260, 40, 257),
    "long K": (2, 20, 7168),
}


@pytest.mark.parametrize("b_rows", [128, 1])
@pytest.mark.parametrize(("M", "N", "K"), SHAPES.values(), ids=SHAPES)
def test_shapes(isa, generator, M, N, K, b_rows):
    for out_dtype, c in [(F32, None), (BF16, F32), (F16, BF16), (F32, F16)]:
        check(make(generator, M, N, K, b_rows=b_rows, out_dtype=out_dtype, c=c))


@settings(max_examples=40, deadline=None)
@given(
    M=st.integers(0, 20),
    N=st.integers(0, 140),
    K=st.integers(0, 400),
    b_rows=st.sampled_from([1, 128]),
    out_dtype=st.sampled_from(REAL),
    c=st.sampled_from([None, *REAL]),
    data=st.data(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(M, N, K, b_rows, out_dtype, c, data, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPKERN_CPU_ISA", data.draw(st.sampled_from(cpu_isas())))
        generator = torch.Generator().manual_seed(seed)
        check(make(generator, M, N, K, b_rows=b_rows, out_dtype=out_dtype, c=c))


@pytest.mark.parametrize("M", [1, 2, 4, 256])
def test_every_product_of_two_codes(isa, M):
    """K = 1, so every product is exact in every tile, NaN and subnormals included."""
    every = codes(torch.arange(256))[:, None]
    one = torch.ones(256, 1)
    want = every.float() @ every.float().T
    for m in range(0, 256, M):
        got = gemm(every[m : m + M], one[:M], every, one)
        compare.assert_bitwise(got, want[m : m + M] + 0.0)


@pytest.mark.parametrize("M", [1, 2, 4, 256])
def test_subnormal_codes_are_never_flushed(isa, M):
    """Also where PyTorch flushes subnormal floats, and it still flushes them afterwards."""
    every = codes(torch.arange(256))[:, None]
    one = torch.ones(256, 1)
    want = gemm(every[:M], one[:M], every, one)
    torch.set_flush_denormal(True)
    try:
        got = gemm(every[:M], one[:M], every, one)
        assert torch.tensor([1e-40]).mul(1.0).item() == 0
    finally:
        torch.set_flush_denormal(False)
    compare.assert_bitwise(got, want)


def test_every_position_in_a_block(isa, generator):
    """A is the identity, so D is B transposed."""
    b = codes(torch.randint(0, 127, (40, 300), generator=generator))
    a = torch.eye(300).to(torch.float8_e4m3fn)
    scale, b_scale = torch.ones(300, 3), torch.ones(1, 3)
    compare.assert_bitwise(gemm(a, scale, b, b_scale), b.float().T)


@pytest.mark.parametrize("b_rows", [128, 1])
def test_row_bits_independent_of_M(isa, generator, b_rows):
    a, a_scale, b, b_scale, _, c = make(generator, 300, 70, 300, b_rows=b_rows, c=BF16)
    full = gemm(a, a_scale, b, b_scale, F32, c)
    for M in (*range(1, 71), 255, 256, 257, 299):
        for rows in (slice(0, M), slice(300 - M, 300)):
            got = gemm(a[rows], a_scale[rows], b, b_scale, F32, c[rows])
            compare.assert_bitwise(got, full[rows], f"{M} rows")


def test_column_bits_independent_of_N(isa, generator):
    a, a_scale, b, b_scale, *_ = make(generator, 6, 130, 300, b_rows=1)
    full = gemm(a, a_scale, b, b_scale)
    for columns in (slice(0, 1), slice(3, 50), slice(31, 33), slice(129, 130)):
        for M in (1, 2, 6):
            got = gemm(a[:M], a_scale[:M], b[columns], b_scale[columns])
            compare.assert_bitwise(got, full[:M, columns])


@pytest.mark.parametrize("M", [1, 70])
def test_bits_independent_of_threads(isa, generator, M):
    args = make(generator, M, 2000, 700)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(gemm(*args))
    finally:
        torch.set_num_threads(threads)
    compare.assert_bitwise(results[1], results[0])
    compare.assert_bitwise(results[2], results[0])


@pytest.mark.parametrize("M", [1, 3, 20])
def test_b_with_contiguous_columns_gives_same_bits(isa, generator, M):
    """`b` is read transposed, strip by strip, without a copy of all of it."""
    for N, K in [(200, 300), (31, 15), (33, 128), (1, 200), (40, 1)]:
        a, a_scale, b, b_scale, *_ = make(generator, M, N, K)
        transposed = b.t().contiguous().t()
        compare.assert_bitwise(gemm(a, a_scale, transposed, b_scale), gemm(a, a_scale, b, b_scale))


@pytest.mark.parametrize("M", [1, 3, 20])
def test_block_and_row_b_scales_give_same_bits(isa, generator, M):
    a, a_scale, b, b_scale, *_ = make(generator, M, 200, 300)
    per_row = b_scale.repeat_interleave(128, 0)[:200]
    compare.assert_bitwise(gemm(a, a_scale, b, per_row), gemm(a, a_scale, b, b_scale))


@pytest.mark.parametrize("M", [1, 3, 20])
def test_any_strides(isa, generator, M):
    a, a_scale, b, b_scale, _, c = make(generator, M, 200, 300, b_rows=1, c=F32)
    want = gemm(a, a_scale, b, b_scale, F32, c)
    column_major = [x.t().contiguous().t() for x in (a, a_scale, b, b_scale)]
    compare.assert_bitwise(gemm(*column_major, F32, c), want)

    def embed(x):
        """A copy of x within a larger tensor of NaN, with an unaligned row stride."""
        larger = torch.full((len(x) + 2, x.shape[1] + 7), torch.nan).to(x.dtype)
        return larger[1:-1, 3:-4].copy_(x)

    strided = [embed(x) for x in (a, a_scale, b, b_scale)]
    compare.assert_bitwise(gemm(*strided, F32, embed(c)), want)


@pytest.mark.parametrize("M", [1, 2, 4, 70])
def test_nan_affects_only_its_row_or_column(isa, generator, M):
    a, a_scale, b, b_scale, *_ = make(generator, M, 300, 300)
    finite = gemm(a, a_scale, b, b_scale)
    b[7, 0], b[8, 299], b_scale[1, 2] = torch.nan, -torch.nan, torch.inf
    affected = torch.zeros(M, 300, dtype=torch.bool)
    affected[:, 7:9], affected[:, 128:256] = True, True
    if M > 1:
        a[M - 1, 131] = torch.nan
        a_scale[0, 1] = torch.nan
        affected[M - 1], affected[0] = True, True
    got = gemm(a, a_scale, b, b_scale)
    assert torch.equal(got.isfinite(), ~affected)
    compare.assert_bitwise(got[~affected], finite[~affected])
    check((a, a_scale, b, b_scale, F32))


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_every_16_bit_c(isa, dtype):
    """With K = 0 the result is c, converted exactly."""
    c = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).reshape(256, 256)
    empty = codes(torch.zeros(256, 0))
    got = gemm(empty, torch.ones(256, 0), empty, torch.ones(256, 0), F32, c)
    compare.assert_bitwise(got, c.float() + 0.0)


@pytest.mark.parametrize("out_dtype", [BF16, F16])
def test_rounding(isa, generator, out_dtype):
    """Random float32, every 16-bit value, the midpoints between two, and the neighbours of both."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(out_dtype).float()
    every = every[every.isfinite()].sort().values
    midpoint = (every[1:].double() + every[:-1].double()).div(2).float()
    edges = torch.cat([every, midpoint])
    edges = torch.cat([edges + 0, *(edges.nextafter(torch.tensor(x)) for x in (-1e38, 1e38))])
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=generator).to(torch.int32)
    c = torch.cat([edges, bits.view(F32), torch.tensor([torch.inf, -torch.inf, torch.nan])])
    empty = codes(torch.zeros(1, 0))
    b, no_scale = codes(torch.zeros(len(c), 0)), torch.ones(1, 0)
    got = gemm(empty, no_scale, b, torch.ones(len(c), 0), out_dtype, c[None])
    compare.assert_bitwise(got[0], (c + 0.0).to(out_dtype))


@pytest.mark.parametrize(("M", "N", "K"), [(0, 5, 200), (5, 0, 200), (0, 0, 0), (5, 7, 0)])
def test_empty_shapes(isa, generator, M, N, K):
    got = gemm(*make(generator, M, N, K, out_dtype=F32))
    assert got.shape == (M, N) and not got.any()


def bad_arguments(generator) -> dict[str, tuple]:
    """The error message of each list of bad arguments."""
    a, a_scale, b, b_scale, *_ = make(generator, 3, 300, 200)
    return {
        r"b: expected size 200 in dimension 1, got 199": (a, a_scale, b[:, :199], b_scale),
        r"a: expected dtype": (a.float(), a_scale, b, b_scale),
        r"b: expected rank 2, got rank 1": (a, a_scale, b[0], b_scale),
        r"a_scale: expected size 3 in dimension 0, got 2": (a, a_scale[:2], b, b_scale),
        r"a_scale: expected size 2 in dimension 1, got 1": (a, a_scale[:, :1], b, b_scale),
        r"a_scale: expected dtype": (a, a_scale.double(), b, b_scale),
        r"b_scale: expected 300 rows or one per 128, got 2": (a, a_scale, b, b_scale[:2]),
        r"out_dtype: expected dtype": (a, a_scale, b, b_scale, torch.float64),
        r"c: expected size 300 in dimension 1": (a, a_scale, b, b_scale, F32, torch.ones(3, 299)),
        r"c: expected dtype": (a, a_scale, b, b_scale, F32, torch.ones(3, 300).double()),
        r"c: expected stride 1": (a, a_scale, b, b_scale, F32, torch.ones(300, 3).t()),
    }


def test_bad_arguments_raise(generator):
    for message, args in bad_arguments(generator).items():
        with pytest.raises(RuntimeError, match=f"fp8_gemm_nt: {message}"):
            gemm(*args)


def test_unknown_isa_raises(generator, monkeypatch):
    monkeypatch.setenv("DEEPKERN_CPU_ISA", "neon")
    with pytest.raises(
        RuntimeError, match="DEEPKERN_CPU_ISA: expected an instruction set of this CPU"
    ):
        gemm(*make(generator, 2, 2, 2)[:4])


def test_auto_selects_cpu_backend(generator):
    args = make(generator, 3, 40, 200)
    assert deepkern.explain(deepkern.fp8_gemm_nt, *args).backend == "cpu"
    compare.assert_bitwise(deepkern.fp8_gemm_nt(*args), gemm(*args))


def test_error_against_unquantized_product(isa, generator):
    x, w = values(generator, 50, 500), values(generator, 90, 500)
    q, w_q = deepkern.reference.cast_per_token(x), deepkern.reference.cast_per_block(w)
    assert compare.diff(gemm(*q, *w_q), x.double() @ w.double().T) < 2e-3
