"""swiglu: against float64, equal bits at every position, special values, gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import deepkern
from deepkern.testing import compare
from deepkern.testing.random_inputs import values

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
REAL = [BF16, F16, F32]
swiglu = deepkern.swiglu


@pytest.mark.parametrize("dtype", REAL)
def test_against_float64(backend, generator, dtype):
    gate_up = values(generator, 20, 2 * 200, dtype=dtype)
    gate, up = gate_up.double().tensor_split(2, 1)
    got, want = swiglu(gate_up), F.silu(gate) * up
    # One rounding to the dtype after 5 or fewer to fp32; fp16 has smaller subnormals.
    unit = {BF16: 2**-8, F16: 2**-11, F32: 4e-7}[dtype]
    bound = want.abs() * unit * 1.001 + (2**-25 if dtype == F16 else 1e-37)
    assert ((got.double() - want).abs() <= bound).all()


@settings(max_examples=15, deadline=None)
@given(
    M=st.integers(0, 40),
    I=st.sampled_from([0, 1, 100, 128, 129]) | st.integers(0, 400),
    dtype=st.sampled_from(REAL),
    seed=st.integers(0, 2**31),
)
def test_any_shape(M, I, dtype, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gate_up = values(torch.Generator(device).manual_seed(seed), M, 2 * I, dtype=dtype)
    with compare.poison(), deepkern.backend("triton"):
        compare.assert_bitwise(swiglu(gate_up), deepkern.reference.swiglu(gate_up))


@pytest.mark.parametrize("dtype", REAL)
def test_bits_independent_of_position(backend, generator, dtype):
    """Equal columns give equal bits in whole vectors and in the rest; rows do not interact."""
    gate, up = values(generator, 9, 1, dtype=dtype), values(generator, 9, 1, dtype=dtype)
    gate_up = torch.cat([gate.expand(-1, 141), up.expand(-1, 141)], 1)
    y = swiglu(gate_up)
    compare.assert_bitwise(y, y[:, :1].expand(-1, 141).contiguous())
    for row in range(9):
        compare.assert_bitwise(swiglu(gate_up[row : row + 1]), y[row : row + 1])


def test_is_what_swiglu_cast_casts(backend, generator):
    gate_up = values(generator, 20, 2 * 300, dtype=F32)
    got = deepkern.cast_per_token(swiglu(gate_up))
    compare.assert_matches("swiglu_cast", got, deepkern.swiglu_cast(gate_up))


def test_strided_rows(backend, generator):
    wide = values(generator, 5, 800)
    view = wide[:, 7:607]
    compare.assert_bitwise(swiglu(view), deepkern.reference.swiglu(view.clone()))


def test_special_values(backend, device):
    gate = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 100.0, -100.0], device=device)
    y = swiglu(torch.cat([gate, torch.full_like(gate, 2.0)])[None])[0]
    assert y[:2].tolist() == [0.0, 0.0] and y[2] == torch.inf and y[5] == 200.0
    assert y[3].isnan() and y[4].isnan() and abs(y[6]) < 1e-37


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_gradient(backend, generator, dtype):
    gate_up, grad = values(generator, 6, 2 * 70, dtype=dtype), values(generator, 6, 70, dtype=dtype)
    leaf, wide = gate_up.clone().requires_grad_(), gate_up.double().requires_grad_()
    swiglu(leaf).backward(grad)
    gate, up = wide.tensor_split(2, 1)
    (F.silu(gate) * up).backward(grad.double())
    compare.assert_close(leaf.grad, wide.grad.to(dtype))


def test_odd_number_of_columns(backend, device):
    with pytest.raises(ValueError, match="swiglu: gate_up: expected an even number of columns"):
        swiglu(torch.ones(2, 7, device=device))
