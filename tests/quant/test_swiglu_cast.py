"""swiglu_cast: against float64, limits, NaN and inf; gradients from real and FP8 inputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import deepkern
from deepkern.quant.fp8 import with_padding
from deepkern.testing import compare, ops
from deepkern.testing.random_inputs import values

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
REAL = [BF16, F16, F32]
backward = deepkern.swiglu_cast_backward


def plain(gate_up, weights=None, limit=None) -> torch.Tensor:
    """y in the dtype of `gate_up`, in plain torch.

    A value at the limit keeps its gradient, as with torch.clamp up to 2.13. From 2.14 on
    torch.clamp gives 0 there.
    """
    gate, up = gate_up.tensor_split(2, 1)
    if limit is not None:
        gate = torch.where(gate > limit, limit, gate)
        up = torch.where(up.abs() > limit, limit * up.sign(), up)
    y = F.silu(gate) * up
    return y if weights is None else y * weights.to(y)[:, None]


def gradients(grad, gate_up, weights=None, limit=None) -> tuple[torch.Tensor, ...]:
    """(grad_gate_up, y, grad_weights) by torch's autograd in float64."""
    leaves = [x.detach().double().requires_grad_() for x in (gate_up, weights) if x is not None]
    y = plain(leaves[0], leaves[1] if weights is not None else None, limit)
    grads = torch.autograd.grad(y, leaves, grad.double())
    return grads[0], y.detach(), *grads[1:]


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("limit", [None, 1.5])
def test_value_and_scale_against_float64(backend, dtype, limit, generator):
    gate_up, weights, *_ = ops.inputs(
        "swiglu_cast", generator, M=20, I=200, dtype=dtype, weighted=True
    )
    q, scale = deepkern.swiglu_cast(gate_up, weights, limit)
    y = plain(gate_up.double(), weights, limit)
    amax = F.pad(y, (0, 56)).unflatten(1, (2, 128)).abs().amax(-1)
    # Rounding y to bf16 before the cast would give errors of up to 2^-9.
    torch.testing.assert_close(scale.double(), amax.clamp(min=1e-4) / 448, rtol=2e-6, atol=0)
    wide = scale.double().repeat_interleave(128, 1)[:, :200]
    # Half a unit in the last place of e4m3 (3 mantissa bits), or of its subnormals.
    bound = torch.maximum(y.abs() * 2**-4, wide * 2**-10) * 1.001
    assert ((q.double() * wide - y).abs() <= bound).all()


