"""FP8 conversions in integer arithmetic give the bits of the FP8 types, for every code."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from deepkern import reference
from deepkern.quant import fp8
from deepkern.testing import compare


@triton.jit
def encode(x_ptr, q_ptr, NATIVE_FP8: tl.constexpr, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(q_ptr + i, fp8.to_fp8(tl.load(x_ptr + i), NATIVE_FP8))


@triton.jit
def decode(q_ptr, x_ptr, operand_ptr, NATIVE_FP8: tl.constexpr):
    i = tl.arange(0, 256)
    q = tl.load(q_ptr + i)
    tl.store(x_ptr + i, fp8.from_fp8(q, NATIVE_FP8))
    tl.store(operand_ptr + i, fp8.matrix_operand(q, NATIVE_FP8).to(tl.float32))


@pytest.fixture
def codes(device):
    codes = torch.arange(256, dtype=torch.int32, device=device)
    return codes.to(torch.uint8).view(torch.float8_e4m3fn)


@pytest.mark.parametrize("native_fp8", [True, False], ids=["native", "emulated"])
def test_decode_every_code(codes, native_fp8):
    x, operand = (torch.empty(256, device=codes.device) for _ in range(2))
    decode[(1,)](fp8.as_bits(codes, native_fp8), x, operand, native_fp8)
    compare.assert_bitwise(x, codes.float())
    compare.assert_bitwise(operand, codes.float())


def edge_values(codes) -> torch.Tensor:
    """All e4m3 values and midpoints, the float32 next to each, and values out of range."""
    values = codes.float()[codes.float().isfinite()].unique()
    points = torch.cat([values, (values[1:] + values[:-1]) / 2])
    far = torch.full_like(points, 1e9)
    outside = [464.0, 465.0, 1e4, 3e38, float("inf"), float("nan"), 1e-38, 1e-45, 0.0, 2**-11]
    outside = torch.tensor(outside, device=codes.device)
    return torch.cat([points, points.nextafter(far), points.nextafter(-far), outside, -outside])


@pytest.mark.parametrize("native_fp8", [True, False], ids=["native", "emulated"])
def test_encode_rounds_to_even_and_saturates(codes, native_fp8, generator):
    device = codes.device
    size = torch.randint(-30, 12, (8192,), generator=generator, device=device).float().exp2()
    x = torch.cat(
        [edge_values(codes), torch.randn(8192, generator=generator, device=device) * size]
    )
    x = torch.cat([x, x.new_zeros(-x.numel() % 1024)])
    q = torch.zeros(x.numel(), dtype=torch.float8_e4m3fn, device=device)
    encode[(x.numel() // 1024,)](x, fp8.as_bits(q, native_fp8), native_fp8, 1024)
    compare.assert_bitwise(q.float(), reference.quant.to_e4m3(x).float())
    assert (q.view(torch.uint8)[x.isnan()] & 127 == 127).all()


def test_reference_rounds_to_nearest_even(codes):
    """The reference itself, against the distances to all codes in float64."""
    x = edge_values(codes)
    x = x[x.abs() < 1e6]  # also drops NaN
    finite = codes.view(torch.uint8)[codes.float().isfinite()]
    values = finite.view(torch.float8_e4m3fn).double()
    distance = (x.double()[:, None] - values).abs()
    is_nearest = distance == distance.amin(1, keepdim=True)
    even = is_nearest & (finite % 2 == 0)
    choice = torch.where(even.any(1, keepdim=True), even, is_nearest)
    assert torch.equal(reference.quant.to_e4m3(x).double(), values[choice.int().argmax(1)])
