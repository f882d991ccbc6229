"""`mqa_logits` for the new queries of each sequence over the indexer's paged cache.

    out[b, j, n] = scale[n] · Σ_h weights[b, j, h] · ReLU(q[b, j, h] · key[n])   n < limit[b, j]
    out[b, j, n] = -inf                                                         elsewhere

Parallelization: one program computes a chunk of a sequence's tokens for its new queries, with all
their heads. It loops over tiles of tokens, through the block table; head_sums.py computes a tile.
Tokens past the longest limit are not read. Lengths are read on the device.

Limit: memory bandwidth. The 132 bytes of a token (D = 128) are used in 2 · next_n · H · D
operations, few for one query of 64 heads. Many small programs share an SM, each with several tiles
in flight.

Source: DeepSeek-V3.2 (arXiv 2512.02556), section 2.1; DeepGEMM's fp8_paged_mqa_logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv, next_power_of_2
from ..quant.fp8 import as_bits
from ..runtime import arch
from ..runtime.contract import FP8, check_that
from ..runtime.op import op
from .cache import load
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
from .indexer_cache import check_pages, page_views

CHUNK = 512  # tokens per program


@op(
    q="fp8 [B, next_n, H, D]",
    cache="uint8 [blocks, page, 1, _]",
    weights="fp32 [_, H]",
    context_lens="int32 [...]",
    block_table="int32 [B, P]",
)
def paged_mqa_logits(
    q: Tensor,
    cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    max_context_len: int,
) -> Tensor:
    """Scores of each sequence's cached tokens for its new queries, summed over weighted heads.

    Args:
        q: float8_e4m3fn [B, next_n, H, D], any strides with a contiguous last dimension. Its
            scales are factors of `weights`.
        cache: uint8 [num_pages, page_size, 1, D + 4], as `indexer_cache_append` writes it.
        weights: fp32 [B * next_n, H].
        context_lens: int32 [B], tokens of each sequence including the next_n new ones: the first
            context_lens[b] - next_n + 1 + j are visible to query j. Or int32 [B, next_n]: the
            first context_lens[b, j] are visible to query j. Values are clamped to
            [0, P * page_size].
        block_table: int32 [B, P], the pages of each sequence, in order. Tokens of a page outside
            [0, num_pages) are not visible.
        max_context_len: the width of the result; later tokens are omitted.

    Returns:
        fp32 [B * next_n, max_context_len], -inf for tokens that are not visible.

    Raises:
        TypeError, ValueError: an argument is not as above; with DEEPKERN_DEBUG=1 also for lengths
            and page numbers out of range.

    Example:
        >>> q = torch.randn(1, 1, 64, 128).to(torch.float8_e4m3fn)
        >>> cache = torch.zeros(4, 64, 1, 132, dtype=torch.uint8)
        >>> deepkern.indexer_cache_append(torch.randn(100, 128), cache, torch.arange(100))
        >>> lengths, table = torch.tensor([100]).int(), torch.tensor([[0, 1]]).int()
        >>> deepkern.paged_mqa_logits(q, cache, torch.randn(1, 64), lengths, table, 128).shape
        torch.Size([1, 128])
    """
    B, next_n, H, D = q.shape
    check_pages("paged_mqa_logits", cache, D)
    check_queries("paged_mqa_logits", q)
    check_that("paged_mqa_logits", "weights", weights.shape[0] == B * next_n,
               f"B * next_n = {B * next_n} rows", f"shape {tuple(weights.shape)}")  # fmt: skip
    check_that("paged_mqa_logits", "context_lens", context_lens.shape in ((B,), (B, next_n)),
               f"shape {(B,)} or {(B, next_n)}", f"shape {tuple(context_lens.shape)}")  # fmt: skip
    check_that("paged_mqa_logits", "block_table", block_table.shape[1] * cache.shape[1] < 2**31,
               "fewer than 2**31 tokens a sequence",
               f"{block_table.shape[1]} pages of {cache.shape[1]}")  # fmt: skip
    check_that("paged_mqa_logits", "max_context_len", 0 <= max_context_len <= 2**31 - 2 * CHUNK,
               f"a number from 0 to 2**31 - {2 * CHUNK}", max_context_len)  # fmt: skip
    # Fake kernel: allocates the output; the launcher of a backend computes it.
    return q.new_empty(B * next_n, max_context_len, dtype=torch.float32)


@paged_mqa_logits.op.register_tile
def choose_tile(q: Tensor, *_) -> Tile:
    """The tile for these shapes."""
    _, next_n, H, D = q.shape
    max_queries = next_power_of_2(max(next_n, 1))
    return choose_query_tile(arch.of(q.device), H, D, max_queries)


@paged_mqa_logits.op.register_launcher("triton")
def _launch_triton(
    q: Tensor,
    cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    max_context_len: int,
) -> Tensor:
    out = paged_mqa_logits.op.allocate(
        q, cache, weights, context_lens, block_table, max_context_len
    )
    if out.numel() == 0:
        return out
    B, next_n, H, D = q.shape
    num_pages, page_size = cache.shape[:2]
    native_fp8 = arch.of(q.device).native_fp8
    values, scales = page_views(cache, FP8 if native_fp8 else torch.uint8)
    tile = choose_tile(q)
    query_tiles = cdiv(next_n, tile.queries)
    len_per_query = context_lens.dim() == 2
    paged_mqa_logits_kernel[(B * cdiv(max_context_len, CHUNK) * query_tiles,)](
        as_bits(q, native_fp8), values, scales, weights, context_lens, block_table, out,
        next_n, H, D if H else 0, max_context_len, block_table.shape[1] * page_size,
        num_pages, page_size, query_tiles, *q.stride()[:3], weights.stride(0),
        context_lens.stride(0), context_lens.stride(1) if len_per_query else 0,
        block_table.stride(0), values.stride(0), scales.stride(0),
        CHUNK=CHUNK, LEN_PER_QUERY=len_per_query, NATIVE_FP8=native_fp8, **tile.options(H, D),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["next_n", "query_tiles"])
def paged_mqa_logits_kernel(
    q_ptr,  # FP8 or its bytes [B, next_n, H, D]
    values_ptr,  # FP8 or its bytes [num_pages, page_size * D]
    scales_ptr,  # fp32 [num_pages, page_size], or its bytes
    weights_ptr,  # fp32 [B * next_n, H]
    context_lens_ptr,  # int32 [B], or [B, next_n]
    block_table_ptr,  # int32 [B, P]
    out_ptr,  # fp32 [B * next_n, max_context_len]
    next_n,
    H,
    D,
    max_context_len,
    max_len,  # tokens of P pages
    num_pages,
    page_size,  # tokens
    query_tiles,  # ceil(next_n / QUERIES)
    q_batch_stride,  # strides in elements
    q_query_stride,
    q_head_stride,
    weights_row_stride,
    context_lens_batch_stride,
    context_lens_query_stride,
    block_table_stride,
    values_page_stride,
    scales_page_stride,
    CHUNK: tl.constexpr,  # tokens per program
    LEN_PER_QUERY: tl.constexpr,  # context_lens is [B, next_n]
    NATIVE_FP8: tl.constexpr,
    KEYS: tl.constexpr,  # tokens per step
    QUERIES: tl.constexpr,  # per program
    HEADS: tl.constexpr,  # of a query, per product
    D_BLOCK: tl.constexpr,  # columns of D, per product
    ONE_PRODUCT: tl.constexpr,  # one product computes all H heads and all of D
):
    query = tl.program_id(0) % query_tiles * QUERIES + tl.arange(0, QUERIES)
    num_chunks = tl.cdiv(max_context_len, CHUNK)
    chunk = tl.program_id(0) // query_tiles % num_chunks * CHUNK
    b = (tl.program_id(0) // query_tiles // num_chunks).to(tl.int64)
    query_mask = query < next_n
    length_ptrs = context_lens_ptr + b * context_lens_batch_stride
    length_ptrs += query.to(tl.int64) * context_lens_query_stride
    limit = tl.load(length_ptrs, mask=query_mask, other=0)
    limit = tl.minimum(tl.maximum(limit, 0), max_len)
    if not LEN_PER_QUERY:
        limit -= next_n - 1 - query  # [QUERIES]
    chunk_end = tl.minimum(chunk + CHUNK, max_context_len)
    last = tl.minimum(tl.max(tl.where(query_mask, limit, 0)), chunk_end)

    row = b * next_n + query
    queries = QueryRows(
        q_ptr + b * q_batch_stride + query.to(tl.int64) * q_query_stride,
        weights_ptr + row * weights_row_stride, query_mask, q_head_stride, H, D,
    )  # fmt: skip
    preloaded = preload_queries(queries, HEADS, D_BLOCK, ONE_PRODUCT, NATIVE_FP8)
    out_ptrs = out_ptr + (row * max_context_len)[None, :]

    for n in range(chunk, last, KEYS):
        key = n + tl.arange(0, KEYS)
        page_ptrs = block_table_ptr + b * block_table_stride + key // page_size
        page = tl.load(page_ptrs, mask=key < last, other=-1)
        key_mask = (page >= 0) & (page < num_pages)
        page, offset = page.to(tl.int64), key % page_size
        # Loaded before the product, so that the load overlaps with it.
        scale = load(scales_ptr + page * scales_page_stride, offset, key_mask, tl.float32)
        sums = head_sums(
            values_ptr + page * values_page_stride + offset * D, key_mask, queries, preloaded,
            HEADS, D_BLOCK, ONE_PRODUCT, NATIVE_FP8,
        )  # fmt: skip
        attn_mask = key_mask[:, None] & (key[:, None] < limit[None, :])
        store_logits(out_ptrs, key, max_context_len, query_mask, sums, scale, attn_mask)
    rest = chunk + tl.cdiv(tl.maximum(last - chunk, 0), KEYS) * KEYS
    fill_with_neg_inf(out_ptrs, rest, chunk_end, max_context_len, query_mask, KEYS)


@paged_mqa_logits.op.register_debug_check
def check_contents(
    q: Tensor,
    cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    max_context_len: int,
) -> None:
    """For DEEPKERN_DEBUG=1: lengths fit the block table, and the pages of their tokens exist."""
    num_pages, page_size = cache.shape[:2]
    P = block_table.shape[1]
    wrong = context_lens[(context_lens < 0) | (context_lens > P * page_size)]
    check_that("paged_mqa_logits", "context_lens", wrong.numel() == 0,
               f"lengths in [0, {P * page_size}]", wrong[:1].tolist())  # fmt: skip
    if context_lens.numel() == 0:
        return
    longest = context_lens if context_lens.dim() == 1 else context_lens.amax(1)
    first_token = torch.arange(P, device=q.device) * page_size
    pages = block_table[first_token < longest[:, None]]
    wrong = pages[(pages < 0) | (pages >= num_pages)]
    check_that("paged_mqa_logits", "block_table", wrong.numel() == 0,
               f"pages in [0, {num_pages})", wrong[:1].tolist())  # fmt: skip
