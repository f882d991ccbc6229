"""The sums of NVIDIA's tensor cores in integers, from the text of MMA-Sim (arXiv 2511.10909).

An oracle for csrc/ptx/tensor_core.cpp that shares nothing with it: that code works on doubles.
"""

from __future__ import annotations

import numpy as np
from numpy import ndarray

# name: (exponent bits, mantissa bits) of the codes
LAYOUTS = {"f16": (5, 10), "bf16": (8, 7), "tf32": (8, 10), "e4m3": (4, 3), "e5m2": (5, 2)}
HIDDEN_BITS = {"tf32": 13}  # of a code, below the mantissa
NAN = np.uint32(0x7FFFFFFF).view(np.float32)
NO_EXPONENT = -100_000


def unpack(codes: ndarray, name: str) -> tuple[ndarray, ndarray]:
    """(significand with its sign, exponent): value = significand · 2^(exponent - mantissa bits).

    Subnormal numbers have the least exponent. Zeros, infinities and NaN have no exponent.
    """
    exponent_bits, mantissa_bits = LAYOUTS[name] if name != "f32" else (8, 23)
    x = codes.astype(np.int64) >> HIDDEN_BITS.get(name, 0)
    field = x >> mantissa_bits & (1 << exponent_bits) - 1
    mantissa = x & (1 << mantissa_bits) - 1
    significand = np.where(field > 0, mantissa + (1 << mantissa_bits), mantissa)
    exponent = np.maximum(field, 1) - (2 ** (exponent_bits - 1) - 1)
    is_number = (significand > 0) & ~is_special(codes, name)
    sign = 1 - 2 * (x >> exponent_bits + mantissa_bits & 1)
    return np.where(is_number, sign * significand, 0), np.where(is_number, exponent, NO_EXPONENT)


def is_special(codes: ndarray, name: str) -> ndarray:
    """Whether a code is infinite or NaN."""
    if name == "e4m3":  # has no infinity
        return codes & 0x7F == 0x7F
    exponent_bits, mantissa_bits = LAYOUTS[name] if name != "f32" else (8, 23)
    field = codes.astype(np.int64) >> HIDDEN_BITS.get(name, 0) + mantissa_bits
    return field & (1 << exponent_bits) - 1 == (1 << exponent_bits) - 1


def as_float(codes: ndarray, name: str) -> ndarray:
    """float64 of codes, with infinities and NaN."""
    significand, exponent = unpack(codes, name)
    mantissa_bits = LAYOUTS[name][1]
    value = np.ldexp(significand.astype(np.float64), np.maximum(exponent, -1000) - mantissa_bits)
    infinity = np.where(codes.astype(np.int64) >> 8 * codes.itemsize - 1 & 1, -np.inf, np.inf)
    mantissa = codes.astype(np.int64) >> HIDDEN_BITS.get(name, 0) & (1 << mantissa_bits) - 1
    is_nan = is_special(codes, name) & ((mantissa > 0) | (name == "e4m3"))
    return np.where(is_nan, np.nan, np.where(is_special(codes, name), infinity, value))


def shift(x: ndarray, left: ndarray) -> ndarray:
    """x · 2^left, truncated towards zero."""
    magnitude = np.abs(x)
    up, down = np.clip(left, 0, 40), np.clip(-left, 0, 62)
    return np.sign(x) * (magnitude << up >> down)


def dot_add(
    a: ndarray, b: ndarray, name: str, c: ndarray, fraction: int, result: int, block: int
) -> ndarray:
    """float32 c [M, N] + a [M, K] · b [N, K]ᵀ of codes, `block` products at once.

    `fraction` bits are kept below the largest exponent of a sum's terms, `result` of its result.
    """
    for k in range(0, a.shape[1], block):
        part = slice(k, k + block)
        c = dot_add_block(a[:, None, part], b[None, :, part], name, c, fraction, result)
    return c


