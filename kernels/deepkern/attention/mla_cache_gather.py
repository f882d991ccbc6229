"""Tokens from the pages of the latent cache into rows of one dense tensor, as prefill reads them.

    out[cu_seqlens[b] + i] = out_dtype(token starts[b] + i of sequence b)

Cut: a program takes TOKENS rows. For each it counts the sequences that begin at or before it, which
gives its sequence, and follows the block table. Each value is read once and written once: the speed
is that of memory. How many tokens a sequence has stays on the device; only the number of rows is
the host's, and what lies past the last sequence is zero, so that it may be an upper bound.
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
from .cache import alignment, load, parts, rope_width, strides

REAL = (torch.bfloat16, torch.float16, torch.float32)
TOKENS = 8


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
    """Copies tokens of paged sequences side by side, in a real dtype.

    Args:
        cache: as `mla_cache_append` writes it: [blocks, page, 1, R + D] bf16, fp16 or fp32, or
            the FP8 format uint8 [blocks, page, 1, R + 4 * ceil(R / 128) + 2 * D].
        block_table: int32 [B, P], the pages of each sequence, in order.
        cu_seqlens: int32 [B + 1], ascending: sequence b gets the rows from cu_seqlens[b] up to
            cu_seqlens[b + 1].
        total_tokens: the number of rows; cu_seqlens[B], or more.
        v_head_dim: R, the latents of a token.
        starts: int32 [B], the token of each sequence that comes first; 0 if not given.
        out_dtype: bfloat16, float16 or float32.

    Returns:
        [total_tokens, R + D], contiguous. Of the FP8 format the fp32 product of value and scale,
        rounded once. Zero in rows of no sequence, and where a token lies before its sequence,
        past its P * page tokens, or on a page that is not in [0, blocks).

    Raises:
        TypeError, ValueError: an argument is not as above; with DEEPKERN_DEBUG=1 also for offsets
            that descend or pass total_tokens, for tokens outside [0, P * page), and for page
            numbers out of range.
    """
    check_that("mla_cache_gather", "total_tokens", total_tokens >= 0, "at least 0", total_tokens)
    check_choice("mla_cache_gather", "out_dtype", out_dtype, REAL)
    D = rope_width("mla_cache_gather", cache, v_head_dim)
    check_that("mla_cache_gather", "block_table", block_table.shape[1] * cache.shape[1] < 2**31,
               "fewer than 2**31 tokens a sequence",
               f"{block_table.shape[1]} pages of {cache.shape[1]}")  # fmt: skip
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
    blocks, page = cache.shape[:2]
    native_fp8 = arch.of(cache.device).native_fp8
    cached = parts(cache, R, FP8 if native_fp8 else torch.uint8)
    mla_cache_gather_kernel[(cdiv(total_tokens, TOKENS),)](
        *cached, block_table, cu_seqlens, starts, out,
        total_tokens, R, D, len(block_table), block_table.shape[1] * page, blocks, page,
        block_table.stride(0), *strides(*cached),
        FP8_CACHE=cache.dtype == torch.uint8, NATIVE_FP8=native_fp8,
        ROPE_ALIGN=alignment(cached[2]), TOKENS=TOKENS,
        WIDE=min(max(next_power_of_2(R), 128), 512),
        D_TILE=max(next_power_of_2(D), 2), num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def sequence_of(row, offset_ptr, B):
    """The last sequence that begins at or before each row: -1 for none, B past the last one."""
    SEQUENCES: tl.constexpr = 128
    begun = tl.zeros(row.shape, tl.int32)
    for first in range(0, B + 1, SEQUENCES):
        i = first + tl.arange(0, SEQUENCES)
        offset = tl.load(offset_ptr + i, mask=i <= B, other=0)
        before = (offset[None, :] <= row[:, None]) & (i <= B)[None, :]
        begun += tl.sum(before.to(tl.int32), 1)
    return begun - 1


@triton.jit
def mla_cache_gather_kernel(
    latent_ptr, scale_ptr, rope_ptr, table_ptr, offset_ptr, start_ptr, out_ptr,
    rows, R, D, B, capacity, blocks, page, table_stride,
    latent_block, latent_slot, scale_block, scale_slot, rope_block, rope_slot,
    FP8_CACHE: tl.constexpr, NATIVE_FP8: tl.constexpr, ROPE_ALIGN: tl.constexpr,
    TOKENS: tl.constexpr, WIDE: tl.constexpr, D_TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    sequence = sequence_of(row, offset_ptr, B)
    kept = (row < rows) & (sequence >= 0) & (sequence < B)
    # Offsets that do not ascend may begin a sequence after the row, or end it before.
    begin = tl.load(offset_ptr + sequence, mask=kept, other=0).to(tl.int64)
    end = tl.load(offset_ptr + sequence + 1, mask=kept, other=0)
    kept &= (row >= begin) & (row < end)
    position = row - begin
    if start_ptr is not None:
        position += tl.load(start_ptr + sequence, mask=kept, other=0)
    kept &= (position >= 0) & (position < capacity)
    position = tl.where(kept, position, 0).to(tl.int32)  # 64-bit divisions are slow
    page_ptr = table_ptr + sequence.to(tl.int64) * table_stride + position // page
    block = tl.load(page_ptr, mask=kept, other=-1)
    kept &= (block >= 0) & (block < blocks)  # [TOKENS]
    block, offset = block.to(tl.int64), (position % page).to(tl.int64)

    latent_row = latent_ptr + (block * latent_block + offset * latent_slot)[:, None]
    scale_row = scale_ptr + (block * scale_block + offset * scale_slot)[:, None]
    out_row = out_ptr + row[:, None] * (R + D)
    for start in range(0, R, WIDE):
        column = (start + tl.arange(0, WIDE))[None, :]
        inside = kept[:, None] & (column < R)
        latent = tl.load(latent_row + column, mask=inside, other=0.0)  # [TOKENS, WIDE]
        if FP8_CACHE:
            index = (start // 128 + tl.arange(0, WIDE // 128))[None, :]
            known = kept[:, None] & (index < tl.cdiv(R, 128))
            scale = load(scale_row, index, known, tl.float32)  # [TOKENS, WIDE / 128]
            blocked = tl.reshape(from_fp8(latent, NATIVE_FP8), (TOKENS, WIDE // 128, 128))
            latent = tl.reshape(blocked * scale[:, :, None], (TOKENS, WIDE))
        latent = latent.to(tl.float32).to(out_ptr.dtype.element_ty)
        tl.store(out_row + column, latent, mask=(row < rows)[:, None] & (column < R))

    column = tl.arange(0, D_TILE)[None, :]
    rope_at = tl.multiple_of(block * rope_block + offset * rope_slot, ROPE_ALIGN)
    inside = kept[:, None] & (column < D)
    ROPE: tl.constexpr = tl.bfloat16 if FP8_CACHE else rope_ptr.dtype.element_ty
    rope = load(rope_ptr + rope_at[:, None], column, inside, ROPE).to(tl.float32)
    rope = rope.to(out_ptr.dtype.element_ty)
    tl.store(out_row + R + column, rope, mask=(row < rows)[:, None] & (column < D))


@mla_cache_gather.op.register_debug_check
def check_contents(
    cache, block_table, cu_seqlens, total_tokens, v_head_dim, starts, out_dtype
) -> None:
    blocks, page = cache.shape[:2]
    P = block_table.shape[1]
    lengths = cu_seqlens.diff()
    fits = cu_seqlens.amin() >= 0 and lengths.ge(0).all() and cu_seqlens.amax() <= total_tokens
    check_that("mla_cache_gather", "cu_seqlens", bool(fits),
               f"offsets ascending in [0, {total_tokens}]", cu_seqlens.tolist())  # fmt: skip
    first = torch.zeros_like(lengths) if starts is None else starts
    wrong = (lengths > 0) & ((first < 0) | (first.long() + lengths > P * page))
    name = "cu_seqlens" if starts is None else "starts"
    check_that("mla_cache_gather", name, not wrong.any(),
               f"tokens in [0, {P * page})", f"sequences {wrong.nonzero()[:8, 0].tolist()} "
               "past it")  # fmt: skip
    token = torch.arange(P, device=cache.device) * page  # the first of each page
    past = (first.long() + lengths)[:, None]
    used = (token + page > first[:, None]) & (token < past) & (lengths > 0)[:, None]
    wrong = block_table[used]
    wrong = wrong[(wrong < 0) | (wrong >= blocks)]
    check_that("mla_cache_gather", "block_table", wrong.numel() == 0,
               f"pages in [0, {blocks})", wrong[:1].tolist())  # fmt: skip
