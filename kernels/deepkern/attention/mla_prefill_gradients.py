"""The dkv and dq kernels of `mla_prefill_backward`; see there.

Both compute the scores and dS of a tile of queries and keys. In the dkv kernel the keys are the
rows of every product, in the dq kernel the queries are. So P^T and dS^T, or dS, become left
operands of the next product without a transposition.

Parallelization and limit: see mla_prefill_backward.py.

Source: FlashAttention-2 (arXiv 2307.08691), section 3.1.2.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .mla_prefill import LOG2_E, visible_keys
from .ragged import (
    add_dot_split_rows,
    dot_split_rows,
    load_split_rows,
    program_tile,
    scale_split_rows,
    select_contiguous_head,
    select_head,
    store_split_rows,
    zero_split_rows,
)


@triton.jit(do_not_specialize=["T", "num_tiles", "lse_head_stride"])
def mla_prefill_backward_dkv_kernel(
    grad_out,  # HeadRows [T, H, Dv]
    q,  # HeadRows [T, H, Dqk]
    k,  # HeadRows [Tk, Hk, Dqk]
    v,  # HeadRows [Tk, Hk, Dv]
    lse_ptr,  # fp32 [H, T], natural log
    delta_ptr,  # fp32 [H, T], contiguous
    tiles_ptr,  # int32 [num_tiles, 4], of ragged_tiles over the keys
    grad_k_ptr,  # [Tk, Hk, Dqk], contiguous
    grad_v_ptr,  # [Tk, Hk, Dv], contiguous
    score_scale,  # softmax_scale · log2(e)
    softmax_scale,
    T,
    Hk,
    group,  # heads of q per head of k and v
    num_tiles,
    lse_head_stride,  # elements
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,  # of fp32 products
    BLOCK_M: tl.constexpr,  # queries per step
    BLOCK_N: tl.constexpr,  # keys of the tile
    D0: tl.constexpr,  # Dqk is split into D0 + D1 columns
    D1: tl.constexpr,
    V0: tl.constexpr,  # Dv is split into V0 + V1 columns
    V1: tl.constexpr,
    EVEN_QK: tl.constexpr,  # Dqk is D0 + D1
    EVEN_V: tl.constexpr,  # Dv is V0 + V1
):
    """grad_k and grad_v of BLOCK_N keys of one head of k and v."""
    kv_head, tile = program_tile(tiles_ptr, num_tiles)
    if tile.first >= tile.end:
        return
    key = tile.first + tl.arange(0, BLOCK_N)
    key_mask = key < tile.end
    k_tile = load_split_rows(select_head(k, kv_head), key, key_mask, True, EVEN_QK, D0, D1)
    v_tile = load_split_rows(select_head(v, kv_head), key, key_mask, True, EVEN_V, V0, V1)
    queries = visible_queries(key, tile, CAUSAL, BLOCK_M, BLOCK_N)
    dk, dv = zero_split_rows(BLOCK_N, D0, D1), zero_split_rows(BLOCK_N, V0, V1)
    for i in range(group):
        head = kv_head * group + i
        q_head, grad_out_head = select_head(q, head), select_head(grad_out, head)
        lse_head_ptr, delta_head_ptr = lse_ptr + head * lse_head_stride, delta_ptr + head * T
        if CAUSAL:
            dk, dv = accumulate_dkv(
                dk, dv, k_tile, v_tile, q_head, grad_out_head, lse_head_ptr, delta_head_ptr,
                queries.visible_begin, tl.minimum(queries.full_begin, queries.end), queries,
                score_scale, True, PRECISION, BLOCK_M, D0, D1, V0, V1, EVEN_QK, EVEN_V,
            )  # fmt: skip
        dk, dv = accumulate_dkv(
            dk, dv, k_tile, v_tile, q_head, grad_out_head, lse_head_ptr, delta_head_ptr,
            queries.full_begin, queries.end, queries,
            score_scale, False, PRECISION, BLOCK_M, D0, D1, V0, V1, EVEN_QK, EVEN_V,
        )  # fmt: skip
    dk = scale_split_rows(dk, softmax_scale)
    grad_k = select_contiguous_head(grad_k_ptr, Hk, kv_head, k.width)
    grad_v = select_contiguous_head(grad_v_ptr, Hk, kv_head, v.width)
    store_split_rows(grad_k, key, key_mask, dk, EVEN_QK, D0)
    store_split_rows(grad_v, key, key_mask, dv, EVEN_V, V0)


class VisibleQueries(NamedTuple):
    """The queries that attend to a tile of keys."""

    end: tl.tensor  # query after the last of the sequence
    visible_begin: tl.tensor  # no query before this one attends to the tile; whole tiles
    full_begin: tl.tensor  # every query from here on attends to all keys; whole tiles, may pass end
    first: tl.tensor  # [BLOCK_N], the first query that attends to each key


@triton.jit
def visible_queries(
    key,  # [BLOCK_N]
    tile,  # RaggedTile of keys
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The VisibleQueries of the tile."""
    begin, end = tile.other_begin, tile.other_end
    first = tl.zeros_like(key) + begin
    visible_begin, full_begin = begin, begin
    if CAUSAL:
        shift = tile.end - end  # both sequences end together
        first = key - shift
        skipped = tl.maximum(tile.first - shift - begin, 0)
        visible_begin += skipped // BLOCK_M * BLOCK_M
        not_full = tl.maximum(tile.first + BLOCK_N - 1 - shift - begin, 0)
        full_begin += tl.cdiv(not_full, BLOCK_M) * BLOCK_M
    return VisibleQueries(end, visible_begin, full_begin, first)


