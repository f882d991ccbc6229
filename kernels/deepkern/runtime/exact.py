"""Arithmetic inside Triton kernels with the same bits on every machine.

exp is spelled out as IEEE additions and multiplications, each rounded to nearest even, because
libraries and GPUs differ in its last place; divisions and roots are the correctly rounded ones; and
a sum has an order that no tile, no warp count and no other row changes. A kernel that uses these is
launched with `enable_fp_fusion=False` (no a * b + c in one rounding). `deepkern/reference/exact.py`
has the same formulas, operation for operation, in PyTorch.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exp(x):
    """e^x for x <= 0: x = n ln 2 + r with |r| <= ln 2 / 2; Cephes' polynomial in r times 2^n."""
    x = tl.where(x < -104.0, -104.0, x)  # where e^x rounds to 0; NaN stays
    # Adding 1.5 * 2^23 rounds to an integer, and leaves that integer in the low bits.
    shifted = x * 1.44269502 + 12582912.0
    n = shifted - 12582912.0
    r = (x - n * 0.693359375) - n * -2.12194442e-4  # ln 2 in two parts: n times the first is exact
    p = r * 1.98756912e-4 + 1.39819994e-3
    p = p * r + 8.33345205e-3
    p = p * r + 4.16657962e-2
    p = p * r + 0.166666657
    p = p * r + 0.5
    value = (p * (r * r) + r) + 1.0
    # Times 2^n in two steps, so that a subnormal result is rounded once, by the second.
    exponent = shifted.to(tl.int32, bitcast=True) - 0x4B400000
    half = exponent >> 1
    value *= ((half + 127) << 23).to(tl.float32, bitcast=True)
    return value * ((exponent - half + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def sigmoid(x):
    e = exp(-tl.abs(x))
    return tl.div_rn(tl.where(x >= 0.0, 1.0, e), e + 1.0)


@triton.jit
def sum_pairwise(x):
    """The sums of the rows of x [ROWS, 2^n]: neighbours first, then their sums, and so on."""
    ROWS: tl.constexpr = x.shape[0]
    WIDTH: tl.constexpr = x.shape[1]
    for i in tl.static_range(1, 32):
        if (WIDTH >> i) > 0:
            # Two summands commute, so the order in which a reduction takes them cannot matter.
            x = tl.sum(tl.reshape(x, (ROWS, WIDTH >> i, 2)), 2)
    return tl.reshape(x, (ROWS,))


@triton.jit
def inverse_rms(squares, count, eps):
    """1 / sqrt(squares / count + eps) of rows [ROWS] whose `count` squares add up to `squares`."""
    mean = tl.div_rn(squares, tl.full(squares.shape, count, tl.float32))
    return tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
