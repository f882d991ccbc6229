"""rmsnorm_cast: against float64 and cast_per_token, the residual, long rows, NaN and inf."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deepkern
from deepkern.quant.fp8 import with_padding
from deepkern.testing import compare, ops
from deepkern.testing.random_inputs import values

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
REAL = [BF16, F16, F32]
EPSILON = {BF16: 2**-8, F16: 2**-11, F32: 2**-21}  # half an ulp; fp32 rounds six times


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("weight_dtype", [BF16, F32])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_norm_against_float64(backend, dtype, weight_dtype, eps, generator):
    x, weight, *_ = ops.inputs(
        "rmsnorm_cast", generator, M=9, K=300, dtype=dtype, weight_dtype=weight_dtype
    )
    _, _, normed, none = deepkern.rmsnorm_cast(x, weight, eps)
    wide = x.double()
    want = wide / (wide.square().mean(1, keepdim=True) + eps).sqrt() * weight.double()
    assert normed.dtype == dtype and none is None
    torch.testing.assert_close(normed.double(), want, rtol=EPSILON[dtype] * 1.001, atol=1e-7)


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
@pytest.mark.parametrize("scale_layout", ["row", "column"])
def test_cast_equals_cast_per_token(backend, dtype, scale_format, scale_layout, generator):
    args = ops.inputs(
        "rmsnorm_cast", generator, M=7, K=300, dtype=dtype, residual=True,
        scale_format=scale_format, scale_layout=scale_layout,
    )  # fmt: skip
    q, scale, normed, _ = deepkern.rmsnorm_cast(*args)
    want = deepkern.cast_per_token(normed, scale_format, scale_layout)
    compare.assert_matches("cast_per_token", (q, scale), want)
    assert scale.stride() == want[1].stride()


@settings(max_examples=15, deadline=None)
@given(
    M=st.sampled_from([0, 1, 3, 33]) | st.integers(0, 12),
    K=st.sampled_from([0, 1, 100, 128, 129, 2048]) | st.integers(0, 700),
    dtype=st.sampled_from(REAL),
    weight_dtype=st.sampled_from(REAL),
    residual=st.booleans(),
    scale_format=st.sampled_from(["fp32", "ue8m0"]),
    scale_layout=st.sampled_from(["row", "column"]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(M, K, dtype, weight_dtype, residual, scale_format, scale_layout, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    args = ops.inputs(
        "rmsnorm_cast", generator, M=M, K=K, dtype=dtype, weight_dtype=weight_dtype,
        residual=residual, scale_format=scale_format, scale_layout=scale_layout,
    )  # fmt: skip
    with compare.poison(), deepkern.backend("triton"):
        got = deepkern.rmsnorm_cast(*args)
    want = deepkern.reference.rmsnorm_cast(*args)
    compare.assert_matches("rmsnorm_cast", got, want)
    assert M == 0 or got[1].stride() == want[1].stride()


@pytest.mark.parametrize("K", [7168, 8193, 12304, 16384, 16385, 40000])
def test_long_rows(K, generator):
    """Rows that fit registers (up to 16384 if aligned), and longer ones."""
    args = ops.inputs("rmsnorm_cast", generator, M=2, K=K, residual=True, scale_layout="column")
    with deepkern.backend("triton"):
        got = deepkern.rmsnorm_cast(*args)
    compare.assert_matches("rmsnorm_cast", got, deepkern.reference.rmsnorm_cast(*args))
    h = got[3].double()
    want = h / (h.square().mean(1, keepdim=True) + 1e-6).sqrt() * args[1].double()
    torch.testing.assert_close(got[2].double(), want, rtol=2**-8 * 1.001, atol=1e-7)


def test_same_bits_for_one_and_two_passes(generator):
    """Rows of more than 8192 values that are not aligned to 16 bytes are read twice."""
    x, weight, *_ = ops.inputs("rmsnorm_cast", generator, M=2, K=12304)
    shifted = torch.cat([x[:, :1], x], 1)[:, 1:]
    with deepkern.backend("triton"):
        got, want = deepkern.rmsnorm_cast(shifted, weight), deepkern.rmsnorm_cast(x, weight)
    compare.assert_matches("rmsnorm_cast", got[:3], want[:3])


@pytest.mark.parametrize("dtype", REAL)
def test_residual_is_added_and_rounded_first(backend, dtype, generator):
    x, weight, eps, residual, *_ = ops.inputs(
        "rmsnorm_cast", generator, M=6, K=200, dtype=dtype, residual=True
    )
    got = deepkern.rmsnorm_cast(x, weight, eps, residual)
    compare.assert_bitwise(got[3], x + residual)
    want = deepkern.rmsnorm_cast(got[3], weight, eps)
    compare.assert_matches("rmsnorm_cast", got[:3], want[:3])


@pytest.mark.parametrize("M", [1, 3, 4, 9])
def test_column_major_scale(backend, M, generator):
    x, weight, *_ = ops.inputs("rmsnorm_cast", generator, M=M, K=300)
    _, scale, *_ = deepkern.rmsnorm_cast(x, weight)
    _, columns, *_ = deepkern.rmsnorm_cast(x, weight, scale_layout="column")
    compare.assert_bitwise(columns, scale)
    assert scale.is_contiguous() and columns.stride() == (1, -(-M // 4) * 4)
    assert (with_padding(columns, "column")[M:] == 0).all()


def test_zeros(backend, device):
    q, scale, normed, _ = deepkern.rmsnorm_cast(
        torch.zeros(2, 200, device=device), torch.ones(200, device=device)
    )
    assert (q.view(torch.uint8) == 0).all() and (normed == 0).all()
    assert (scale == torch.tensor(1e-4) / 448).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["x", "residual"])
def test_nan_and_inf_stay_in_their_row(backend, bad, where, generator):
    """As in torch: NaN makes the row NaN; inf becomes NaN and the rest of its row 0."""
    x, weight, eps, residual, *_ = ops.inputs("rmsnorm_cast", generator, M=4, K=384, residual=True)
    good = deepkern.rmsnorm_cast(x, weight, eps, residual)
    (x if where == "x" else residual)[1, 130] = bad
    got = deepkern.rmsnorm_cast(x, weight, eps, residual)
    q, scale, normed, _ = got
    plain = torch.nn.functional.rms_norm((x + residual).float(), (384,), weight.float(), eps)
    assert torch.equal(normed.isnan(), plain.isnan()) and normed[1, 130].isnan()
    assert torch.equal(scale[1].isnan(), normed[1].unflatten(0, (3, 128)).isnan().any(1))
    assert q[1, 128:256].float().isnan().all()
    others = torch.tensor([0, 2, 3], device=x.device)
    for g, before in zip(got, good, strict=True):
        compare.assert_bitwise(g[others], before[others])


def test_nan_weight_makes_its_column_nan(backend, generator):
    x, weight, *_ = ops.inputs("rmsnorm_cast", generator, M=3, K=300)
    weight[140] = torch.nan
    q, scale, normed, _ = deepkern.rmsnorm_cast(x, weight)
    assert normed[:, 140].isnan().all() and normed.isnan().sum() == 3
    assert scale[:, 1].isnan().all() and scale.isnan().sum() == 3


def test_squares_that_overflow_fp32(backend, device):
    """1e20 squared is inf, so the row is 0, as in torch in fp32."""
    x = torch.full((1, 128), 1e20, device=device)
    _, _, normed, _ = deepkern.rmsnorm_cast(x, torch.ones(128, device=device))
    assert (normed == 0).all()


def test_residual_sum_that_overflows_fp16(backend, device):
    x = torch.full((1, 128), 60000.0, dtype=F16, device=device)
    *_, normed, new_residual = deepkern.rmsnorm_cast(x, torch.ones_like(x[0]), residual=x)
    assert new_residual.isposinf().all() and normed.isnan().all()


def test_strided_rows(backend, generator):
    x = values(generator, 5, 900)[:, 3:303]
    residual = values(generator, 5, 400)[:, 50:350]
    weight = values(generator, 300)
    got = deepkern.rmsnorm_cast(x, weight, residual=residual)
    want = deepkern.reference.rmsnorm_cast(x.clone(), weight, residual=residual.clone())
    compare.assert_matches("rmsnorm_cast", got, want)


def test_row_bits_independent_of_batch(backend, generator):
    """With K = 140 one program computes several rows."""
    x, weight, eps, residual, *_ = ops.inputs("rmsnorm_cast", generator, M=40, K=140, residual=True)
    whole = deepkern.rmsnorm_cast(x, weight, eps, residual)
    for first, last in ((0, 1), (17, 18), (39, 40), (0, 39), (7, 22)):
        part = deepkern.rmsnorm_cast(x[first:last], weight, eps, residual[first:last])
        for got, want in zip(part, whole, strict=True):
            compare.assert_bitwise(got, want[first:last])


def test_bad_arguments(backend, generator):
    x, weight, eps, residual, *_ = ops.inputs("rmsnorm_cast", generator, M=3, K=140, residual=True)
    with pytest.raises(TypeError, match="rmsnorm_cast: residual: expected torch.bfloat16 as x"):
        deepkern.rmsnorm_cast(x, weight, eps, residual.float())
    with pytest.raises(ValueError, match="rmsnorm_cast: residual: expected M = 3 in"):
        deepkern.rmsnorm_cast(x, weight, eps, residual[:2])
    for argument, message in (("scale_format", "'fp32' or 'ue8m0'"), ("scale_layout", "'row' or")):
        with pytest.raises(ValueError, match=f"rmsnorm_cast: {argument}: expected {message}"):
            deepkern.rmsnorm_cast(x, weight, **{argument: "fp16"})


@pytest.mark.gpu
@pytest.mark.parametrize("size", ops.sizes("rmsnorm_cast").gpu, ids=str)
def test_gpu_sizes(backend, size, generator):
    args = ops.inputs("rmsnorm_cast", generator, **size)
    got = deepkern.rmsnorm_cast(*args)
    compare.assert_matches("rmsnorm_cast", got, deepkern.reference.rmsnorm_cast(*args))
