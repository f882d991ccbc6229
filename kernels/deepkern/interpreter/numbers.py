"""The arithmetic of sm_90 in numpy: number formats, casts, bf16, fma, min/max, and dots.

numpy has no bf16 and no FP8: Triton's interpreter keeps them as bit patterns in uint16 and uint8
arrays, and so do these functions. Formats have Triton's names: bf16, fp16, fp32, fp64, and
fp8e4nv (e4m3fn), fp8e5 (e5m2), fp8e4b8, fp8e5b16 (the AMD ones without inf or -0), fp8e4b15.

Every narrowing cast rounds once, to nearest even, or toward zero with "rtz". A NaN becomes the one
that an NVIDIA GPU writes (0x7f, 0x7fff); payloads of float32 and float64 NaNs are not modelled.
"""

import functools

import numpy as np

_FP8 = {  # exponent bits, mantissa bits, exponent bias
    "fp8e4nv": (4, 3, 7),
    "fp8e5": (5, 2, 15),
    "fp8e4b8": (4, 3, 8),
    "fp8e5b16": (5, 2, 16),
    "fp8e4b15": (4, 3, 15),
}
FLOATS = {"bf16", "fp16", "fp32", "fp64", *_FP8}
FP8 = frozenset(_FP8)
_NUMPY = {"fp16": np.float16, "fp32": np.float32, "fp64": np.float64}


@functools.cache
def _values(fmt):
    """float64 value of each of the 256 codes of an FP8 format."""
    _, mantissa_bits, bias = _FP8[fmt]
    code = np.arange(256)
    exponent, mantissa = (code & 0x7F) >> mantissa_bits, code & (1 << mantissa_bits) - 1
    significand = np.where(exponent == 0, mantissa, mantissa + (1 << mantissa_bits))
    value = np.ldexp(significand.astype(np.float64), np.maximum(exponent, 1) - bias - mantissa_bits)
    value = np.where(code & 0x80, -value, value)
    if fmt == "fp8e4nv":
        value[[0x7F, 0xFF]] = np.nan
    elif fmt == "fp8e5":
        value[[0x7C, 0xFC]] = np.inf, -np.inf
        value[(code & 0x7F) > 0x7C] = np.nan
    elif fmt in ("fp8e4b8", "fp8e5b16"):
        value[0x80] = np.nan
    return value


@functools.cache
def _decode_table(fmt, wide):
    """Value of each FP8 code in a wider format, as a table for `take`."""
    table = _values(fmt)
    if wide == "bf16":
        bits = encode(table, "bf16")
        if fmt == "fp8e5":
            # Triton's sm_90 code shifts the bits into place and multiplies by 2^112, so the
            # exponent that means inf or NaN becomes an ordinary one (65536 and up).
            for code in (0x7C, 0x7D, 0x7E, 0x7F):
                bits[[code, code | 0x80]] = encode(65536.0 * (1 + code % 4 / 4) * _SIGNS, "bf16")
        return bits
    return encode(table, wide)


_SIGNS = np.array([1.0, -1.0])


@functools.cache
def _encode_table(fmt):
    """FP8 code of each bf16 pattern; float32 input has its low half folded into one sticky bit."""
    value = decode(np.arange(65536, dtype=np.uint16), "bf16").astype(np.float64)
    positive = _values(fmt)[:128]
    positive = positive[np.isfinite(positive)]
    middles = (positive[:-1] + positive[1:]) / 2
    ties_down = np.searchsorted(middles, np.abs(value), "left")
    ties_up = np.searchsorted(middles, np.abs(value), "right")
    code = np.where(ties_down % 2 == 0, ties_down, ties_up)  # an even code has an even mantissa
    negative = np.signbit(value)
    if fmt in ("fp8e4b8", "fp8e5b16"):
        negative &= code != 0
    code |= np.where(negative, 0x80, 0)
    code[np.isnan(value)] = 0x80 if fmt in ("fp8e4b8", "fp8e5b16") else 0x7F
    return code.astype(np.uint8)


