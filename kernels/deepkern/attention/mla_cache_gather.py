"""Copies tokens from the pages of the latent cache into the rows of one dense tensor, for prefill.

    out[cu_seqlens[b] + i] = out_dtype(token starts[b] + i of sequence b)

Parallelization: one program takes TOKENS rows. For each row it counts the sequences that start at
or before it, which gives the row's sequence, and looks up the page in the block table. Each value
is read once and written once; the speed is limited by memory bandwidth. The lengths of the
sequences stay on the device. The host gives the number of rows, which may be an upper bound: rows
past the last sequence are zeroed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv, next_power_of_2
from ..quant.fp8 import from_fp8
from ..runtime import arch
from ..runtime.contract import FP8, check_choice, check_that
from ..runtime.op import op
from .cache import (
    alignment,
    cache_view,
    check_block_table,
    load,
    rope_dtype,
    rope_width,
    triton_dtype,
)

REAL = (torch.bfloat16, torch.float16, torch.float32)
TOKENS = 8  # rows of a program


@op(
    cache="real|uint8 [blocks, page, 1, _]",
    block_table="int32 [B, P]",
    cu_seqlens="int32 [B+1]",
    starts="int32 [B]",
)
def mla_cache_gather(
    cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    total_tokens: int,
    v_head_dim: int = 512,
    starts: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Copies tokens of paged sequences into consecutive rows, in a real dtype.

        kv = deepkern.mla_cache_gather(cache, block_table, cu_seqlens, total_tokens)

    Args:
        cache: as `mla_cache_append` writes it: [blocks, page, 1, R + D] bf16, fp16 or fp32, or
            the FP8 format uint8 [blocks, page, 1, R + 4 * ceil(R / 128) + 2 * D].
        block_table: int32 [B, P], the pages of each sequence, in order.
        cu_seqlens: int32 [B + 1], ascending: sequence b fills the rows from cu_seqlens[b] up to
            cu_seqlens[b + 1].
        total_tokens: the number of rows; at least cu_seqlens[B].
        v_head_dim: R, the latents of a token.
        starts: int32 [B], the first token of each sequence to copy. None: 0.
        out_dtype: bfloat16, float16 or float32.

    Returns:
        [total_tokens, R + D], contiguous. For the FP8 format the fp32 product of value and scale,
        rounded once. Zero in rows without a sequence, and where a token is before the start of its
        sequence, past its P * page tokens, or on a page that is not in [0, blocks).

    Raises:
        TypeError, ValueError: an argument does not match the above; with DEEPKERN_DEBUG=1 also for
            offsets that descend or exceed total_tokens, for tokens outside [0, P * page), and for
            page numbers out of range.
    """
    check_that("mla_cache_gather", "total_tokens", total_tokens >= 0, "at least 0", total_tokens)
    check_choice("mla_cache_gather", "out_dtype", out_dtype, REAL)
    D = rope_width("mla_cache_gather", cache, v_head_dim)
    check_that("mla_cache_gather", "block_table", block_table.shape[1] * cache.shape[1] < 2**31,
               "fewer than 2**31 tokens a sequence",
               f"{block_table.shape[1]} pages of {cache.shape[1]}")  # fmt: skip
    # Fake kernel: allocates the output; the launcher of a backend computes it.
    return cache.new_empty((total_tokens, v_head_dim + D), dtype=out_dtype)


