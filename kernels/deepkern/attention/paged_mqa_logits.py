"""`mqa_logits` for a few new queries per sequence over the indexer's paged cache.

    out[b, j, n] = scale[n] · Σ_h weights[b, j, h] · ReLU(q[b, j, h] · key[n])   n < limit[b, j]
    out[b, j, n] = -inf                                                         elsewhere

Cut: a program takes the new queries of a sequence with all their heads, over a chunk of its tokens,
which it reads tile by tile through the block table; head_sums.py has the arithmetic of a tile.
Tokens past the longest limit are not read. A length is read where it is needed, on the device.

132 bytes of a token (D = 128) take part in 2 · next_n · H · D operations, so one query of 64 heads
is bound by memory: many small programs share a multiprocessor, each with several tiles in flight.

Source: DeepSeek-V3.2 (arXiv 2512.02556), section 2.1; DeepGEMM's fp8_paged_mqa_logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv, next_power_of_2
from ..quant.fp8 import as_bits, matrix_operand
from ..runtime import arch
from ..runtime.contract import FP8, check_that
from ..runtime.op import op
from .cache import load
from .head_sums import Tile, check_queries, head_sums, load_queries, load_weights, tile_for
from .indexer_cache import check_pages, page_parts
from .mqa_logits import fill

CHUNK = 512  # tokens of a program


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
    """Scores of a sequence's cached tokens for its new queries, summed over weighted heads.

    Args:
        q: float8_e4m3fn [B, next_n, H, D]; its scales belong into `weights`.
        cache: uint8 [blocks, page, 1, D + 4], as `indexer_cache_append` writes it.
        weights: fp32 [B * next_n, H].
        context_lens: int32 [B], tokens of each sequence, the next_n new ones included: query j
            sees the first context_lens[b] - next_n + 1 + j. Or int32 [B, next_n]: query j sees the
            first context_lens[b, j]. Taken as 0 if negative, as P * page if larger.
        block_table: int32 [B, P], the pages of each sequence, in order. The tokens of a page that
            is not in [0, blocks) count as absent.
        max_context_len: the width of the result; tokens past it are left out.

    Returns:
        fp32 [B * next_n, max_context_len], -inf for tokens that are not seen or absent.

    Raises:
        TypeError, ValueError: an argument is not as above; with DEEPKERN_DEBUG=1 also for lengths
            and page numbers out of range.
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
               "a number from 0 to 2**31 - 1024", max_context_len)  # fmt: skip
    return q.new_empty(B * next_n, max_context_len, dtype=torch.float32)


@paged_mqa_logits.op.register_tile
def choose_tile(q: Tensor, *_) -> Tile:
    """The tile for these shapes."""
    _, next_n, H, D = q.shape
    return tile_for(arch.of(q.device), H, D, most=next_power_of_2(max(next_n, 1)))


@paged_mqa_logits.op.register_launcher("triton")
def _launch_triton(q, cache, weights, context_lens, block_table, max_context_len) -> Tensor:
    args = q, cache, weights, context_lens, block_table, max_context_len
    out = paged_mqa_logits.op.allocate(*args)
    if out.numel() == 0:
        return out
    B, next_n, H, D = q.shape
    blocks, page = cache.shape[:2]
    native_fp8 = arch.of(q.device).native_fp8
    values, scales = page_parts(cache, FP8 if native_fp8 else torch.uint8)
    t = choose_tile(q)
    rounds = cdiv(next_n, t.queries)
    each = context_lens.dim() == 2
    paged_mqa_logits_kernel[(B * cdiv(max_context_len, CHUNK) * rounds,)](
        as_bits(q, native_fp8), values, scales, weights, context_lens, block_table, out,
        next_n, H, D if H else 0, max_context_len, block_table.shape[1] * page, blocks, page,
        rounds,
        *q.stride()[:3], weights.stride(0), context_lens.stride(0),
        context_lens.stride(1) if each else 0, block_table.stride(0),
        values.stride(0), scales.stride(0),
        KEYS=t.keys, QUERIES=t.queries, HEADS=t.heads, WIDE=t.wide, CHUNK=CHUNK, EACH=each,
        WHOLE=t.heads >= H and t.wide >= D, NATIVE_FP8=native_fp8,
        num_warps=t.warps, num_stages=t.stages, enable_fp_fusion=False,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["next_n", "rounds"])
