"""Attention of a few new queries per sequence over the paged latent cache, weights absorbed.

A cached token is one key for all heads, and its first R values are its value too:

    score[s, h, n] = softmax_scale * q[s, h] . cache[n]          over R + D
    out[s, h]      = softmax over the visible n of score . cache[n, :R]

Parallelization: the Sq * H queries of a sequence read the same tokens and are the rows of a tile. A
sequence's tokens are divided into splits. One program computes one tile of rows over one split and
reads each token once, for both matrix products. A second kernel combines the splits in order
(splits.py). The split boundaries depend on the sequence's own length only, which each program reads
on the device. So results are bitwise independent of the batch and of the width of the block table,
and the host never waits for a length.

With up to about a hundred rows, reading the cache limits the speed; with more rows, the matrix
units do.

Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1; splitting as in Flash-Decoding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv, next_power_of_2
from ..runtime.contract import check_that
from ..runtime.op import op
from . import paged_launch
from .cache import (
    check_block_table,
    check_decode,
    check_lengths,
    check_page_size,
    unsupported_on_hopper,
)
from .fp8_tokens import LEAST_UNIT
from .paged_launch import Tile
from .splits import length_of, split_length_of
from .token_tiles import (
    load_queries,
    online_softmax_step,
    store_lse,
    store_out,
    token_pointers,
    zero_tiles,
)


@op(
    q="real [B, Sq, H, W]",
    cache="real|uint8 [blocks, page, 1, _]",
    block_table="int32 [B, P]",
    cache_seqlens="int32 [B]",
)
def mla_decode(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    softmax_scale: float,
    causal: bool = True,
    v_head_dim: int = 512,
) -> tuple[Tensor, Tensor]:
    """Attends Sq new queries of each sequence to its tokens in the paged latent cache.

        out, lse = deepkern.mla_decode(q, cache, block_table, cache_seqlens, 576**-0.5)

    Args:
        q: bf16, fp16 or fp32 [B, Sq, H, R + D]; the key's up-projection is absorbed into the first
            R values. Any H and Sq; any strides, except that the last dimension is contiguous.
        cache: as `mla_cache_append` writes it: [blocks, page, 1, R + D] bf16, fp16 or fp32, or
            the FP8 format uint8 [blocks, page, 1, R + 4 * ceil(R / 128) + 2 * D].
        block_table: int32 [B, P], the pages of each sequence, in order. The tokens of a page
            that is not in [0, blocks) are masked. P * page is at most 2**30.
        cache_seqlens: int32 [B], tokens of each sequence, the Sq new ones included; clamped to
            [0, P * page].
        softmax_scale: multiplies the scores.
        causal: query s attends to the first `cache_seqlens - (Sq - 1 - s)` tokens; otherwise to
            all.
        v_head_dim: R, the number of leading values of a token that are its value.

    Returns:
        out: [B, Sq, H, R] in q's dtype; 0 for a query without tokens.
        lse: fp32 [B, H, Sq], natural log of the sum of exponentials; -inf for such a query.

    Sums are fp32. The matrix products use q's dtype if the cache has the same dtype, or if q is
    bf16 and the cache FP8; otherwise fp32, which is slower and exact.

    Raises:
        TypeError, ValueError: an argument does not match the above; with DEEPKERN_DEBUG=1 also for
            lengths and page numbers out of range.
    """
    B, Sq, H, _ = q.shape
    check_decode("mla_decode", q, cache, v_head_dim)
    # 2**30 and not 2**31: begin + split_length, which may exceed the length, is a 32-bit sum.
    check_that("mla_decode", "block_table", block_table.shape[1] * cache.shape[1] <= 2**30,
               "at most 2**30 tokens a sequence",
               f"{block_table.shape[1]} pages of {cache.shape[1]}")  # fmt: skip
    check_page_size("mla_decode", cache)
    # Fake kernel: allocates the outputs; the launcher of a backend computes them.
    out = q.new_empty(B, Sq, H, v_head_dim)
    return out, q.new_empty(B, H, Sq, dtype=torch.float32)


@mla_decode.op.register_tile
def choose_tile(q, cache, block_table, cache_seqlens, softmax_scale, causal, v_head_dim) -> Tile:
    """The tile for these shapes; independent of B and of the width of the block table."""
    num_rows = q.shape[1] * q.shape[2]
    tile = paged_launch.choose_tile(q, cache, v_head_dim, num_rows, "dense")
    row_tiles = next_power_of_2(cdiv(max(num_rows, 1), tile.rows))
    # One row tile is bandwidth-bound: 64 splits keep the memory busy even for one long sequence.
    # More row tiles get about one program per SM, in total over the splits.
    max_splits = 64 if row_tiles == 1 else max(128 // row_tiles, 8)
    # A split's partial result costs the memory traffic of 3.6 tokens per row.
    return tile._replace(max_splits=max_splits, min_split=512 if num_rows <= 32 else 1024)


@mla_decode.op.register_launcher("triton")
def _launch_triton(q, cache, block_table, cache_seqlens, softmax_scale, causal, v_head_dim):
    args = q, cache, block_table, cache_seqlens, softmax_scale, causal, v_head_dim
    out, lse = mla_decode.op.allocate(*args)
    B, Sq, H, _ = q.shape
    num_pages, page_size = cache.shape[:2]
    tile = choose_tile(*args)
    paged_launch.launch_paged_attention(
        mla_decode_kernel, B * cdiv(Sq * H, tile.rows), tile, q, cache, softmax_scale,
        cache_seqlens, block_table.shape[1] * page_size, None, out, lse,
        block_table_ptr=block_table, block_table_stride=block_table.stride(0),
        num_pages=num_pages, CAUSAL=causal,
    )  # fmt: skip
    return out, lse


@triton.jit
def mla_decode_kernel(
    q,  # QueryView of [B, Sq, H, R + D]
    cache,  # CacheView
    length_ptr,  # int32 [B], tokens of each sequence
    out_ptr,  # [B, Sq, H, R]
    lse_ptr,  # fp32 [B, H, Sq], natural log
    partial_ptr,  # fp32 [B, num_splits, Sq * H, R], or None with one split
    partial_lse_ptr,  # fp32 [B, num_splits, Sq * H], to the base 2, or None
    score_scale,  # softmax_scale * log2(e)
    Sq,
    H,
    R,
    D,
    max_length,  # tokens: pages of a sequence times page_size
    page_size,  # tokens
    block_table_ptr,  # int32 [B, P], page numbers
    block_table_stride,  # elements from sequence to sequence
    num_pages,  # pages of the cache; other page numbers are absent tokens
    CAUSAL: tl.constexpr,
    FP8: tl.constexpr,  # whether the cache has the FP8 format
    HALF: tl.constexpr,  # FP8 and bf16 q: products with latents are float16, see fp8_tokens.py
    ASM: tl.constexpr,  # whether inline assembly of NVIDIA GPUs is available
    BRANCH: tl.constexpr,  # see softmax_weights
    DOT_DTYPE: tl.constexpr,  # operands of the matrix products
    ROPE_DTYPE: tl.constexpr,  # RoPE values of the cache
    PRECISION: tl.constexpr,  # input_precision of the matrix products
    LATENT_ALIGN: tl.constexpr,  # elements, see cache.alignment
    ROPE_ALIGN: tl.constexpr,
    ROWS: tl.constexpr,  # (query, head) rows of a program
    R_BLOCK: tl.constexpr,  # latents per matrix product
    NUM_R_BLOCKS: tl.constexpr,  # ceil(R / R_BLOCK)
    EVEN_R: tl.constexpr,  # whether R_BLOCK divides R
    D_TILE: tl.constexpr,  # D rounded up to a power of two
    KEYS: tl.constexpr,  # tokens per step
    MIN_SPLIT: tl.constexpr,  # tokens, see split_length_of
    MAX_SPLITS: tl.constexpr,
):
    """One tile of rows over one split of a sequence's tokens."""
    tiles = tl.cdiv(Sq * H, ROWS)
    sequence = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    length = length_of(length_ptr, sequence, max_length)
    split_length = split_length_of(length, KEYS, MIN_SPLIT, MAX_SPLITS)
    begin = split * split_length
    if (begin >= length) & (split > 0):
        return
    end = tl.minimum(begin + split_length, length)

    row_mask = row < Sq * H
    query, head = (row // H).to(tl.int64), (row % H).to(tl.int64)
    q_offset = query * q.query_stride + head * q.head_stride
    q_row = q.ptr + sequence * q.sequence_stride + q_offset[:, None]
    queries = load_queries(
        q_row, R, D, row_mask, HALF, DOT_DTYPE, R_BLOCK, NUM_R_BLOCKS, EVEN_R, D_TILE
    )
    acc = zero_tiles(NUM_R_BLOCKS, (ROWS, R_BLOCK))
    unit = tl.full((), LEAST_UNIT if HALF else 1.0, tl.float32)
    limit = length - (Sq - 1 - row // H) if CAUSAL else tl.zeros_like(row) + length  # [ROWS]
    row_max = tl.full((ROWS,), float("-inf"), tl.float32)
    row_sum = tl.zeros((ROWS,), tl.float32)
    block_table_row = block_table_ptr + sequence * block_table_stride
    for start in range(begin, end, KEYS):
        key = start + tl.arange(0, KEYS)
        page = tl.load(block_table_row + key // page_size, mask=key < end, other=-1)
        key_mask = (page >= 0) & (page < num_pages)  # [KEYS]
        token = token_pointers(cache, page, key % page_size, LATENT_ALIGN, ROPE_ALIGN)
        attn_mask = key_mask[None, :] & (key[None, :] < limit[:, None])
        acc, unit, row_max, row_sum = online_softmax_step(
            acc, unit, row_max, row_sum, queries, token, key_mask, attn_mask,
            start < end, score_scale, R, D, FP8, HALF, ASM, BRANCH, DOT_DTYPE, ROPE_DTYPE,
            PRECISION, R_BLOCK, EVEN_R, D_TILE,
        )  # fmt: skip

    out_row = sequence * Sq * H + row
    partial_row = (sequence * tl.num_programs(1) + split) * Sq * H + row
    lse_index = (sequence * H + head) * Sq + query
    only_split = split_length >= length
    store_lse(
        lse_ptr, partial_lse_ptr, lse_index, partial_row, row_mask, only_split, row_max, row_sum
    )
    store_out(
        out_ptr, partial_ptr, out_row, partial_row, row_mask, only_split,
        acc, unit, row_sum, None, R, HALF, R_BLOCK, EVEN_R,
    )  # fmt: skip


@mla_decode.op.register_debug_check
def check_contents(q, cache, block_table, cache_seqlens, *_) -> None:
    num_pages, page_size = cache.shape[:2]
    P = block_table.shape[1]
    check_lengths("mla_decode", "cache_seqlens", cache_seqlens, P * page_size)
    first_token = torch.arange(P, device=q.device) * page_size
    pages = block_table[first_token < cache_seqlens[:, None]]
    check_block_table("mla_decode", pages, num_pages)


@mla_decode.op.register_limits("cuda")
def _unsupported_on_hopper(q, cache, block_table, cache_seqlens, softmax_scale, causal, v_head_dim):
    return unsupported_on_hopper(q, cache, v_head_dim)
