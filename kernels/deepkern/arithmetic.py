"""Arithmetic that all families use: integers in launchers, floating point in Triton kernels.

The floating-point functions give the same bits on every machine. exp is written as IEEE additions
and multiplications, each rounded to nearest even, because libraries and GPUs differ in its last
place. Divisions and roots are correctly rounded. The order of a sum does not depend on the tile,
the number of warps or the other rows. A kernel that calls these functions must be launched with
`enable_fp_fusion=False` (a * b + c is not fused into one rounding). `deepkern/reference/exact.py`
has the same polynomials in PyTorch, and the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


def cdiv(n: int, by: int) -> int:
    """n / by, rounded up.

    triton.cdiv computes the same in 1.5 µs per call, because it also works in kernels. A launch
    takes about 15 µs in all.
    """
    return -(-n // by)


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is >= n; 1 for n <= 0. Faster than Triton's, see `cdiv`."""
    return 1 << max(n - 1, 0).bit_length()


@triton.jit
def exp(x):
    """e^x for x <= 0: x = n ln 2 + r with |r| <= ln 2 / 2; polynomial of Cephes in r, times 2^n."""
    # e^-104 rounds to 0; NaN is kept.
    x = tl.maximum(x, -104.0, propagate_nan=tl.PropagateNan.ALL)
    # Adding 1.5 * 2^23 rounds to an integer and puts that integer into the low bits.
    shifted = x * 1.44269502 + 12582912.0
    n = shifted - 12582912.0
    r = (x - n * 0.693359375) - n * -2.12194442e-4  # ln 2 as high + low: n * high is exact
    p = r * 1.98756912e-4 + 1.39819994e-3
    p = p * r + 8.33345205e-3
    p = p * r + 4.16657962e-2
    p = p * r + 0.166666657
    p = p * r + 0.5
    value = (p * (r * r) + r) + 1.0
    # Multiply by 2^(n + 30), then by 2^-30, so that only the second step rounds a subnormal result.
    # n is in the low bits of `shifted`; the shift leaves no others.
    power = (shifted.to(tl.int32, bitcast=True) << 23) + ((127 + 30) << 23)
    return value * power.to(tl.float32, bitcast=True) * 2.0**-30


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x) for any float32 x."""
    e = exp(-tl.abs(x))
    return tl.div_rn(tl.where(x >= 0.0, 1.0, e), e + 1.0)


@triton.jit
def sum_pairwise(x):
    """Row sums of x [ROWS, 2^n]: adds neighbours, then neighbouring sums, and so on."""
    ROWS: tl.constexpr = x.shape[0]
    WIDTH: tl.constexpr = x.shape[1]
    for i in tl.static_range(1, 32):
        if (WIDTH >> i) > 0:
            # A sum of two does not depend on the order of the operands.
            x = tl.sum(tl.reshape(x, (ROWS, WIDTH >> i, 2)), 2)
    return tl.reshape(x, (ROWS,))


@triton.jit
def inverse_rms(squares, count, eps):
    """1 / sqrt(squares / count + eps); squares: fp32 [ROWS], each a sum of `count` squares."""
    mean = tl.div_rn(squares, tl.full(squares.shape, count, tl.float32))
    return tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