@settings(max_examples=15, deadline=None)
@given(
    M=st.sampled_from([0, 1, 3, 33, 129]) | st.integers(0, 40),
    I=st.sampled_from([0, 1, 100, 128, 129]) | st.integers(0, 400),
    dtype=st.sampled_from(REAL),
    weighted=st.booleans(),
    limit=st.sampled_from([None, 0.0, 2.5]),
    scale_format=st.sampled_from(["fp32", "ue8m0"]),
    scale_layout=st.sampled_from(["row", "column"]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(M, I, dtype, weighted, limit, scale_format, scale_layout, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    args = ops.inputs(
        "swiglu_cast", generator, M=M, I=I, dtype=dtype, weighted=weighted, limit=limit,
        scale_format=scale_format, scale_layout=scale_layout,
    )  # fmt: skip
    with compare.poison(), deepkern.backend("triton"):
        got = deepkern.swiglu_cast(*args)
    want = deepkern.reference.swiglu_cast(*args)
    compare.assert_matches("swiglu_cast", got, want)
    assert M == 0 or got[1].stride() == want[1].stride()


@pytest.mark.parametrize("M", [1, 3, 4, 18])
def test_column_major_scale(backend, M, generator):
    gate_up, *_ = ops.inputs("swiglu_cast", generator, M=M, I=300)
    q, scale = deepkern.swiglu_cast(gate_up)
    q_of_columns, columns = deepkern.swiglu_cast(gate_up, scale_layout="column")
    compare.assert_bitwise(q_of_columns, q)
    compare.assert_bitwise(columns, scale)
    assert scale.is_contiguous() and columns.stride() == (1, -(-M // 4) * 4)
    assert (with_padding(columns, "column")[M:] == 0).all()


def test_limit_clamps_larger_values_only(backend, device):
    limit = 1.5
    edge = torch.tensor([1.5, 1.5078125, 100.0, torch.inf, -1.5, -100.0, 0.5, -0.0], device=device)
    gate, up = edge.repeat(8), edge.repeat_interleave(8)
    inside = torch.cat([gate.clamp(max=limit), up.clamp(-limit, limit)])[None]
    got = deepkern.swiglu_cast(torch.cat([gate, up])[None], limit=limit)
    want = deepkern.swiglu_cast(inside)
    compare.assert_matches("swiglu_cast", got, want)
    assert got[1].isfinite().all()


@pytest.mark.parametrize("limit", [None, 2.0])
@pytest.mark.parametrize(
    ("column", "bad"), [(130, torch.nan), (130, -torch.inf), (530, torch.nan), (530, torch.inf)]
)
def test_nan_and_inf_stay_in_their_block(backend, limit, column, bad, generator):
    """A gate of -inf gives NaN as in torch; an infinite `up` does not if there is a limit."""
    gate_up, *_ = ops.inputs("swiglu_cast", generator, M=4, I=400)
    good_q, good_scale = deepkern.swiglu_cast(gate_up, limit=limit)
    gate_up[1, column] = bad
    q, scale = deepkern.swiglu_cast(gate_up, limit=limit)
    if limit is None or bad != torch.inf:
        assert q[1, 128:256].float().isnan().all() and scale[1, 1].isnan()
    else:
        assert q.float().isfinite().all()
    q[1, 128:256], scale[1, 1] = good_q[1, 128:256], good_scale[1, 1]
    compare.assert_bitwise(q, good_q)
    compare.assert_bitwise(scale, good_scale)


def test_row_weights(backend, device):
    """0 gives a row of zeros, NaN a row of NaN; other rows do not change."""
    gate_up = torch.ones(3, 256, device=device)
    weights = torch.tensor([0.0, torch.nan, 2.0], device=device)
    q, scale = deepkern.swiglu_cast(gate_up, weights)
    assert (q[0].float() == 0).all() and scale[0, 0] == torch.tensor(1e-4) / 448
    assert q[1].float().isnan().all() and scale[1].isnan().all()
    assert (q[2].float() == 448).all()
    torch.testing.assert_close(scale[2, 0].item(), 2 * 0.7310585786 / 448, rtol=1e-6, atol=0)


def test_strided_rows(backend, generator):
    wide = values(generator, 5, 800)
    view = wide[:, 7:607]
    got = deepkern.swiglu_cast(view)
    compare.assert_matches("swiglu_cast", got, deepkern.reference.swiglu_cast(view.clone()))


def test_row_bits_independent_of_batch(backend, generator):
    gate_up, weights, *_ = ops.inputs("swiglu_cast", generator, M=40, I=140, weighted=True)
    q, scale = deepkern.swiglu_cast(gate_up, weights)
    for first, last in ((0, 1), (17, 18), (39, 40), (0, 39), (15, 33)):
        q_part, scale_part = deepkern.swiglu_cast(gate_up[first:last], weights[first:last])
        compare.assert_bitwise(q_part, q[first:last])
        compare.assert_bitwise(scale_part, scale[first:last])


def test_bad_arguments(backend, device):
    gate_up = torch.ones(2, 6, device=device)
    for argument, value, message in (
        ("gate_up", gate_up[:, :5], r"an even number of columns, .* got shape \(2, 5\)"),
        ("limit", -1.0, "a number >= 0, or None, got -1.0"),
        ("limit", torch.nan, "a number >= 0, or None, got nan"),
        ("scale_format", "fp16", "'fp32' or 'ue8m0', got 'fp16'"),
        ("scale_layout", "col", "'row' or 'column', got 'col'"),
    ):
        with pytest.raises(ValueError, match=f"swiglu_cast: {argument}: expected {message}"):
            deepkern.swiglu_cast(**{"gate_up": gate_up, argument: value})


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("limit", [None, 1.5])
def test_gradients_against_autograd(backend, dtype, weighted, limit, generator):
    """Every fourth value is exactly the limit or its negative."""
    grad, gate_up, _, weights, _ = ops.inputs(
        "swiglu_cast_backward", generator, M=11, I=300, dtype=dtype, weighted=weighted
    )
    gate_up[:, ::8] = 1.5
    gate_up[:, 4::8] = -1.5
    grad = grad.abs() * plain(gate_up).sign()  # no cancellation in grad_weights
    got = backward(grad, gate_up, None, weights, limit)
    want = gradients(grad, gate_up, weights, limit)
    assert got[0].dtype == got[1].dtype == dtype
    if limit is not None:
        assert ((got[0] == 0) & (gate_up.abs() > limit)).any()
        at = (gate_up.abs() == limit) & (want[0].abs() > 1e-6)  # fp16 rounds smaller ones to 0
        assert at.any() and (got[0][at] != 0).all()
    compare.assert_close(got[0], want[0], "grad_gate_up", dtype)
    compare.assert_close(got[1], want[1], "y", dtype)
    if weighted:
        compare.assert_close(got[2], want[2], "grad_weights", F32)
    else:
        assert got[2] is None


@pytest.mark.parametrize("I", [256, 300])
@pytest.mark.parametrize("scale_layout", ["row", "column"])
def test_gradients_from_fp8_input(backend, I, scale_layout, generator):
    """The bits of the dequantized values; with I = 300 a block covers gate and up."""
    grad, gate_up, _, weights, _ = ops.inputs(
        "swiglu_cast_backward", generator, M=9, I=I, weighted=True
    )
    q, scale = deepkern.reference.cast_per_token(gate_up, scale_layout=scale_layout)
    dequantized = deepkern.reference.cast_back(q, scale, (1, 128), F32)
    got = backward(grad, q, scale, weights, 4.0)
    want = backward(grad, dequantized, None, weights, 4.0)
    for g, w in zip(got, want, strict=True):
        compare.assert_bitwise(g, w)
    exact = gradients(grad, dequantized, weights, 4.0)
    for g, w in zip(got, exact, strict=True):
        compare.assert_close(g, w)


def test_recomputed_y_casts_to_the_same_bits(generator):
    """The cast of the recomputed fp32 y equals the output of the forward pass."""
    gate_up, weights, limit, *_ = args = ops.inputs(
        "swiglu_cast", generator, M=21, I=300, weighted=True, limit=3.0
    )
    with deepkern.backend("triton"):
        _, y, _ = backward(torch.ones(21, 300, device=gate_up.device), gate_up, None, *args[1:3])
        want = deepkern.swiglu_cast(gate_up, weights, limit)
    got = deepkern.reference.cast_per_token(y)
    compare.assert_matches("swiglu_cast", got, want)


@settings(max_examples=12, deadline=None)
@given(
    M=st.integers(0, 20),
    I=st.sampled_from([0, 1, 127, 128]) | st.integers(0, 300),
    dtype=st.sampled_from(REAL),
    fp8=st.booleans(),
    weighted=st.booleans(),
    limit=st.sampled_from([None, 0.0, 2.5]),
    seed=st.integers(0, 2**31),
)
def test_gradients_of_any_shape(M, I, dtype, fp8, weighted, limit, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    name = "swiglu_cast_backward"
    args = ops.inputs(
        name, generator, M=M, I=I, dtype=dtype, fp8=fp8, weighted=weighted, limit=limit
    )
    with compare.poison(), deepkern.backend("triton"):
        got = backward(*args)
    compare.assert_matches(name, got, deepkern.reference.swiglu_cast_backward(*args))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [3, 303])
def test_gradients_of_nan_and_inf(backend, bad, column, generator):
    grad, gate_up, _, weights, _ = args = ops.inputs(
        "swiglu_cast_backward", generator, M=5, I=300, dtype=F32, weighted=True
    )
    good = backward(*args)
    gate_up[2, column] = bad
    got, want = backward(*args), gradients(grad, gate_up, weights)
    for g, w in zip(got, want, strict=True):
        compare.assert_close(g, w)
    assert not got[1][2, 3].isfinite() and not got[2][2].isfinite()
    others = torch.tensor([0, 1, 3, 4], device=grad.device)
    for g, before in zip(got, good, strict=True):
        compare.assert_bitwise(g[others], before[others])
    other_columns = torch.arange(300, device=grad.device) != 3
    compare.assert_bitwise(got[1][2, other_columns], good[1][2, other_columns])


def test_nan_gradient_with_a_limit(backend, device):
    """The same as without a limit; torch.clamp would give NaN the gradient 0."""
    gate_up = torch.tensor([[torch.nan, 1.0, 1.0, torch.nan]], device=device)
    grad = torch.ones(1, 2, device=device)
    got, y, _ = backward(grad, gate_up, limit=1.0)
    assert y.isnan().all() and got[0, :3].isnan().all()
    compare.assert_matches("swiglu_cast_backward", (got, y), backward(grad, gate_up)[:2])


def test_gradient_row_bits_independent_of_batch(generator):
    """For all three outputs: the order of the sum in grad_weights depends only on I."""
    grad, gate_up, scale, weights, _ = ops.inputs(
        "swiglu_cast_backward", generator, M=40, I=300, fp8=True, weighted=True
    )
    wide = torch.cat([grad, grad], 1)[:, 150:450]  # strided
    with deepkern.backend("triton"):
        whole = backward(wide, gate_up, scale, weights)
        for first, last in ((0, 1), (17, 18), (39, 40), (0, 39), (7, 25)):
            part = (x[first:last] for x in (wide, gate_up, scale, weights))
            for got, want in zip(backward(*part), whole, strict=True):
                compare.assert_bitwise(got, want[first:last])


def test_gradient_dtype_differs_from_input(backend, generator):
    gate_up, *_ = ops.inputs("swiglu_cast", generator, M=3, I=70, dtype=BF16)
    grad = values(generator, 3, 70, dtype=F32)
    got = backward(grad, gate_up)
    for g, w in zip(got[:2], gradients(grad, gate_up), strict=True):
        compare.assert_close(g, w, dtype=F32)


def test_bad_arguments_of_backward(backend, generator):
    grad, gate_up, scale, _, _ = ops.inputs("swiglu_cast_backward", generator, M=3, I=128, fp8=True)
    name = "swiglu_cast_backward"
    with pytest.raises(ValueError, match=rf"{name}: gate_up: expected 2I = 200 columns, .*256\)"):
        backward(grad[:, :100], gate_up, scale)
    with pytest.raises(ValueError, match=f"{name}: gate_up_scale: expected a scale .*got None"):
        backward(grad, gate_up)
    with pytest.raises(ValueError, match=f"{name}: gate_up_scale: .*None otherwise, got a scale"):
        backward(grad, gate_up.bfloat16(), scale)
    with pytest.raises(ValueError, match=f"{name}: limit: expected a number >= 0"):
        backward(grad, gate_up, scale, limit=-2.0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["swiglu_cast", "swiglu_cast_backward"])
@pytest.mark.parametrize("index", range(3))
def test_gpu_sizes(backend, name, index, generator):
    args = ops.inputs(name, generator, **ops.sizes(name).gpu[index])
    got = getattr(deepkern, name)(*args)
    compare.assert_matches(name, got, getattr(deepkern.reference, name)(*args))
