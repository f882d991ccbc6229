"""Formats of the paged latent cache, and how kernels read and write it.

Used by `mla_decode`, `mla_sparse_decode`, `mla_sparse_prefill`, `mla_cache_append` and
`mla_cache_gather`; `load` and `store` also by the indexer's cache ops.

A cache is [num_pages, page_size, 1, width]. Token `offset` of page `page` has the flat slot
`page * page_size + offset`. A token is R latents and D RoPE values, in one of two formats:

    real dtype    width R + D      latents, RoPE values, all in that dtype
    uint8 (FP8)   width in bytes   R e4m3 latents, ceil(R/128) fp32 scales (one per 128 latents),
                                   D bf16 RoPE values: 656 = 512 + 16 + 128 for R = 512, D = 64

Kernels receive a `CacheView`: latents, scales and RoPE values as three tensors of their own dtypes.
If the three are not aligned to their dtypes (R % 4 or D % 2 is not 0), scales and RoPE values are
passed as bytes, and `load` and `store` assemble the values.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quant.fp8 import BLOCK
from ..runtime.contract import check_that


class CacheView(NamedTuple):
    """A paged latent cache as one kernel argument."""

    latent: Tensor  # [num_pages, page_size, 1, R], or int32 words of 4 e4m3 latents each
    scale: Tensor  # fp32 [num_pages, page_size, 1, ceil(R/128)], or its bytes; unused if not FP8
    rope: Tensor  # [num_pages, page_size, 1, D], or its bytes
    latent_page_stride: int  # elements from page to page
    latent_token_stride: int  # elements from token to token of a page
    scale_page_stride: int
    scale_token_stride: int
    rope_page_stride: int
    rope_token_stride: int


def cache_view(cache: Tensor, R: int, latent_dtype: torch.dtype) -> CacheView:
    """The view of `cache` with R latents per token.

    latent_dtype: how FP8 latents are passed: float8_e4m3fn, uint8, or int32 (words of four).
    """
    latent, scale, rope = _split(cache, R, latent_dtype)
    strides = (t.stride(i) for t in (latent, scale, rope) for i in (0, 1))
    return CacheView(latent, scale, rope, *strides)


def _split(cache: Tensor, R: int, latent_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    if cache.dtype != torch.uint8:
        return cache[..., :R], cache, cache[..., R:]
    R_scale = R + 4 * -(-R // BLOCK)
    latent, scale, rope = cache[..., :R], cache[..., R:R_scale], cache[..., R_scale:]
    if all(n % 4 == 0 for n in (cache.storage_offset(), *cache.stride()[:3], R)):
        return latent.view(latent_dtype), scale.view(torch.float32), rope.view(torch.bfloat16)
    if latent_dtype == torch.int32:  # as bytes; the last word may extend into the scales
        return cache[..., : -(-R // 4) * 4], scale, rope
    return latent.view(latent_dtype), scale, rope


def alignment(tensor: Tensor) -> int:
    """The largest of 1, 2, 4, 8 and 16 that divides a cache tensor's page and token strides.

    Triton itself only detects divisibility by 16, and the RoPE values of a 656-byte token are
    328 elements apart.
    """
    return math.gcd(16, *tensor.stride()[:2])


def width(dtype: torch.dtype, R: int, D: int) -> int:
    """The last dimension of a cache of `dtype`."""
    return R + 4 * -(-R // BLOCK) + 2 * D if dtype == torch.uint8 else R + D


def rope_dtype(cache: Tensor) -> torch.dtype:
    """The dtype of the RoPE values."""
    return torch.bfloat16 if cache.dtype == torch.uint8 else cache.dtype


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of a torch dtype."""
    return getattr(tl, str(dtype).removeprefix("torch."))


def rope_width(op: str, cache: Tensor, R: int) -> int:
    """D, the number of RoPE values next to R latents; ValueError if the width is impossible."""
    fp8 = cache.dtype == torch.uint8
    left = cache.shape[-1] - width(cache.dtype, R, 0)
    check_that(op, "v_head_dim", R >= 0 and left >= 0 and (left % 2 == 0 or not fp8),
               f"latents that fit into the cache's {cache.shape[-1]}", R)  # fmt: skip
    return left // 2 if fp8 else left


def check_width(op: str, cache: Tensor, R: int, D: int) -> None:
    """Raises ValueError unless the last dimension of `cache` holds R latents and D RoPE values."""
    expected = width(cache.dtype, R, D)
    kind = "FP8 format" if cache.dtype == torch.uint8 else "latents and RoPE values"
    check_that(op, "cache", cache.shape[-1] == expected,
               f"last dimension {expected} ({kind} of {R} + {D})",
               f"shape {tuple(cache.shape)}")  # fmt: skip


def check_decode(op: str, q: Tensor, cache: Tensor, v_head_dim: int) -> None:
    """Raises ValueError unless q [..., R + D], the cache and R = v_head_dim fit together."""
    W = q.shape[-1]
    check_that(op, "v_head_dim", 0 <= v_head_dim <= W,
               f"a part of q's last dimension {W}", v_head_dim)  # fmt: skip
    check_width(op, cache, v_head_dim, W - v_head_dim)


def check_page_size(op: str, cache: Tensor) -> None:
    """Raises ValueError unless 32 bits hold every offset within a page."""
    check_that(op, "cache", cache.shape[1] * cache.stride(1) < 2**31,
               "pages of fewer than 2**31 elements", f"shape {tuple(cache.shape)}")  # fmt: skip


def check_lengths(op: str, name: str, lengths: Tensor, limit: int) -> None:
    """For DEEPKERN_DEBUG=1: raises ValueError for a length outside [0, limit]."""
    wrong = lengths[(lengths < 0) | (lengths > limit)]
    check_that(op, name, wrong.numel() == 0,
               f"lengths in [0, {limit}]", wrong[:1].tolist())  # fmt: skip


def check_block_table(op: str, pages: Tensor, num_pages: int) -> None:
    """For DEEPKERN_DEBUG=1: raises ValueError for an entry of block_table not in [0, num_pages)."""
    wrong = pages[(pages < 0) | (pages >= num_pages)]
    check_that(op, "block_table", wrong.numel() == 0,
               f"pages in [0, {num_pages})", wrong[:1].tolist())  # fmt: skip


def unsupported_on_hopper(q: Tensor, cache: Tensor, v_head_dim: int) -> str | None:
    """Why the `cuda` backend (csrc/sm90/mla_decode.cuh) does not support these, or None."""
    if q.dtype != torch.bfloat16 or cache.dtype not in (torch.bfloat16, torch.uint8):
        return (
            f"it supports q in bfloat16 and a bfloat16 or FP8 cache, not {q.dtype}, {cache.dtype}"
        )
    if q.shape[-1:] != (576,) or v_head_dim != 512:
        return f"it supports 512 + 64 values a token, not v_head_dim {v_head_dim} of {q.shape[-1]}"
    strides = [stride * cache.element_size() for stride in cache.stride()[:2]]
    if any(n > 1 and stride % 16 for n, stride in zip(cache.shape, strides, strict=False)):
        return f"it supports tokens at multiples of 16 bytes, not strides {strides} in bytes"
    if cache.data_ptr() % 16:
        return "it supports a cache at a multiple of 16 bytes"
    return None


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