def paged_mqa_logits_kernel(
    q_ptr, values_ptr, scales_ptr, weights_ptr, length_ptr, table_ptr, out_ptr,
    next_n, H, D, width, capacity, blocks, page, rounds,
    q_batch, q_query, q_head, weights_query, length_batch, length_query, table_batch,
    values_block, scales_block,
    KEYS: tl.constexpr, QUERIES: tl.constexpr, HEADS: tl.constexpr, WIDE: tl.constexpr,
    CHUNK: tl.constexpr, EACH: tl.constexpr, WHOLE: tl.constexpr, NATIVE_FP8: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0) % rounds * QUERIES + tl.arange(0, QUERIES)
    chunks = tl.cdiv(width, CHUNK)
    chunk = tl.program_id(0) // rounds % chunks * CHUNK
    b = (tl.program_id(0) // rounds // chunks).to(tl.int64)
    known = query < next_n
    length_at = length_ptr + b * length_batch + query.to(tl.int64) * length_query
    limit = tl.minimum(tl.maximum(tl.load(length_at, mask=known, other=0), 0), capacity)
    if not EACH:
        limit -= next_n - 1 - query  # [QUERIES]
    chunk_end = tl.minimum(chunk + CHUNK, width)
    last = tl.minimum(tl.max(tl.where(known, limit, 0)), chunk_end)

    row = b * next_n + query
    q = q_ptr + b * q_batch + query.to(tl.int64) * q_query, known, q_head
    weights = weights_ptr + row * weights_query, known
    held = ()
    if WHOLE:
        values = matrix_operand(load_queries(q, H, D, 0, 0, HEADS, WIDE), NATIVE_FP8)
        held = (values,) + load_weights(weights, H, 0, HEADS)
    out = out_ptr + (row * width)[None, :]
    tokens = tl.arange(0, KEYS)
    for n in range(chunk, last, KEYS):
        key = n + tokens
        page_at = table_ptr + b * table_batch + key // page
        block = tl.load(page_at, mask=key < last, other=-1)
        present = (block >= 0) & (block < blocks)  # [KEYS]
        block, offset = block.to(tl.int64), key % page
        kv_row = values_ptr + block * values_block + offset * D
        # Before the product, so that it is on its way while multiplying.
        scale = load(scales_ptr + block * scales_block, offset, present, tl.float32)
        sums = head_sums(kv_row, present, q, weights, held, H, D, HEADS, WIDE, WHOLE, NATIVE_FP8)
        seen = present[:, None] & (key[:, None] < limit[None, :])
        logits = tl.where(seen, sums * scale[:, None], float("-inf"))  # [KEYS, QUERIES]
        inside = (key < width)[:, None] & known[None, :]
        tl.store(out + key.to(tl.int64)[:, None], logits, mask=inside)
    done = chunk + tl.cdiv(tl.maximum(last - chunk, 0), KEYS) * KEYS
    fill(out, known, done, chunk_end, tokens, width)


@paged_mqa_logits.op.register_debug_check
def check_contents(q, cache, weights, context_lens, block_table, max_context_len) -> None:
    blocks, page = cache.shape[:2]
    P = block_table.shape[1]
    wrong = context_lens[(context_lens < 0) | (context_lens > P * page)]
    check_that("paged_mqa_logits", "context_lens", wrong.numel() == 0,
               f"lengths in [0, {P * page}]", wrong[:1].tolist())  # fmt: skip
    if context_lens.numel() == 0:
        return
    longest = context_lens if context_lens.dim() == 1 else context_lens.amax(1)
    first_token = torch.arange(P, device=q.device) * page
    used = block_table[first_token < longest[:, None]]
    wrong = used[(used < 0) | (used >= blocks)]
    check_that("paged_mqa_logits", "block_table", wrong.numel() == 0,
               f"pages in [0, {blocks})", wrong[:1].tolist())  # fmt: skip
