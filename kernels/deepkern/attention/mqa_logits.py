"""Logits of the lightning indexer: how every query scores every key.

    out[s, n] = kv_scale[n] · Σ_h weights[s, h] · ReLU(q[s, h] · kv[n])     start <= n < end
    out[s, n] = -inf                                                       elsewhere

Parallelization: one program computes a chunk of keys for a few queries. It keeps the queries with
all their heads in registers or smem and loops over tiles of keys; head_sums.py computes a tile.
Tiles of keys that are visible to none of the queries are filled with -inf and not multiplied. Each
sum is computed by one program.

Limit: a logit takes 2 · H · D operations of the tensor core and 2.5 · H of the other units. For
D = 128 the latter take longer, unless programs that run on the same SM overlap the two; so tiles
are small. Keys come from L2. With four queries of 64 heads, each byte of a key is used in 512
operations.

Source: DeepSeek-V3.2 (arXiv 2512.02556), section 2.1; DeepGEMM's fp8_mqa_logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv
from ..quant.fp8 import as_bits
from ..runtime import arch
from ..runtime.contract import check_that
from ..runtime.op import op
from .head_sums import (
    QueryRows,
    Tile,
    check_queries,
    choose_query_tile,
    fill_with_neg_inf,
    head_sums,
    preload_queries,
    store_logits,
)

CHUNK = 2048  # keys per program


@op(
    q="fp8 [S, H, D]",
    kv="fp8 [Skv, D]",
    kv_scale="fp32 [Skv]",
    weights="fp32 [S, H]",
    starts="int32 [S]",
    ends="int32 [S]",
)
def mqa_logits(
    q: Tensor, kv: Tensor, kv_scale: Tensor, weights: Tensor, starts: Tensor, ends: Tensor
) -> Tensor:
    """Scores of keys for queries with several heads, summed over the heads with weights.

    Args:
        q: float8_e4m3fn [S, H, D], any strides with a contiguous last dimension. Its scales are
            factors of `weights`.
        kv: float8_e4m3fn [Skv, D], one key for all heads.
        kv_scale: fp32 [Skv], the scale of each key.
        weights: fp32 [S, H].
        starts, ends: int32 [S]; the keys n with starts[s] <= n < ends[s] are visible to query s.
            Values are clamped to [0, Skv]. If ends[s] <= starts[s], no key is visible.

    Returns:
        fp32 [S, Skv]: kv_scale[n] * Σ_h weights[s, h] * ReLU(q[s, h] · kv[n]), and -inf for keys
        that are not visible. Accumulated in fp32, except that Hopper's FP8 tensor core keeps about
        14 bits of a sum over 128 of D.

    Raises:
        TypeError, ValueError: an argument is not as above; with DEEPKERN_DEBUG=1 also for starts
            and ends outside [0, Skv].

    Example:
        >>> q = torch.randn(3, 64, 128).to(torch.float8_e4m3fn)
        >>> kv, kv_scale = deepkern.cast_per_token(torch.randn(500, 128))
        >>> starts, ends = torch.zeros(3, dtype=torch.int32), torch.tensor([498, 499, 500]).int()
        >>> deepkern.mqa_logits(q, kv, kv_scale[:, 0], torch.randn(3, 64), starts, ends).shape
        torch.Size([3, 500])
    """
    check_queries("mqa_logits", q)
    Skv = kv.shape[0]
    check_that("mqa_logits", "kv", Skv <= 2**31 - 2 * CHUNK,
               f"at most 2**31 - {2 * CHUNK} keys", Skv)  # fmt: skip
    # Fake kernel: allocates the output; the launcher of a backend computes it.
    return q.new_empty(q.shape[0], Skv, dtype=torch.float32)


@mqa_logits.op.register_tile
def choose_tile(q: Tensor, *_) -> Tile:
    """The tile for these shapes."""
    return choose_query_tile(arch.of(q.device), q.shape[1], q.shape[2], max_queries=128)


@mqa_logits.op.register_launcher("triton")
def _launch_triton(
    q: Tensor, kv: Tensor, kv_scale: Tensor, weights: Tensor, starts: Tensor, ends: Tensor
) -> Tensor:
    out = mqa_logits.op.allocate(q, kv, kv_scale, weights, starts, ends)
    if out.numel() == 0:
        return out
    (S, H, D), Skv = q.shape, kv.shape[0]
    native_fp8 = arch.of(q.device).native_fp8
    tile = choose_tile(q)
    query_tiles = cdiv(S, tile.queries)
    mqa_logits_kernel[(query_tiles * cdiv(Skv, CHUNK),)](
        as_bits(q, native_fp8), as_bits(kv, native_fp8), kv_scale, weights, starts, ends, out,
        S, Skv, H, D if H else 0, query_tiles,
        q.stride(0), q.stride(1), kv.stride(0), weights.stride(0),
        CHUNK=CHUNK, NATIVE_FP8=native_fp8, **tile.options(H, D),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["S", "query_tiles"])
def mqa_logits_kernel(
    q_ptr,  # FP8 or its bytes [S, H, D]
    kv_ptr,  # FP8 or its bytes [Skv, D]
    kv_scale_ptr,  # fp32 [Skv]
    weights_ptr,  # fp32 [S, H]
    starts_ptr,  # int32 [S]
    ends_ptr,  # int32 [S]
    out_ptr,  # fp32 [S, Skv]
    S,
    Skv,
    H,
    D,
    query_tiles,  # ceil(S / QUERIES)
    q_query_stride,  # strides in elements
    q_head_stride,
    kv_row_stride,
    weights_row_stride,
    CHUNK: tl.constexpr,  # keys per program
    NATIVE_FP8: tl.constexpr,
    KEYS: tl.constexpr,  # per step
    QUERIES: tl.constexpr,  # per program
    HEADS: tl.constexpr,  # of a query, per product
    D_BLOCK: tl.constexpr,  # columns of D, per product
    ONE_PRODUCT: tl.constexpr,  # one product computes all H heads and all of D
):
    query = tl.program_id(0) % query_tiles * QUERIES + tl.arange(0, QUERIES)
    query_mask = query < S
    start = tl.minimum(tl.maximum(tl.load(starts_ptr + query, mask=query_mask, other=0), 0), Skv)
    end = tl.minimum(tl.maximum(tl.load(ends_ptr + query, mask=query_mask, other=0), 0), Skv)
    # Keys of this chunk that are visible to any of the queries: [first, last), in whole tiles.
    chunk = tl.program_id(0) // query_tiles * CHUNK
    chunk_end = tl.minimum(chunk + CHUNK, Skv)
    first = tl.min(tl.where(start < end, start, Skv)) // KEYS * KEYS
    first = tl.minimum(tl.maximum(first, chunk), chunk_end)
    last = tl.minimum(tl.max(tl.where(start < end, end, 0)), chunk_end)

    row = query.to(tl.int64)
    queries = QueryRows(
        q_ptr + row * q_query_stride, weights_ptr + row * weights_row_stride, query_mask,
        q_head_stride, H, D,
    )  # fmt: skip
    preloaded = preload_queries(queries, HEADS, D_BLOCK, ONE_PRODUCT, NATIVE_FP8)
    out_ptrs = out_ptr + (row * Skv)[None, :]

    fill_with_neg_inf(out_ptrs, chunk, first, Skv, query_mask, KEYS)
    for n in range(first, last, KEYS):
        key = n + tl.arange(0, KEYS)
        key_mask, key_row = key < Skv, key.to(tl.int64)
        scale = tl.load(kv_scale_ptr + key_row, mask=key_mask, other=0.0)  # overlaps the product
        sums = head_sums(
            kv_ptr + key_row * kv_row_stride, key_mask, queries, preloaded,
            HEADS, D_BLOCK, ONE_PRODUCT, NATIVE_FP8,
        )  # fmt: skip
        attn_mask = (key[:, None] >= start[None, :]) & (key[:, None] < end[None, :])
        store_logits(out_ptrs, key, Skv, query_mask, sums, scale, attn_mask)
    rest = first + tl.cdiv(tl.maximum(last - first, 0), KEYS) * KEYS
    fill_with_neg_inf(out_ptrs, rest, chunk_end, Skv, query_mask, KEYS)


@mqa_logits.op.register_debug_check
def check_contents(
    q: Tensor, kv: Tensor, kv_scale: Tensor, weights: Tensor, starts: Tensor, ends: Tensor
) -> None:
    """For DEEPKERN_DEBUG=1: starts and ends are in [0, Skv]."""
    Skv = kv.shape[0]
    for name, values in (("starts", starts), ("ends", ends)):
        wrong = values[(values < 0) | (values > Skv)]
        check_that("mqa_logits", name, wrong.numel() == 0,
                   f"values in [0, {Skv}]", wrong[:1].tolist())  # fmt: skip