def dot_add_block(
    a: ndarray, b: ndarray, name: str, c: ndarray, fraction: int, result: int
) -> ndarray:
    (x, x_exponent), (y, y_exponent) = unpack(a, name), unpack(b, name)
    z, z_exponent = unpack(c.view(np.uint32), "f32")
    products, exponents = x * y, x_exponent + y_exponent  # far below any number's if one is zero
    largest = np.maximum(exponents.max(-1), np.maximum(z_exponent, -126))
    mantissa_bits = 2 * LAYOUTS[name][1]
    below = largest[..., None] - exponents
    terms = shift(products, fraction - mantissa_bits - below)
    total = terms.sum(-1) + shift(z, fraction - 23 - (largest - z_exponent))
    unit = largest - fraction  # exponent of the last bit of `total`
    leading = np.frexp(np.abs(total).astype(np.float64))[1] - 1 + unit
    dropped = np.maximum(np.maximum(leading, -126) - result - unit, 0)
    kept = shift(shift(total, -dropped), dropped)
    with np.errstate(over="ignore", invalid="ignore"):
        finite = np.ldexp(kept.astype(np.float64), unit).astype(np.float32)
        # NaN and infinities by the rules of IEEE.
        exact = (as_float(a, name) * as_float(b, name)).sum(-1) + c.astype(np.float64)
    special = np.where(np.isnan(exact), NAN, np.where(np.isinf(exact), exact, 0)).astype(np.float32)
    return np.where(np.isfinite(exact), finite, special)


def hard_codes(rng: np.random.Generator, rows: int, K: int, name: str, sign: int) -> ndarray:
    """Rows of codes of five kinds, in turn; two matrices of signs 1 and -1 have sums that cancel.

    Any finite code; mostly subnormal numbers and zeros; a few large terms among those; halves of
    which the second repeats the first, with `sign`; infinities and NaN.
    """
    exponent_bits, mantissa_bits = LAYOUTS[name]
    hidden = HIDDEN_BITS.get(name, 0)
    width = exponent_bits + mantissa_bits
    dtype = {8: np.uint8, 16: np.uint16, 19: np.uint32}[1 + width]
    codes = rng.integers(0, 1 << width, (rows, K), dtype=np.int64)
    if exponent_bits == 8:  # products of any two exponents would overflow or vanish
        near = rng.integers(107, 148, (rows, K)) << mantissa_bits
        codes = codes & (1 << mantissa_bits) - 1 | near
    special = (((1 << exponent_bits) - 1) << mantissa_bits) | rng.integers(
        0, 2, (rows, K)
    ) << mantissa_bits - 1
    special = np.where(name == "e4m3", 0x7F, special)
    small = rng.integers(0, 3 << mantissa_bits - 1, (rows, K))
    kind = np.arange(rows)[:, None] % 5
    is_large = rng.random((rows, K)) < 0.1
    codes = np.where(is_special((codes << hidden).astype(dtype), name), 0, codes)
    codes = np.where((kind == 1) | (kind == 2) & ~is_large, small, codes)
    codes = np.where((kind == 4) & (rng.random((rows, K)) < 0.02), special, codes)
    codes |= rng.integers(0, 2, (rows, K)) << width
    half = K // 2
    repeated = codes[:, :half] ^ (1 << width) * (sign < 0)
    codes[:, half:] = np.where(kind == 3, repeated, codes[:, half:])
    last = rng.integers(0, 1 << width, rows) if exponent_bits < 8 else codes[:, 0] >> 1
    codes[:, -1] = np.where((kind[:, 0] == 3) & (rng.random(rows) < 0.5), last, codes[:, -1])
    return (codes << hidden).astype(dtype)


def hard_addends(rng: np.random.Generator, a: ndarray, b: ndarray, name: str) -> ndarray:
    """float32 [M, N]: of any size, zeros, subnormal, what cancels a · bᵀ, infinities and NaN."""
    size = len(a), len(b)
    with np.errstate(over="ignore", invalid="ignore"):
        c = rng.standard_normal(size) * 2.0 ** rng.integers(-30, 30, size)
        kind = rng.random(size)
        c = np.where(kind < 0.2, 0, np.where(kind < 0.25, c * 2.0**-130, c))
        product = np.nan_to_num(as_float(a, name)) @ np.nan_to_num(as_float(b, name)).T
        c = np.where(kind > 0.7, -product * (1 + rng.integers(-1, 2, size) * 2.0**-12), c)
        c = np.where(kind > 0.995, rng.choice([np.inf, -np.inf, np.nan], size), c)
        return c.astype(np.float32)
