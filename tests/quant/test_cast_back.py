"""cast_back: every code, every block shape, and the way there and back."""

from __future__ import annotations

import pytest
import torch

import deepkern
from deepkern.runtime import arch
from deepkern.testing import compare
from deepkern.testing.inputs import quant

REAL = [torch.bfloat16, torch.float16, torch.float32]


def e4m3(code: int) -> float:
    """The value of a code, from the definition of the format."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("out_dtype", REAL)
def test_every_code(backend, out_dtype, target, device):
    q = torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)[None]
    scale = torch.tensor([[1.0, 0.25]], device=device)
    with arch.compile_for(arch.ARCHS[target]):
        got = deepkern.cast_back(q, scale, (1, 128), out_dtype)
    values = torch.tensor([e4m3(c) * (1.0 if c < 128 else 0.25) for c in range(256)], device=device)
    compare.assert_bitwise(got[0], values.to(out_dtype))


@pytest.mark.parametrize("block", [(1, 128), (128, 128), (128, 1), (1, 1), (5, 3), (999, 999)])
def test_blocks(backend, block, generator):
    q, scale, block, out_dtype = quant.cast_back(
        generator, 130, 140, G=2, block=block, out_dtype=torch.float32
    )
    got = deepkern.cast_back(q, scale, block, out_dtype)
    rows = torch.arange(130, device=q.device) // block[0]
    columns = torch.arange(140, device=q.device) // block[1]
    want = q.float() * scale[:, rows][:, :, columns]
    compare.assert_bitwise(got, want)


def test_there_and_back(backend, generator):
    x = quant.values(generator, 140, 200)
    for cast, block in ((deepkern.cast_per_token, (1, 128)), (deepkern.cast_per_block, (128, 128))):
        back = deepkern.cast_back(*cast(x), block, torch.float32)
        again = deepkern.cast_back(*cast(back), block, torch.float32)
        assert compare.diff(back, x) < 2e-3
        assert compare.diff(again, back) < 1e-12  # what has been cast once is cast without loss


def test_strided_rows_and_column_major_scales(backend, generator):
    q, scale, block, _ = quant.cast_back(generator, 60, 300)
    wide = torch.empty(60, 400, dtype=torch.uint8, device=q.device)
    wide[:, 50:350] = q.view(torch.uint8)
    view = wide[:, 50:350].view(torch.float8_e4m3fn)
    column_major = scale.t().contiguous().t()
    got = deepkern.cast_back(view, column_major, block, torch.bfloat16)
    compare.assert_bitwise(got, deepkern.reference.cast_back(q, scale, block, torch.bfloat16))


@pytest.mark.parametrize(
    ("block", "out_dtype", "argument"),
    [
        ((0, 128), torch.float32, "block"),
        ((128,), torch.float32, "block"),
        ((1, 64), torch.float32, "scale"),
        ((1, 128), torch.float64, "out_dtype"),
    ],
)
def test_refuses(block, out_dtype, argument, generator):
    q, scale, *_ = quant.cast_back(generator, 4, 128)
    with pytest.raises(ValueError, match=f"cast_back: {argument}: expected"):
        deepkern.cast_back(q, scale, block, out_dtype)
