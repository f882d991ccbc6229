"""Attention of queries over cached tokens that they select by index.

Used by `mla_sparse_decode` and `mla_sparse_prefill`. Prefill is decode with one query per sequence
and pages of one token, so both launch this kernel:

    score[h, n] = softmax_scale * q[h] . token[indices[n]]          over R + D
    out[h]      = softmax over n of score . token[indices[n], :R], times the sink factor

Parallelization: the H heads of a query read the same tokens and are the rows of a tile. A query's
indices are divided into splits. One program computes one tile of rows over one split and reads each
token once, as key and as value. Splits are combined as in `mla_decode`; their boundaries depend on
the query's own length and on H only.

With 64 rows, a program does 64 * 2 * 1088 operations per token of 1152 or 656 bytes: about the
ratio at which a Hopper GPU becomes limited by its matrix units. With fewer rows, reading the tokens
limits the speed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv, next_power_of_2
from ..runtime.contract import check_that
from . import paged_launch
from .cache import check_lengths
from .fp8_tokens import LEAST_UNIT
from .paged_launch import Tile
from .splits import LN_2, length_of, sink_factor, split_length_of
from .token_tiles import (
    load_queries,
    online_softmax_step,
    store_lse,
    store_out,
    token_pointers,
    zero_tiles,
)

MAX_SPLITS = 8  # of a query in mla_sparse_decode


def choose_tile(q: Tensor, cache: Tensor, v_head_dim: int, max_splits: int) -> Tile:
    """The tile for these widths and H heads; independent of the number of queries."""
    H = q.shape[-2]
    # A split's partial result costs the memory traffic of 4 to 7 tokens per head.
    min_split = min(max(8 * next_power_of_2(max(H, 1)), 256), 1024)
    return paged_launch.choose_tile(
        q, cache, v_head_dim, H, "sparse", max_splits=max_splits, min_split=min_split
    )


def launch_sparse_attention(
    q: Tensor,
    cache: Tensor,
    indices: Tensor,
    softmax_scale: float,
    topk_length: Tensor | None,
    attn_sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
    max_logits: Tensor | None,
    tile: Tile,
) -> None:
    """Writes out [B, Sq, H, R], and lse and max_logits [B, H, Sq].

    q is [B, Sq, H, R + D], indices [B, Sq, topk], topk_length [B]. max_logits requires a tile with
    max_splits 1.
    """
    B, Sq, H, _ = q.shape
    num_pages, page_size = cache.shape[:2]
    indices_view = IndicesView(indices, *indices.stride()[:2])
    paged_launch.launch_paged_attention(
        mla_sparse_attention_kernel, B * Sq * cdiv(H, tile.rows), tile, q, cache, softmax_scale,
        topk_length, indices.shape[-1], attn_sink, out, lse,
        indices=indices_view, sink_ptr=attn_sink, max_ptr=max_logits,
        num_slots=num_pages * page_size,
    )  # fmt: skip


class IndicesView(NamedTuple):
    """The indices as one kernel argument."""

    ptr: Tensor  # int32 [B, Sq, topk], slots; last dimension contiguous
    sequence_stride: int  # elements from sequence to sequence
    query_stride: int


@triton.jit(do_not_specialize=["topk"])
def mla_sparse_attention_kernel(
    q,  # QueryView of [B, Sq, H, R + D]
    cache,  # CacheView
    length_ptr,  # int32 [B], indices that count, or None: topk
    out_ptr,  # [B, Sq, H, R]
    lse_ptr,  # fp32 [B, H, Sq], natural log
    partial_ptr,  # fp32 [B, num_splits, Sq * H, R], or None with one split
    partial_lse_ptr,  # fp32 [B, num_splits, Sq * H], to the base 2, or None
    score_scale,  # softmax_scale * log2(e)
    Sq,
    H,
    R,
    D,
    topk,
    page_size,  # tokens
    indices,  # IndicesView of [B, Sq, topk]
    sink_ptr,  # fp32 [H], or None
    max_ptr,  # fp32 [B, H, Sq], largest score, or None
    num_slots,  # tokens that fit into the cache; other indices select no token
    FP8: tl.constexpr,  # whether the cache has the FP8 format
    HALF: tl.constexpr,  # FP8 and bf16 q: products with latents are float16, see fp8_tokens.py
    ASM: tl.constexpr,  # whether inline assembly of NVIDIA GPUs is available
    BRANCH: tl.constexpr,  # see softmax_weights
    DOT_DTYPE: tl.constexpr,  # operands of the matrix products
    ROPE_DTYPE: tl.constexpr,  # RoPE values of the cache
    PRECISION: tl.constexpr,  # input_precision of the matrix products
    LATENT_ALIGN: tl.constexpr,  # elements, see cache.alignment
    ROPE_ALIGN: tl.constexpr,
    ROWS: tl.constexpr,  # heads of a program
    R_BLOCK: tl.constexpr,  # latents per matrix product
    NUM_R_BLOCKS: tl.constexpr,  # ceil(R / R_BLOCK)
    EVEN_R: tl.constexpr,  # whether R_BLOCK divides R
    D_TILE: tl.constexpr,  # D rounded up to a power of two
    KEYS: tl.constexpr,  # tokens per step
    MIN_SPLIT: tl.constexpr,  # indices, see split_length_of
    MAX_SPLITS: tl.constexpr,
):
    """One tile of heads of one query over one split of its indices."""
    # The tiles of a query have neighbouring program ids, so L2 serves all but the first read.
    tiles = tl.cdiv(H, ROWS)
    query_id = tl.program_id(0) // tiles
    sequence, query = (query_id // Sq).to(tl.int64), (query_id % Sq).to(tl.int64)
    head = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    length = length_of(length_ptr, sequence, topk)
    split_length = split_length_of(length, KEYS, MIN_SPLIT, MAX_SPLITS)
    begin = split * split_length
    if (begin >= length) & (split > 0):
        return
    end = tl.minimum(begin + split_length, length)

    row_mask = head < H
    q_row = q.ptr + sequence * q.sequence_stride + query * q.query_stride
    queries = load_queries(
        q_row + (head.to(tl.int64) * q.head_stride)[:, None], R, D, row_mask,
        HALF, DOT_DTYPE, R_BLOCK, NUM_R_BLOCKS, EVEN_R, D_TILE,
    )  # fmt: skip
    acc = zero_tiles(NUM_R_BLOCKS, (ROWS, R_BLOCK))
    unit = tl.full((), LEAST_UNIT if HALF else 1.0, tl.float32)
    row_max = tl.full((ROWS,), float("-inf"), tl.float32)
    row_sum = tl.zeros((ROWS,), tl.float32)
    indices_row = indices.ptr + sequence * indices.sequence_stride + query * indices.query_stride
    n = begin + tl.arange(0, KEYS)
    next_slot = tl.load(indices_row + n, mask=n < end, other=-1)
    for start in range(begin, end, KEYS):
        slot = next_slot
        key_mask = (slot >= 0) & (slot < num_slots)  # [KEYS]
        token = token_pointers(cache, slot // page_size, slot % page_size, LATENT_ALIGN, ROPE_ALIGN)
        acc, unit, row_max, row_sum = online_softmax_step(
            acc, unit, row_max, row_sum, queries, token, key_mask, key_mask[None, :],
            start < end, score_scale, R, D, FP8, HALF, ASM, BRANCH, DOT_DTYPE, ROPE_DTYPE,
            PRECISION, R_BLOCK, EVEN_R, D_TILE,
        )  # fmt: skip
        # Prefetch the next indices: the token addresses depend on them.
        n = start + KEYS + tl.arange(0, KEYS)
        next_slot = tl.load(indices_row + n, mask=n < end, other=-1)

    only_split = split_length >= length
    out_row = (sequence * Sq + query) * H + head
    partial_row = (sequence * tl.num_programs(1) + split) * Sq * H + query * H + head
    lse_index = (sequence * H + head) * Sq + query
    lse = store_lse(
        lse_ptr, partial_lse_ptr, lse_index, partial_row, row_mask, only_split, row_max, row_sum
    )
    if max_ptr is not None:
        if only_split:
            tl.store(max_ptr + lse_index, row_max * LN_2, mask=row_mask)
    store_out(
        out_ptr, partial_ptr, out_row, partial_row, row_mask, only_split,
        acc, unit, row_sum, sink_factor(sink_ptr, head, row_mask, lse), R, HALF, R_BLOCK, EVEN_R,
    )  # fmt: skip


def check_indices(op: str, indices: Tensor, topk_length: Tensor | None, num_slots: int) -> None:
    """For DEEPKERN_DEBUG=1: lengths in [0, topk], and the indices within them in
    [-1, num_slots)."""
    topk = indices.shape[-1]
    if topk_length is not None:
        check_lengths(op, "topk_length", topk_length, topk)
        past_length = torch.arange(topk, device=indices.device) >= topk_length[:, None, None]
        indices = indices.masked_fill(past_length, -1)
    wrong = indices[(indices < -1) | (indices >= num_slots)]
    check_that(op, "indices", wrong.numel() == 0,
               f"values in [-1, {num_slots})", wrong[:1].tolist())  # fmt: skip
