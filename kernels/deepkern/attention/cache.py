"""The latent cache: its formats, and how a kernel gets at one.

A cache is [blocks, page, 1, width]: `blocks` pages of `page` tokens, of which the flat slot
`block * page + offset` names one. A token is R latents and D RoPE values, in one of two formats:

    real dtype    width R + D      latents, RoPE values, all in that dtype
    uint8 (FP8)   width in bytes   R e4m3 latents, ceil(R/128) fp32 scales (one per 128 latents),
                                   D bf16 RoPE values: 656 = 512 + 16 + 128 for R = 512, D = 64

A kernel gets the three parts as three tensors of their own dtypes (`parts`), each with its
strides, so that both formats look alike to it. In widths where the parts are not aligned to their
dtypes (R % 4, D % 2), scales and RoPE values are handed over as bytes, and `load` and `store` put
them together.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quant.fp8 import BLOCK
from ..runtime.contract import check_that


def width(dtype: torch.dtype, R: int, D: int) -> int:
    """The last dimension of a cache of `dtype`."""
    return R + 4 * -(-R // BLOCK) + 2 * D if dtype == torch.uint8 else R + D


def check_width(op: str, cache: Tensor, R: int, D: int) -> None:
    """Raises ValueError unless the last dimension of `cache` holds R latents and D RoPE values."""
    expected = width(cache.dtype, R, D)
    kind = "FP8 format" if cache.dtype == torch.uint8 else "latents and RoPE values"
    check_that(op, "cache", cache.shape[-1] == expected,
               f"last dimension {expected} ({kind} of {R} + {D})",
               f"shape {tuple(cache.shape)}")  # fmt: skip


def rope_width(op: str, cache: Tensor, R: int) -> int:
    """D, the RoPE values beside R latents; ValueError unless a cache can be as wide as this one."""
    fp8 = cache.dtype == torch.uint8
    left = cache.shape[-1] - width(cache.dtype, R, 0)
    check_that(op, "v_head_dim", R >= 0 and left >= 0 and (left % 2 == 0 or not fp8),
               f"latents that fit into the cache's {cache.shape[-1]}", R)  # fmt: skip
    return left // 2 if fp8 else left


def parts(cache: Tensor, R: int, latent_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Views of the latents, scales and RoPE values; the scales of a real cache are a stand-in.

    latent_dtype is what the latents of the FP8 format are taken as: FP8, uint8, or int32, four of
    them to a word.
    """
    if cache.dtype != torch.uint8:
        return cache[..., :R], cache, cache[..., R:]
    R_scale = R + 4 * -(-R // BLOCK)
    latent, scale, rope = cache[..., :R], cache[..., R:R_scale], cache[..., R_scale:]
    if all(n % 4 == 0 for n in (cache.storage_offset(), *cache.stride()[:3], R)):
        return latent.view(latent_dtype), scale.view(torch.float32), rope.view(torch.bfloat16)
    if latent_dtype == torch.int32:  # in bytes; the last word may reach into the scales
        return cache[..., : -(-R // 4) * 4], scale, rope
    return latent.view(latent_dtype), scale, rope


def strides(*tensors: Tensor) -> list[int]:
    """What the kernels take of each part: elements from block to block, from token to token."""
    return [t.stride(i) for t in tensors for i in (0, 1)]


def alignment(part: Tensor) -> int:
    """How many elements (1, 2, 4 or 8) every token of `part` is a multiple of away from its start.

    Triton sees by itself only what is divisible by 16, and 328, the bf16 elements from token to
    token of a 656-byte cache, is not.
    """
    return math.gcd(8, *part.stride()[:2])


@triton.jit
def load(row_ptr, index, mask, DTYPE: tl.constexpr):
    """Values of DTYPE at `index` from `row_ptr`, which may point to bytes; 0 where masked."""
    if row_ptr.dtype.element_ty == DTYPE:
        value = tl.load(row_ptr + index, mask=mask, other=0.0)
    else:
        SIZE: tl.constexpr = DTYPE.primitive_bitwidth // 8
        bits = tl.load(row_ptr + index * SIZE, mask=mask, other=0).to(tl.int32)
        for i in tl.static_range(1, SIZE):
            byte = tl.load(row_ptr + index * SIZE + i, mask=mask, other=0).to(tl.int32)
            bits |= byte << (8 * i)
        if SIZE == 2:
            bits = bits.to(tl.int16)
        value = bits.to(DTYPE, bitcast=True)
    return value


@triton.jit
def store(row_ptr, index, value, mask):
    """Writes `value` at `index` from `row_ptr`, which may point to bytes."""
    if row_ptr.dtype.element_ty == value.dtype:
        tl.store(row_ptr + index, value, mask=mask)
    else:
        SIZE: tl.constexpr = value.dtype.primitive_bitwidth // 8
        if SIZE == 2:
            bits = value.to(tl.int16, bitcast=True).to(tl.int32)
        else:
            bits = value.to(tl.int32, bitcast=True)
        for i in tl.static_range(SIZE):
            byte = (bits >> (8 * i)) & 0xFF
            tl.store(row_ptr + index * SIZE + i, byte.to(tl.uint8), mask=mask)


@triton.jit
def e4m3_over_256(words, DTYPE: tl.constexpr):
    """int32 [N, W], four e4m3 to a word -> DTYPE [N, 4 * W], the values times 2^-8, exactly.

    By integer arithmetic even where e4m3 is a type: a conversion would be moved behind the way
    through shared memory, and matrix operands of 8 bits cannot be transposed on that way. Sign and
    the other 7 bits, at their places in a float16, are the value times 2^-8; two fit into a word.
    """
    # 0x7f is NaN, and the only code that a one carries into the eighth bit; there, it makes a
    # float16's NaN of it.
    carried = (words & 0x7F7F7F7F) + 0x01010101
    magnitude = (words & 0x7F7F7F7F) | (carried & -0x7F7F7F80)
    even = ((words << 8) & -0x7FFF8000) | ((magnitude << 7) & 0x7F807F80)  # values 0 and 2
    odd = (words & -0x7FFF8000) | ((magnitude >> 1) & 0x7F807F80)  # values 1 and 3
    low = tl.join(lower_half(even).to(DTYPE), lower_half(even >> 16).to(DTYPE))
    high = tl.join(lower_half(odd).to(DTYPE), lower_half(odd >> 16).to(DTYPE))
    return tl.reshape(tl.join(low, high), (words.shape[0], 4 * words.shape[1]))


@triton.jit
def lower_half(word):
    """The float16 in the lower half of an int32, as float32."""
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
