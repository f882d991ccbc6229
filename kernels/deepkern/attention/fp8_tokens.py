"""Tokens in the FP8 format of the cache as operands of matrix products, converted once.

Used by token_tiles.py. With R in blocks j of 128 latents, a token's latents are
e4m3[n, i] * scale[n, j]. The products take the e4m3 values as float16, exactly, and the scales
multiply what is summed over latents or over tokens:

    score[m, n] = sum over j of scale[n, j] * (q[m, j] . e4m3[n, j])
    acc[m, j]   = sum over n of float16(weight[m, n]) * float16(scale[n, j] / unit) * e4m3[n, j]

`unit` is a power of two, at most the largest scale of a program's tokens so far and more than half
of it, but from 2^-40 to 2^120. A scale 2^28 times smaller loses bits. The unit changes as larger
scales are loaded; acc is rescaled then, as for a new row_max. Rows of q are float16 too, each over
a power of two of its own (`half_queries`).

float16 and not bfloat16: GPUs convert two e4m3 to float16 in one instruction, and weights keep 11
bits instead of 8.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cache import load

WEIGHT_RANGE = tl.constexpr(16384.0)  # multiplies float16 weights: 2^-38 is not 0
LEAST_UNIT = tl.constexpr(2.0**-40)  # the scales that this package writes are at least 2^-23
LARGEST_UNIT = tl.constexpr(2.0**120)  # the scales of finite latents are less than 2^120


@triton.jit
def power_of_two(x):
    """The largest power of two that is at most fp32 x >= 0, within the limits of units."""
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.minimum(tl.maximum(power, LEAST_UNIT), LARGEST_UNIT)


@triton.jit
def inverse(unit):
    """1 / unit of a power of two, exactly and without a division."""
    return (0x7F000000 - unit.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def half_queries(latent):
    """Tiles [ROWS, R_BLOCK] fp32 as float16, each row over its unit; and the units [ROWS, 1].

    The largest value of a row is at least 1, unless all are below 2^-40, so float16 rounds values
    by at most 2^-25 of it.
    """
    row_max = tl.max(tl.abs(latent[0]), 1)
    for j in tl.static_range(1, len(latent)):
        row_max = tl.maximum(row_max, tl.max(tl.abs(latent[j]), 1))
    unit = power_of_two(row_max)[:, None]
    half = ()
    for j in tl.static_range(len(latent)):
        half = half + ((latent[j] * inverse(unit)).to(tl.float16),)
    return half, unit


@triton.jit
def load_scales(
    scale_row,  # [KEYS] pointers to fp32, or to bytes
    latent_row,  # of load_e4m3
    key_mask,
    R,
    R_BLOCK: tl.constexpr,
    NUM_R_BLOCKS: tl.constexpr,
):
    """The scales fp32 [KEYS] of each block of R_BLOCK values of load_e4m3; 0 where masked."""
    FACTOR: tl.constexpr = 1.0 if latent_row.dtype.element_ty == tl.float8e4nv else 256.0
    scale = ()
    if NUM_R_BLOCKS * R_BLOCK == 512:
        # One 16-byte load per token.
        index = tl.arange(0, 4)[None, :]
        every = load(scale_row[:, None], index, key_mask[:, None] & (index * 128 < R), tl.float32)
        even, odd = tl.split(tl.reshape(every, (scale_row.shape[0], 2, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        blocks = (first, second, third, fourth)
        for j in tl.static_range(NUM_R_BLOCKS):
            scale = scale + (blocks[j * R_BLOCK // 128] * FACTOR,)
    else:
        for j in tl.static_range(NUM_R_BLOCKS):
            scale = scale + (load(scale_row, j * R_BLOCK // 128, key_mask, tl.float32) * FACTOR,)
    return scale


@triton.jit
def unit_of(scale, unit):
    """The unit for these scales, at least `unit`."""
    largest = tl.abs(scale[0])
    for j in tl.static_range(1, len(scale)):
        largest = tl.maximum(largest, tl.abs(scale[j]))
    return tl.maximum(power_of_two(tl.max(largest, 0)), unit)


@triton.jit
def load_e4m3(
    row_ptr,  # [KEYS, 1] pointers to e4m3, to int32 words of four, or to bytes
    j,
    R,
    mask,
    DTYPE: tl.constexpr,  # float16 or float32
    ASM: tl.constexpr,
    R_BLOCK: tl.constexpr,
    EVEN_R: tl.constexpr,
):
    """Block j of each token's R e4m3 values [KEYS, R_BLOCK]; from words, times 2^-8."""
    if row_ptr.dtype.element_ty == tl.float8e4nv:
        column = j * R_BLOCK + tl.arange(0, R_BLOCK)[None, :]
        values = tl.load(row_ptr + column, mask=mask & ((column < R) | EVEN_R), other=0.0)
        values = values.to(tl.float16)
    else:
        word = j * (R_BLOCK // 4) + tl.arange(0, R_BLOCK // 4)[None, :]
        values = e4m3_over_256(load(row_ptr, word, mask & ((word * 4 < R) | EVEN_R), tl.int32))
        if not EVEN_R:  # the last word may hold R % 4 values only
            column = j * R_BLOCK + tl.arange(0, R_BLOCK)[None, :]
            values = tl.where(mask & (column < R), values, 0.0)
    if ASM and tl.float16 == DTYPE:
        values = computed_once(values)
    return values.to(DTYPE)


@triton.jit
def computed_once(x):
    """float16 x, behind assembly that does nothing and that the compiler does not duplicate.

    The compiler gives each operand of a matrix product its own copy of the arithmetic, from the
    load on: it would convert for Q K^T and again for P V.
    """
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], tl.float16, is_pure=False, pack=2
    )


@triton.jit
def e4m3_over_256(words):
    """int32 [N, W], four e4m3 per word -> float16 [N, 4 * W], the values times 2^-8, exactly.

    The sign and the other 7 bits, moved to their places in a float16, are the value times 2^-8; two
    float16 fit into a word.
    """
    # 0x7f is NaN and the only code for which adding 1 carries into the eighth bit. The carry sets
    # that bit, which turns the float16 into a NaN.
    carried = (words & 0x7F7F7F7F) + 0x01010101
    magnitude = (words & 0x7F7F7F7F) | (carried & -0x7F7F7F80)
    even = ((words << 8) & -0x7FFF8000) | ((magnitude << 7) & 0x7F807F80)  # values 0 and 2
    odd = (words & -0x7FFF8000) | ((magnitude >> 1) & 0x7F807F80)  # values 1 and 3
    low = tl.join(lower_half(even), lower_half(even >> 16))
    high = tl.join(lower_half(odd), lower_half(odd >> 16))
    return tl.reshape(tl.join(low, high), (words.shape[0], 4 * words.shape[1]))


@triton.jit
def lower_half(word):
    """The float16 in the lower half of an int32."""
    return word.to(tl.int16).to(tl.float16, bitcast=True)