@triton.jit
def accumulate_dkv(
    dk,  # split rows, fp32 [BLOCK_N, Dqk], without softmax_scale
    dv,  # split rows, fp32 [BLOCK_N, Dv]
    k_tile,  # split rows [BLOCK_N, Dqk]
    v_tile,  # split rows [BLOCK_N, Dv]
    q,  # HeadRows, one head
    grad_out,  # HeadRows, one head
    lse_ptr,  # fp32 [T]
    delta_ptr,  # fp32 [T]
    first_row,
    end_row,
    queries,  # VisibleQueries
    score_scale,  # softmax_scale · log2(e)
    MASKED: tl.constexpr,  # some of these queries do not attend to some of the keys
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    EVEN_QK: tl.constexpr,
    EVEN_V: tl.constexpr,
):
    """dk and dv after the queries from first_row to end_row."""
    for start in range(first_row, end_row, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        row_mask = row < queries.end
        q_tile = load_split_rows(q, row, row_mask, True, EVEN_QK, D0, D1)
        grad_out_tile = load_split_rows(grad_out, row, row_mask, True, EVEN_V, V0, V1)
        lse, delta = load_lse_and_delta(lse_ptr, delta_ptr, row, row_mask)
        scores = dot_split_rows(k_tile, q_tile, PRECISION)  # [BLOCK_N, BLOCK_M]
        p = tl.exp2(scores * score_scale - lse[None, :])
        if MASKED:
            p = tl.where(row[None, :] >= queries.first[:, None], p, 0.0)
        dv = add_dot_split_rows(dv, p.to(k_tile[0].dtype), grad_out_tile, PRECISION)
        ds = p * (dot_split_rows(v_tile, grad_out_tile, PRECISION) - delta[None, :])
        dk = add_dot_split_rows(dk, ds.to(k_tile[0].dtype), q_tile, PRECISION)
    return dk, dv


@triton.jit
def load_lse_and_delta(
    lse_ptr,  # fp32 [T], natural log
    delta_ptr,  # fp32 [T]
    row,  # [BLOCK_M]
    row_mask,  # [BLOCK_M]
):
    """lse to base 2, and delta. An lse of -inf becomes +inf, so that all weights are 0."""
    lse = tl.load(lse_ptr + row, mask=row_mask, other=float("-inf")) * LOG2_E
    delta = tl.load(delta_ptr + row, mask=row_mask, other=0.0)
    return tl.where(lse == float("-inf"), float("inf"), lse), delta


@triton.jit(do_not_specialize=["T", "num_tiles", "lse_head_stride"])
def mla_prefill_backward_dq_kernel(
    grad_out,  # HeadRows [T, H, Dv]
    q,  # HeadRows [T, H, Dqk]
    k,  # HeadRows [Tk, Hk, Dqk]
    v,  # HeadRows [Tk, Hk, Dv]
    lse_ptr,  # fp32 [H, T], natural log
    delta_ptr,  # fp32 [H, T], contiguous
    tiles_ptr,  # int32 [num_tiles, 4], of ragged_tiles over the queries
    grad_q_ptr,  # [T, H, Dqk], contiguous
    score_scale,  # softmax_scale · log2(e)
    softmax_scale,
    T,
    H,
    group,  # heads of q per head of k and v
    num_tiles,
    lse_head_stride,  # elements
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,  # of fp32 products
    BLOCK_M: tl.constexpr,  # queries of the tile
    BLOCK_N: tl.constexpr,  # keys per step
    D0: tl.constexpr,  # Dqk is split into D0 + D1 columns
    D1: tl.constexpr,
    V0: tl.constexpr,  # Dv is split into V0 + V1 columns
    V1: tl.constexpr,
    EVEN_QK: tl.constexpr,  # Dqk is D0 + D1
    EVEN_V: tl.constexpr,  # Dv is V0 + V1
):
    """grad_q of BLOCK_M queries of one head."""
    head, tile = program_tile(tiles_ptr, num_tiles)
    if tile.first >= tile.end:
        return
    row = tile.first + tl.arange(0, BLOCK_M)
    row_mask = row < tile.end
    q_tile = load_split_rows(select_head(q, head), row, row_mask, True, EVEN_QK, D0, D1)
    grad_out_head = select_head(grad_out, head)
    grad_out_tile = load_split_rows(grad_out_head, row, row_mask, True, EVEN_V, V0, V1)
    lse, delta = load_lse_and_delta(
        lse_ptr + head * lse_head_stride, delta_ptr + head * T, row, row_mask
    )
    k, v = select_head(k, head // group), select_head(v, head // group)
    keys = visible_keys(row, tile, CAUSAL, BLOCK_M, BLOCK_N)
    dq = zero_split_rows(BLOCK_M, D0, D1)
    masked_begin = keys.full_end
    if q_tile[0].dtype == tl.float32:
        masked_begin = keys.begin  # masks every key: two loops spill 16 bytes on sm_120
    else:
        dq = accumulate_dq(
            dq, q_tile, grad_out_tile, lse, delta, k, v, keys.begin, keys.full_end, keys,
            score_scale, False, PRECISION, BLOCK_N, D0, D1, V0, V1, EVEN_QK, EVEN_V,
        )  # fmt: skip
    dq = accumulate_dq(
        dq, q_tile, grad_out_tile, lse, delta, k, v, masked_begin, keys.visible_end, keys,
        score_scale, True, PRECISION, BLOCK_N, D0, D1, V0, V1, EVEN_QK, EVEN_V,
    )  # fmt: skip
    dq = scale_split_rows(dq, softmax_scale)
    grad_q = select_contiguous_head(grad_q_ptr, H, head, q.width)
    store_split_rows(grad_q, row, row_mask, dq, EVEN_QK, D0)


@triton.jit
def accumulate_dq(
    dq,  # split rows, fp32 [BLOCK_M, Dqk], without softmax_scale
    q_tile,  # split rows [BLOCK_M, Dqk]
    grad_out_tile,  # split rows [BLOCK_M, Dv]
    lse,  # [BLOCK_M], of load_lse_and_delta
    delta,  # [BLOCK_M]
    k,  # HeadRows, one head
    v,  # HeadRows, one head
    first_key,
    end_key,
    keys,  # VisibleKeys
    score_scale,  # softmax_scale · log2(e)
    MASKED: tl.constexpr,  # some of these keys are not visible to some of the queries
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    EVEN_QK: tl.constexpr,
    EVEN_V: tl.constexpr,
):
    """dq after the keys from first_key to end_key."""
    for start in range(first_key, end_key, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        key_mask = key < keys.end
        k_tile = load_split_rows(k, key, key_mask, MASKED, EVEN_QK, D0, D1)
        v_tile = load_split_rows(v, key, key_mask, MASKED, EVEN_V, V0, V1)
        scores = dot_split_rows(q_tile, k_tile, PRECISION)  # [BLOCK_M, BLOCK_N]
        p = tl.exp2(scores * score_scale - lse[:, None])
        if MASKED:
            p = tl.where(key[None, :] < keys.limit[:, None], p, 0.0)
        ds = p * (dot_split_rows(grad_out_tile, v_tile, PRECISION) - delta[:, None])
        dq = add_dot_split_rows(dq, ds.to(q_tile[0].dtype), k_tile, PRECISION)
    return dq