def decode(data, fmt):
    """Bit patterns -> float32, exactly; fp32 and fp64 are returned unchanged."""
    if fmt == "bf16":
        return (data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if fmt in FP8:
        return _decode_table(fmt, "fp32").take(data)
    return data.astype(np.float32) if fmt == "fp16" else data


def encode(x, fmt, rtz=False):
    """float32 or float64 -> the array that represents `fmt` in the interpreter."""
    if rtz:
        return _truncate(x, fmt)
    if fmt in _NUMPY:
        out = x.astype(_NUMPY[fmt])
        if fmt == "fp16":
            out[np.isnan(out)] = np.uint16(0x7FFF).view(np.float16)
        return out
    if x.dtype == np.float64:
        x = _odd(x, np.float32)
    bits = x.view(np.uint32)
    if fmt == "bf16":
        even = (bits >> np.uint32(16)) & np.uint32(1)
        out = ((bits + np.uint32(0x7FFF) + even) >> np.uint32(16)).astype(np.uint16)
        out[np.isnan(x)] = 0x7FFF
        return out
    # Round to odd at bf16's 8 significant bits first. FP8 has at most 4, so the second rounding
    # gives the same result as a single one.
    sticky = (bits & np.uint32(0xFFFF)) != 0
    return _encode_table(fmt).take((bits >> np.uint32(16)) | sticky)


def cast(data, source, target, rtz=False):
    """Cast between float formats."""
    if source == target:
        return data
    if source in FP8 and target not in FP8:
        return _decode_table(source, target).take(data)
    wide = decode(data, source)
    if target in ("fp32", "fp64") and not rtz:
        return wide.astype(_NUMPY[target])
    return encode(wide, target, rtz)


def _odd(x, dtype):
    """float64 -> narrower, rounded to odd: a later rounding then equals rounding once."""
    y = x.astype(dtype)
    back = y.astype(np.float64)
    y = np.where(np.abs(back) > np.abs(x), np.nextafter(y, dtype(0)), y)
    inexact = (back != x) & ~np.isnan(x)
    return (y.view(np.uint32) | inexact).view(dtype)


def _truncate(x, fmt):
    """Round toward zero, as cvt.rz does; e5m2 is the upper half of a truncated fp16."""
    if fmt == "bf16":
        x = _toward_zero(x, np.float32)
        return np.where(np.isnan(x), 0x7FFF, x.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    if fmt in ("fp16", "fp32"):
        return _toward_zero(x, _NUMPY[fmt])
    if fmt == "fp8e5":
        return (_toward_zero(x, np.float16).view(np.uint16) >> np.uint16(8)).astype(np.uint8)
    raise TypeError(f"sm_90 has no cast to {fmt} with fp_downcast_rounding='rtz'")


def _toward_zero(x, dtype):
    y = x.astype(dtype)
    y = np.where(np.abs(y.astype(x.dtype)) > np.abs(x), np.nextafter(y, dtype(0)), y)
    return y if dtype != np.float16 else encode(y.astype(np.float32), "fp16")


def from_integer(data, fmt):
    """Integer or bool -> float, rounded once."""
    if fmt in _NUMPY:
        return data.astype(_NUMPY[fmt])
    if data.dtype.itemsize == 8:  # float64 holds 53 bits: fold the lowest 12 into one
        low = data & data.dtype.type(0xFFF)
        data = np.where(np.abs(data) >> 53 == 0, data, data - low + (low != 0) * 0x800)
    return encode(data.astype(np.float64), fmt)


def to_integer(x, dtype):
    """Float -> integer as cvt.rzi: toward zero, clamped to the range, NaN -> 0 (or the lowest)."""
    dtype = np.dtype(dtype)
    # The GPU has no conversion to 8 bits: it converts to 16 and keeps the low byte.
    info = np.iinfo(np.dtype(f"{dtype.kind}2") if dtype.itemsize == 1 else dtype)
    x64 = np.trunc(x.astype(np.float64))
    high = x64 >= float(info.max)
    out = np.where(high | (x64 < info.min) | np.isnan(x64), 0, x64).astype(info.dtype)
    out[high], out[x64 <= info.min] = info.max, info.min
    if dtype.itemsize == 8 or x.dtype == np.float64:
        out[np.isnan(x64)] = info.min if info.min else 1 << info.bits - 1
    return out.astype(dtype)


def maximum_number(a, b):
    """max.f32: returns the number if the other is NaN, and +0 for +0 and -0."""
    out = np.fmax(a, b)
    if out.dtype.kind == "f":
        zeros = (a == 0) & (b == 0)
        if zeros.any():
            out = np.where(zeros & ~(np.signbit(a) & np.signbit(b)), out.dtype.type(0), out)
    return out


def minimum_number(a, b):
    """min.f32: returns the number if the other is NaN, and -0 for +0 and -0."""
    return -maximum_number(-a, -b) if np.asarray(a).dtype.kind == "f" else np.fmin(a, b)


def maximum_nan(a, b):
    """max.NaN.f32: returns NaN if either is NaN."""
    return np.where(np.isnan(a) | np.isnan(b), np.full((), np.nan, a.dtype), maximum_number(a, b))


def minimum_nan(a, b):
    return -maximum_nan(-a, -b)


def fma(x, y, z):
    """x * y + z rounded once, for float32 and narrower: float64 holds the product exactly."""
    product, z64 = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)
    rounded = product + z64
    # Knuth's two-sum gives the rounding error of the sum. With that error the sum is rounded to
    # odd, and the later rounding to the narrow type gives the same as from the exact sum.
    z_rounded = rounded - product
    error = (product - (rounded - z_rounded)) + (z64 - z_rounded)
    even = rounded.view(np.int64) & 1 == 0
    away = np.where(error > 0, np.inf, -np.inf)
    make_odd = even & (error != 0) & np.isfinite(rounded)
    return np.where(make_odd, np.nextafter(rounded, away), rounded)


def tf32(x, nearest=False):
    """float32 -> tf32. The tensor core ignores the low 13 bits; cvt.rna rounds half away."""
    bits = x.view(np.uint32)
    if nearest:
        bits = np.where(np.isfinite(x), bits + np.uint32(0x1000), bits)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def matmul(a, b, a_format, b_format, dtype, precision="ieee"):
    """Sum of products in float64, rounded once to `dtype`; a and b [..., M, K] and [..., K, N].

    float64 makes the sum exact for FP8 and int8, and for bf16 and fp16 unless magnitudes within
    one dot differ by more than about 2^30, so the result does not depend on the tile shape. The
    tensor core's own accumulation (about 14 bits for FP8 on Hopper) is not modelled.
    """
    if a.dtype.kind in "iu" and a_format not in FLOATS:
        exact = np.matmul(a.astype(np.float64), b.astype(np.float64))
        return exact.astype(np.int64).astype(dtype)
    a, b = decode(a, a_format), decode(b, b_format)
    if a_format == "fp32" and precision == "tf32":
        a, b = tf32(a), tf32(b)
    if a_format == "fp32" and precision == "tf32x3":
        high_a, high_b = tf32(a, True), tf32(b, True)
        low_a, low_b = tf32(a - high_a, True), tf32(b - high_b, True)
        pairs = (low_a, high_b), (high_a, low_b), (high_a, high_b)
        *small, large = (np.matmul(p.astype(np.float64), q.astype(np.float64)) for p, q in pairs)
        # As Triton does: the low part of inf is NaN, and the large product is inf already.
        return (np.nan_to_num(sum(small), nan=0.0, posinf=np.inf, neginf=-np.inf) + large).astype(
            dtype
        )
    return np.matmul(a.astype(np.float64), b.astype(np.float64)).astype(dtype)
