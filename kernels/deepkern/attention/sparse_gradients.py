"""The gradients of sparse attention, without float atomics: bitwise reproducible.

Used by `mla_sparse_prefill_backward`. With p[n] the weights, sinks included, p'[n] the weights
without sinks, and v the first R values of a row of kv, each query and head has

    grad_score[n] = p[n] (grad_out . v[n] - grad_out . out)  [+ p'[n] grad_lse]
    grad_q        = softmax_scale * sum over n of grad_score[n] kv[n]
    grad_kv[n]    = sum over queries and heads of p[n] grad_out [+] softmax_scale grad_score[n] q

where [+] adds the R values of grad_out to the first R of q's R + D.

Parallelization: many queries select the same row of kv, in an order that only the device knows.
Hence three kernels, over as many queries at once as the workspace holds (`queries_at_once`):

1. query kernel: one program takes a tile of heads through its query's indices. It computes grad_q,
   and stores p and softmax_scale * grad_score in the operands' dtype.
2. pair kernel: one program multiplies these for a tile of indices by grad_out and q, summed over
   all heads. It stores what each (query, index) pair adds to grad_kv, W fp32 values.
3. sum kernel: adds up the pairs of each row of kv, in the order of a stable sort by row.

A pair takes 2 H (3 W + 2 R) operations, the minimum. It also writes and reads 8 W bytes, which at
V3.2's widths and 128 heads take an H200 1.3 times as long as the operations: memory bandwidth
limits the speed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv
from ..runtime import arch
from ..runtime.arch import Arch
from . import paged_launch
from .cache import triton_dtype
from .splits import length_of, sink_factor
from .token_tiles import load_block, load_rope

WORKSPACE = 1 << 30  # bytes
LOG2_E = tl.constexpr(1.4426950408889634)
PAIRS = 8  # pairs that a program of the sum kernel loads at a time
COLUMNS = 128  # of grad_kv, per program of the pair kernel and the sum kernel


def queries_at_once(S: int, H: int, W: int, topk: int, element_size: int) -> int:
    """How many queries' p, grad_score, pair gradients and sorted pairs fit into WORKSPACE.

    At least 1 (0 without queries). The result depends on the shapes only.
    """
    bytes_per_query = topk * (4 * W + 2 * H * element_size + 40)
    fit = max(WORKSPACE // max(bytes_per_query, 1), 1)
    return min(fit if fit < 16 else fit // 16 * 16, S)


def launch_gradients(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    attn_sink: Tensor | None,
    topk_length: Tensor | None,
    grad_q: Tensor,
    grad_kv: Tensor,
    grad_sink: Tensor,
) -> None:
    """Writes grad_q, grad_kv and grad_sink; see `mla_sparse_prefill_backward`."""
    (S, H, W), topk, Skv = q.shape, indices.shape[-1], kv.shape[0]
    grad_kv_sum = q.new_zeros(Skv, W, dtype=torch.float32)
    grad_sink_rows = None if attn_sink is None else q.new_empty(S, H, dtype=torch.float32)
    step = max(queries_at_once(S, H, W, topk, q.element_size()), 1)
    weights = q.new_empty(2, step, H, topk)  # p and softmax_scale * grad_score
    pair_grads = q.new_empty(step, topk, W, dtype=torch.float32)
    for first in range(0, S if H * W else 0, step):
        queries = slice(first, min(first + step, S))
        lengths = _rows(topk_length, queries)
        _launch_query_kernel(
            grad_out[queries], _rows(grad_lse, queries), q[queries], kv, indices[queries],
            out[queries], lse[queries], softmax_scale, attn_sink, lengths,
            grad_q[queries], _rows(grad_sink_rows, queries), weights,
        )  # fmt: skip
        if topk and Skv:
            _launch_pair_kernel(grad_out[queries], q[queries], lengths, weights, pair_grads)
            _launch_sum_kernel(indices[queries][:, 0], lengths, pair_grads, grad_kv_sum)
    grad_kv[:, 0].copy_(grad_kv_sum)
    if grad_sink_rows is not None:
        torch.sum(grad_sink_rows, 0, out=grad_sink)


def _rows(x: Tensor | None, queries: slice) -> Tensor | None:
    return None if x is None else x[queries]


class HeadsView(NamedTuple):
    """A tensor of heads as one kernel argument."""

    ptr: Tensor  # [S, H, _], last dimension contiguous
    query_stride: int  # elements from query to query
    head_stride: int


def _heads_view(x: Tensor) -> HeadsView:
    return HeadsView(x, *x.stride()[:2])


def _launch_query_kernel(
    grad_out, grad_lse, q, kv, indices, out, lse, softmax_scale, attn_sink, topk_length,
    grad_q, grad_sink_rows, weights,
):  # fmt: skip
    (S, H, W), R, topk = q.shape, out.shape[-1], indices.shape[-1]
    tile = paged_launch.choose_tile(q, kv, R, H, "sparse_backward")
    mla_sparse_prefill_backward_query_kernel[(S * cdiv(H, tile.rows),)](
        _heads_view(grad_out), grad_lse, _heads_view(q), kv, indices, topk_length, attn_sink,
        _heads_view(out), lse, grad_q, grad_sink_rows, weights[0], weights[1],
        softmax_scale, H, R, W - R, topk, kv.shape[0],
        kv.stride(0), indices.stride(0), lse.stride(0),
        0 if grad_lse is None else grad_lse.stride(0),
        DTYPE=triton_dtype(q.dtype), PRECISION=arch.of(q.device).input_precision,
        ROWS=tile.rows, KEYS=tile.keys, **paged_launch.latent_blocks(R, W, tile.latents),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _launch_pair_kernel(grad_out, q, topk_length, weights, pair_grads):
    (S, H, W), R, topk = q.shape, grad_out.shape[-1], pair_grads.shape[1]
    target = arch.of(q.device)
    heads, keys, warps, stages = _pair_tile(target, q.dtype, H)
    mla_sparse_prefill_backward_pair_kernel[(S * cdiv(topk, keys), cdiv(W, COLUMNS))](
        _heads_view(grad_out), _heads_view(q), topk_length, weights[0], weights[1], pair_grads,
        H, R, W, topk, PRECISION=target.input_precision,
        HEADS=heads, KEYS=keys, COLUMNS=COLUMNS, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _launch_sum_kernel(indices, topk_length, pair_grads, grad_kv_sum):
    topk, (Skv, W) = indices.shape[1], grad_kv_sum.shape
    selected = (indices >= 0) & (indices < Skv)
    if topk_length is not None:
        selected &= torch.arange(topk, device=indices.device) < topk_length[:, None]
    row, pair = torch.where(selected, indices, Skv).flatten().sort(stable=True)
    bounds = torch.arange(Skv + 1, dtype=torch.int32, device=indices.device)
    starts = torch.searchsorted(row, bounds, out_int32=True)
    mla_sparse_prefill_backward_sum_kernel[(Skv, cdiv(W, COLUMNS))](
        pair_grads, pair, starts, grad_kv_sum, W, PAIRS=PAIRS, COLUMNS=COLUMNS, num_warps=2
    )


def _pair_tile(target: Arch, dtype: torch.dtype, H: int) -> tuple[int, int, int, int]:
    """(heads, keys, warps, stages) of the pair kernel."""
    if dtype == torch.float32:
        return (16, 32, 8, 1)
    return (16 if H <= 16 else 32 if H <= 32 else 64, 128, 8, 2)


@triton.jit(do_not_specialize=["topk", "Skv"])
def mla_sparse_prefill_backward_query_kernel(
    grad_out,  # HeadsView of [S, H, R]
    grad_lse_ptr,  # fp32 [S, H], or None
    q,  # HeadsView of [S, H, R + D]
    kv_ptr,  # [Skv, 1, R + D]
    indices_ptr,  # int32 [S, 1, topk], rows of kv
    length_ptr,  # int32 [S], indices that count, or None: topk
    sink_ptr,  # fp32 [H], or None
    out,  # HeadsView of [S, H, R]
    lse_ptr,  # fp32 [S, H], natural log
    grad_q_ptr,  # [S, H, R + D] contiguous
    grad_sink_ptr,  # fp32 [S, H] contiguous, each query's part of the gradient, or None
    weights_ptr,  # [S, H, topk] contiguous, p
    grad_scores_ptr,  # [S, H, topk] contiguous, softmax_scale * grad_score
    softmax_scale,
    H,
    R,
    D,
    topk,
    Skv,
    kv_row,  # strides, in elements
    indices_query,
    lse_query,
    grad_lse_query,
    DTYPE: tl.constexpr,  # of q, kv, out and the matrix products
    PRECISION: tl.constexpr,  # input_precision of the matrix products
    ROWS: tl.constexpr,  # heads of a program
    KEYS: tl.constexpr,  # indices per step
    R_BLOCK: tl.constexpr,  # latents per matrix product
    NUM_R_BLOCKS: tl.constexpr,  # ceil(R / R_BLOCK)
    EVEN_R: tl.constexpr,  # whether R_BLOCK divides R
    D_TILE: tl.constexpr,  # D rounded up to a power of two
):
    """grad_q, p and grad_score of a tile of heads of one query."""
    tiles = tl.cdiv(H, ROWS)
    query = (tl.program_id(0) // tiles).to(tl.int64)
    head = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    row_mask = (head < H)[:, None]
    length = length_of(length_ptr, query, topk)
    head_64 = head.to(tl.int64)[:, None]
    q_row = q.ptr + query * q.query_stride + head_64 * q.head_stride
    q_rope = load_rope(q_row + R, D, row_mask, DTYPE, DTYPE, D_TILE)
    q_latent, grad_out_latent, grad_q = (), (), ()  # NUM_R_BLOCKS tiles [ROWS, R_BLOCK] each
    delta = tl.zeros((ROWS,), tl.float32)  # grad_out . out
    for j in tl.static_range(NUM_R_BLOCKS):
        q_latent = q_latent + (load_block(q_row, j, R, row_mask, DTYPE, R_BLOCK, EVEN_R),)
        grad_row = grad_out.ptr + query * grad_out.query_stride + head_64 * grad_out.head_stride
        grad_block = load_block(grad_row, j, R, row_mask, DTYPE, R_BLOCK, EVEN_R)
        grad_out_latent = grad_out_latent + (grad_block,)
        out_row = out.ptr + query * out.query_stride + head_64 * out.head_stride
        out_block = load_block(out_row, j, R, row_mask, DTYPE, R_BLOCK, EVEN_R)
        delta += tl.sum(grad_block.to(tl.float32) * out_block.to(tl.float32), 1)
        grad_q = grad_q + (tl.zeros((ROWS, R_BLOCK), tl.float32),)
    grad_rope = tl.zeros((ROWS, D_TILE), tl.float32)
    lse = tl.load(lse_ptr + query * lse_query + head, mask=head < H, other=0.0) * LOG2_E
    factor = sink_factor(sink_ptr, head, head < H, lse)
    grad_lse = tl.zeros((ROWS,), tl.float32)
    if grad_lse_ptr is not None:
        grad_lse_row = grad_lse_ptr + query * grad_lse_query
        grad_lse = tl.load(grad_lse_row + head, mask=head < H, other=0.0)

    indices_row = indices_ptr + query * indices_query
    pair_row = (query * H + head) * topk
    for start in range(0, length, KEYS):
        n = start + tl.arange(0, KEYS)
        row = tl.load(indices_row + n, mask=n < length, other=-1)
        key_mask = (row >= 0) & (row < Skv)  # [KEYS]
        token_mask = key_mask[:, None]
        key_row = kv_ptr + (row.to(tl.int64) * kv_row)[:, None]
        rope = load_rope(key_row + R, D, token_mask, DTYPE, DTYPE, D_TILE)
        scores = tl.dot(q_rope, tl.trans(rope), input_precision=PRECISION)
        grad_weights = tl.zeros((ROWS, KEYS), tl.float32)
        latent = ()  # NUM_R_BLOCKS tiles [KEYS, R_BLOCK]
        for j in tl.static_range(NUM_R_BLOCKS):
            values = load_block(key_row, j, R, token_mask, DTYPE, R_BLOCK, EVEN_R)
            scores = tl.dot(q_latent[j], tl.trans(values), scores, input_precision=PRECISION)
            grad_weights = tl.dot(
                grad_out_latent[j], tl.trans(values), grad_weights, input_precision=PRECISION
            )
            latent = latent + (values,)
        no_sink = tl.exp2(scores * (softmax_scale * LOG2_E) - lse[:, None])  # p'
        no_sink = tl.where(key_mask[None, :], no_sink, 0.0)
        weights = no_sink * factor[:, None]  # p
        grad_scores = weights * (grad_weights - delta[:, None]) + no_sink * grad_lse[:, None]
        grad_scores = (grad_scores * softmax_scale).to(DTYPE)
        mask = row_mask & (n < length)[None, :]
        tl.store(weights_ptr + pair_row[:, None] + n, weights.to(DTYPE), mask=mask)
        tl.store(grad_scores_ptr + pair_row[:, None] + n, grad_scores, mask=mask)
        grad_rope = tl.dot(grad_scores, rope, grad_rope, input_precision=PRECISION)
        old = grad_q
        grad_q = ()
        for j in tl.static_range(NUM_R_BLOCKS):
            block = tl.dot(grad_scores, latent[j], old[j], input_precision=PRECISION)
            grad_q = grad_q + (block,)

    grad_q_row = grad_q_ptr + ((query * H + head) * (R + D))[:, None]
    for j in tl.static_range(NUM_R_BLOCKS):
        column = j * R_BLOCK + tl.arange(0, R_BLOCK)[None, :]
        mask = row_mask & ((column < R) | EVEN_R)
        tl.store(grad_q_row + column, grad_q[j].to(DTYPE), mask=mask)
    column = tl.arange(0, D_TILE)[None, :]
    tl.store(grad_q_row + R + column, grad_rope.to(DTYPE), mask=row_mask & (column < D))
    if grad_sink_ptr is not None:
        sink = tl.load(sink_ptr + head, mask=head < H, other=0.0) * LOG2_E
        # The sink's own weight, 1 - factor: the difference would cancel for a sink far below lse.
        sink_weight = tl.where(lse == float("-inf"), 0.0, 1.0 / (1.0 + tl.exp2(lse - sink)))
        tl.store(grad_sink_ptr + query * H + head, -sink_weight * delta, mask=head < H)


@triton.jit(do_not_specialize=["topk"])
def mla_sparse_prefill_backward_pair_kernel(
    grad_out,  # HeadsView of [S, H, R]
    q,  # HeadsView of [S, H, W]
    length_ptr,  # int32 [S], indices that count, or None: topk
    weights_ptr,  # [S, H, topk] contiguous, p
    grad_scores_ptr,  # [S, H, topk] contiguous, softmax_scale * grad_score
    pair_grads_ptr,  # fp32 [S, topk, W] contiguous
    H,
    R,
    W,
    topk,
    PRECISION: tl.constexpr,  # input_precision of the matrix products
    HEADS: tl.constexpr,  # heads per step
    KEYS: tl.constexpr,  # indices of a program
    COLUMNS: tl.constexpr,  # columns of a program
):
    """The gradients that KEYS indices of one query add to COLUMNS columns of grad_kv."""
    tiles = tl.cdiv(topk, KEYS)
    query = (tl.program_id(0) // tiles).to(tl.int64)
    n = tl.program_id(0) % tiles * KEYS + tl.arange(0, KEYS)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    length = length_of(length_ptr, query, topk)
    if tl.program_id(0) % tiles * KEYS >= length:
        return
    acc = tl.zeros((KEYS, COLUMNS), tl.float32)
    for start in range(0, H, HEADS):
        head = (start + tl.arange(0, HEADS)).to(tl.int64)[:, None]
        pair = (query * H + head) * topk + n[None, :]  # [HEADS, KEYS]
        pair_mask = (head < H) & (n < length)[None, :]
        weights = tl.load(weights_ptr + pair, mask=pair_mask, other=0.0)
        grad_scores = tl.load(grad_scores_ptr + pair, mask=pair_mask, other=0.0)
        grad_row = grad_out.ptr + query * grad_out.query_stride + head * grad_out.head_stride
        grad_mask = (head < H) & (column < R)
        grad_tile = tl.load(grad_row + column, mask=grad_mask, other=0.0)  # [HEADS, COLUMNS]
        q_at = q.ptr + query * q.query_stride + head * q.head_stride + column
        q_tile = tl.load(q_at, mask=(head < H) & (column < W), other=0.0)
        acc = tl.dot(tl.trans(weights), grad_tile, acc, input_precision=PRECISION)
        acc = tl.dot(tl.trans(grad_scores), q_tile, acc, input_precision=PRECISION)
    at = pair_grads_ptr + ((query * topk + n) * W)[:, None] + column
    tl.store(at, acc, mask=(n < length)[:, None] & (column < W))


@triton.jit
def mla_sparse_prefill_backward_sum_kernel(
    pair_grads_ptr,  # fp32 [S * topk, W] contiguous
    pair_ptr,  # int64 [S * topk], rows of pair_grads, sorted by row of kv
    starts_ptr,  # int32 [Skv + 1], the first of each row's pairs in pair_ptr
    grad_kv_ptr,  # fp32 [Skv, W] contiguous, added to
    W,
    PAIRS: tl.constexpr,  # pairs per step
    COLUMNS: tl.constexpr,  # columns of a program
):
    """Adds its pairs' gradients to a row of grad_kv. Pairs i, i + PAIRS, ... go into one sum."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    begin, end = tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)
    if begin >= end:
        return
    sums = tl.zeros((PAIRS, COLUMNS), tl.float32)
    for start in range(begin, end, PAIRS):
        i = start + tl.arange(0, PAIRS)
        pair = tl.load(pair_ptr + i, mask=i < end, other=0)
        mask = (i < end)[:, None] & (column < W)[None, :]
        sums += tl.load(pair_grads_ptr + (pair * W)[:, None] + column, mask=mask, other=0.0)
    old = tl.load(grad_kv_ptr + row * W + column, mask=column < W, other=0.0)
    tl.store(grad_kv_ptr + row * W + column, old + tl.sum(sums, 0), mask=column < W)