@mla_cache_gather.op.register_launcher("triton")
def _launch_triton(
    cache, block_table, cu_seqlens, total_tokens, v_head_dim, starts, out_dtype
) -> Tensor:
    args = cache, block_table, cu_seqlens, total_tokens, v_head_dim, starts, out_dtype
    out = mla_cache_gather.op.allocate(*args)
    if out.numel() == 0:
        return out
    R, D = v_head_dim, out.shape[1] - v_head_dim
    num_pages, page_size = cache.shape[:2]
    native_fp8 = arch.of(cache.device).native_fp8
    view = cache_view(cache, R, FP8 if native_fp8 else torch.uint8)
    mla_cache_gather_kernel[(cdiv(total_tokens, TOKENS),)](
        view, block_table, cu_seqlens, starts, out,
        total_tokens, R, D, len(block_table), block_table.shape[1] * page_size,
        num_pages, page_size, block_table.stride(0),
        FP8_CACHE=cache.dtype == torch.uint8, NATIVE_FP8=native_fp8,
        ROPE_DTYPE=triton_dtype(rope_dtype(cache)), ROPE_ALIGN=alignment(view.rope),
        TOKENS=TOKENS, R_BLOCK=min(max(next_power_of_2(R), 128), 512),
        D_TILE=max(next_power_of_2(D), 2), num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def sequence_of(row, offset_ptr, B):
    """The last sequence that starts at or before each row: -1 before the first, B past the last.

    offset_ptr: int32 [B + 1], the first row of each sequence.
    """
    SEQUENCES: tl.constexpr = 128
    started = tl.zeros(row.shape, tl.int32)
    for first in range(0, B + 1, SEQUENCES):
        i = first + tl.arange(0, SEQUENCES)
        offset = tl.load(offset_ptr + i, mask=i <= B, other=0)
        before = (offset[None, :] <= row[:, None]) & (i <= B)[None, :]
        started += tl.sum(before.to(tl.int32), 1)
    return started - 1


@triton.jit
def mla_cache_gather_kernel(
    cache,  # CacheView
    block_table_ptr,  # int32 [B, P], page numbers
    offset_ptr,  # int32 [B + 1], cu_seqlens
    start_ptr,  # int32 [B], or None: 0
    out_ptr,  # [rows, R + D] contiguous
    rows,
    R,
    D,
    B,
    max_length,  # tokens: pages of a sequence times page_size
    num_pages,
    page_size,  # tokens
    block_table_stride,  # elements from sequence to sequence
    FP8_CACHE: tl.constexpr,  # whether the cache has the FP8 format
    NATIVE_FP8: tl.constexpr,  # whether the target has e4m3
    ROPE_DTYPE: tl.constexpr,  # RoPE values of the cache
    ROPE_ALIGN: tl.constexpr,  # elements, see cache.alignment
    TOKENS: tl.constexpr,  # rows of a program
    R_BLOCK: tl.constexpr,  # latents per step
    D_TILE: tl.constexpr,  # D rounded up to a power of two, at least 2
):
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    sequence = sequence_of(row, offset_ptr, B)
    valid = (row < rows) & (sequence >= 0) & (sequence < B)
    # With offsets that do not ascend, the sequence found may start after the row or end before it.
    begin = tl.load(offset_ptr + sequence, mask=valid, other=0).to(tl.int64)
    end = tl.load(offset_ptr + sequence + 1, mask=valid, other=0)
    valid &= (row >= begin) & (row < end)
    position = row - begin
    if start_ptr is not None:
        position += tl.load(start_ptr + sequence, mask=valid, other=0)
    valid &= (position >= 0) & (position < max_length)
    position = tl.where(valid, position, 0).to(tl.int32)  # 64-bit divisions are slow
    block_table_row = block_table_ptr + sequence.to(tl.int64) * block_table_stride
    page = tl.load(block_table_row + position // page_size, mask=valid, other=-1)
    valid &= (page >= 0) & (page < num_pages)  # [TOKENS]
    page, offset = page.to(tl.int64), (position % page_size).to(tl.int64)

    latent_at = page * cache.latent_page_stride + offset * cache.latent_token_stride
    scale_at = page * cache.scale_page_stride + offset * cache.scale_token_stride
    latent_row, scale_row = cache.latent + latent_at[:, None], cache.scale + scale_at[:, None]
    out_row = out_ptr + row[:, None] * (R + D)
    out_mask = (row < rows)[:, None]
    for start in range(0, R, R_BLOCK):
        column = (start + tl.arange(0, R_BLOCK))[None, :]
        mask = valid[:, None] & (column < R)
        latent = tl.load(latent_row + column, mask=mask, other=0.0)  # [TOKENS, R_BLOCK]
        if FP8_CACHE:
            index = (start // 128 + tl.arange(0, R_BLOCK // 128))[None, :]
            scale_mask = valid[:, None] & (index < tl.cdiv(R, 128))
            scale = load(scale_row, index, scale_mask, tl.float32)  # [TOKENS, R_BLOCK / 128]
            blocked = tl.reshape(from_fp8(latent, NATIVE_FP8), (TOKENS, R_BLOCK // 128, 128))
            latent = tl.reshape(blocked * scale[:, :, None], (TOKENS, R_BLOCK))
        latent = latent.to(tl.float32).to(out_ptr.dtype.element_ty)
        tl.store(out_row + column, latent, mask=out_mask & (column < R))

    column = tl.arange(0, D_TILE)[None, :]
    rope_at = page * cache.rope_page_stride + offset * cache.rope_token_stride
    rope_at = tl.multiple_of(rope_at, ROPE_ALIGN)
    mask = valid[:, None] & (column < D)
    rope = load(cache.rope + rope_at[:, None], column, mask, ROPE_DTYPE).to(tl.float32)
    rope = rope.to(out_ptr.dtype.element_ty)
    tl.store(out_row + R + column, rope, mask=out_mask & (column < D))


@mla_cache_gather.op.register_debug_check
def check_contents(
    cache, block_table, cu_seqlens, total_tokens, v_head_dim, starts, out_dtype
) -> None:
    num_pages, page_size = cache.shape[:2]
    P = block_table.shape[1]
    lengths = cu_seqlens.diff()
    fits = cu_seqlens.amin() >= 0 and lengths.ge(0).all() and cu_seqlens.amax() <= total_tokens
    check_that("mla_cache_gather", "cu_seqlens", bool(fits),
               f"offsets ascending in [0, {total_tokens}]", cu_seqlens.tolist())  # fmt: skip
    first = torch.zeros_like(lengths) if starts is None else starts
    wrong = (lengths > 0) & ((first < 0) | (first.long() + lengths > P * page_size))
    name = "cu_seqlens" if starts is None else "starts"
    check_that("mla_cache_gather", name, not wrong.any(),
               f"tokens in [0, {P * page_size})",
               f"sequences {wrong.nonzero()[:8, 0].tolist()} past it")  # fmt: skip
    token = torch.arange(P, device=cache.device) * page_size  # the first of each page
    end = (first.long() + lengths)[:, None]
    overlaps = (token + page_size > first[:, None]) & (token < end) & (lengths > 0)[:, None]
    check_block_table("mla_cache_gather", block_table[overlaps], num_pages)
