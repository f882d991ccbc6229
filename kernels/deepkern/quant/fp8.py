"""FP8 e4m3 in Triton kernels, on targets with and without the type.

Kernels read and write FP8 through these functions. `NATIVE_FP8` is a compile-time constant of the
target (`arch.native_fp8`). Where it is false, pointers are to uint8 (`as_bits` makes the view) and
the conversion is integer arithmetic. Both give the same bits: round to nearest even, saturate at
+-448, NaN is 0x7f.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

FP8_MAX = 448.0
AMAX_MIN = 1e-4  # lower bound of a block's largest magnitude; zeros have the scale 1e-4/448
BLOCK = 128  # one scale covers 128 values along K
LAYOUTS = ("row", "column")  # of a scale: contiguous, or with a 16-byte aligned pitch for TMA


def as_bits(x: torch.Tensor, native_fp8: bool) -> torch.Tensor:
    """FP8 `x` as a kernel argument: unchanged, or viewed as uint8 on targets without FP8."""
    return x if native_fp8 else x.view(torch.uint8)


def new_scale(x: torch.Tensor, shape: tuple[int, ...], layout: str) -> torch.Tensor:
    """An uninitialized scale [..., rows, blocks] on the device of `x`, in layout "row" or "column".

    "row" is contiguous. "column" has strides (..., 1, pitch); `pitch` is `rows` rounded up to a
    multiple of 4, so each block column starts at a multiple of 16 bytes. The kernel writes zeros
    into the padding, to which `with_padding` gives access. A scale of rank 1 is contiguous.
    """
    if layout == "row" or len(shape) < 2:
        return x.new_empty(shape, dtype=torch.float32)
    *lead, rows, blocks = shape
    buffer = x.new_empty((*lead, blocks, -(-rows // 4) * 4), dtype=torch.float32)
    return buffer.mT[..., :rows, :]


def with_padding(scale: torch.Tensor, layout: str) -> torch.Tensor:
    """`scale`, from `new_scale` with this layout, with its padding: [..., pitch, blocks]."""
    if layout == "row" or scale.dim() < 2:
        return scale
    *lead, rows, blocks = scale.shape
    return scale.as_strided((*lead, -(-rows // 4) * 4, blocks), scale.stride())


@triton.jit
def block_scale(amax_bits, UE8M0: tl.constexpr):
    """The fp32 scale of a block; amax_bits: its largest |x| as int32 bits. NaN for inf or NaN."""
    amax = tl.maximum(amax_bits.to(tl.float32, bitcast=True), 1e-4)
    scale = tl.div_rn(amax, 448.0)
    if UE8M0:
        bits = scale.to(tl.int32, bitcast=True)
        scale = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(amax_bits >= 0x7F800000, float("nan"), scale)


@triton.jit
def magnitude_bits(x):
    """|x| as int32 bits. Their order is the order of the magnitudes; inf and NaN are largest."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


# The functions below use if-else, not an early return: Triton would also compile the code after it.
@triton.jit
def to_fp8(x, NATIVE_FP8: tl.constexpr):
    """float32 -> e4m3, or its bits as uint8."""
    if NATIVE_FP8:
        return x.to(tl.float8e4nv)
    else:
        bits = x.to(tl.int32, bitcast=True)
        sign = (bits >> 24) & 0x80
        magnitude = bits & 0x7FFFFFFF
        clamped = tl.minimum(magnitude, 0x43E00000)  # 448.0
        # Normal numbers: keep 3 mantissa bits, ties to even, and change the bias from 127 to 7.
        normal = ((clamped + 0x7FFFF + ((clamped >> 20) & 1)) >> 20) - (120 << 3)
        # Below 2^-6 the code counts units of 2^-9: adding 1.5 * 2^23 rounds to whole units.
        units = clamped.to(tl.float32, bitcast=True) * 512.0 + 12582912.0
        subnormal = units.to(tl.int32, bitcast=True) & 0xFF
        code = tl.where(clamped < 0x3C800000, subnormal, normal)
        return tl.where(magnitude > 0x7F800000, 0x7F, code | sign).to(tl.uint8)


@triton.jit
def from_fp8(q, NATIVE_FP8: tl.constexpr):
    """e4m3, or its bits as uint8, -> float32, exactly."""
    if NATIVE_FP8:
        return q.to(tl.float32)
    else:
        return widen(q).to(tl.float32)


@triton.jit
def matrix_operand(q, NATIVE_FP8: tl.constexpr):
    """e4m3 as the operand of a matrix instruction: unchanged, or widened to float16, exactly."""
    if NATIVE_FP8:
        return q
    else:
        return widen(q)


@triton.jit
def widen(code):
    """The bits of e4m3 as uint8 -> float16, exactly, in 16-bit operations, which GPUs pair."""
    code = code.to(tl.int8, bitcast=True).to(tl.int16)  # sign extension fills the upper byte
    # The sign and the lower 7 bits, moved to where float16 has them, are the value times 2^-8.
    x = ((code << 7) & -0x4080).to(tl.float16, bitcast=True) * 256.0
    # NaN (0x7f) would become 480. Only 480 overflows here to -inf, and -inf * 0 is NaN.
    zero = tl.zeros(x.shape, tl.float16)
    overflow = tl.fma(tl.abs(x), zero - 128.0, zero - 4096.0)
    return tl.fma(overflow, zero, x)  # overflow * 0 is -0 for all other values and adds nothing
