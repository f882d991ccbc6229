"""The gradients of sparse attention, without a float atomic: the same bits every time.

With p[n] the weights, sinks included, and v the first R values of a row of kv (see
`mla_sparse_prefill`), of each query and head

    grad_score[n] = p[n] (grad_out . v[n] - grad_out . out)  [+ p'[n] grad_lse, p' without sinks]
    grad_q        = softmax_scale * sum over n of grad_score[n] kv[n]
    grad_kv[n]    = sum over queries and heads of p[n] grad_out [+] softmax_scale grad_score[n] q

Rows of kv are named by many queries, in an order known on the device only. Hence three kernels,
over as many queries at once as the workspace holds (`queries_at_once`, by shapes alone):

`query_kernel`, cut as the forward pass, takes a tile of heads through its query's indices: it makes
grad_q, and writes p and grad_score in the operands' dtype. `pair_kernel` multiplies those of a tile
of indices by grad_out and q over all heads, which gives each (query, index) pair its share of
grad_kv, W fp32 values. `sum_kernel` adds up the shares of a row in the order of a stable sort of
the pairs by row.

A pair takes 2 H (3 W + 2 R) operations, the least there is, and beside them its share is written
and read: 8 W bytes, which at V3.2's widths and 128 heads take an H200 1.3 times as long.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv, next_power_of_2
from ..runtime import arch
from .mla_decode import triton_dtype
from .splits import length_of, share_beside_sink
from .token_tiles import load_block, load_rope

WORKSPACE = 1 << 30  # bytes
LOG2_E = tl.constexpr(1.4426950408889634)
PAIRS = 8  # shares of a row that a program has in flight
COLUMNS = 128


def queries_at_once(S: int, H: int, W: int, topk: int, element_size: int) -> int:
    """How many queries' p, grad_score, shares and sorted pairs fit into WORKSPACE; at least 1."""
    query = topk * (4 * W + 2 * H * element_size + 40)
    fit = max(WORKSPACE // max(query, 1), 1)
    return min(fit if fit < 16 else fit // 16 * 16, S)


def gradients(
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
    total = q.new_zeros(Skv, W, dtype=torch.float32)  # of grad_kv
    sinks = None if attn_sink is None else q.new_empty(S, H, dtype=torch.float32)
    step = max(queries_at_once(S, H, W, topk, q.element_size()), 1)
    weights = q.new_empty(2, step, H, topk)  # p and softmax_scale * grad_score
    shares = q.new_empty(step, topk, W, dtype=torch.float32)
    for first in range(0, S if H * W else 0, step):
        some = slice(first, min(first + step, S))

        def of(x, some=some):
            return None if x is None else x[some]

        lengths = of(topk_length)
        launch_query(
            of(grad_out), of(grad_lse), of(q), kv, of(indices), of(out), of(lse), softmax_scale,
            attn_sink, lengths, of(grad_q), of(sinks), weights,
        )  # fmt: skip
        if topk and Skv:
            launch_pair(of(grad_out), of(q), lengths, weights, shares)
            launch_sum(of(indices)[:, 0], lengths, shares, total)
    grad_kv[:, 0].copy_(total)
    if sinks is not None:
        torch.sum(sinks, 0, out=grad_sink)


def launch_query(
    grad_out, grad_lse, q, kv, indices, out, lse, softmax_scale, attn_sink, topk_length,
    grad_q, sinks, weights,
):  # fmt: skip
    (S, H, W), R, topk = q.shape, out.shape[-1], indices.shape[-1]
    target = arch.of(q.device)
    rows, keys, wide, warps, stages = query_tile(target, q.dtype, H)
    wide = max(min(wide, next_power_of_2(max(R, 1))), 16)
    room = keys * 640
    while keys > 16 and keys * W > room:
        keys //= 2
    query_kernel[(S * cdiv(H, rows),)](
        grad_out, grad_lse, q, kv, indices, topk_length, attn_sink, out, lse,
        grad_q, sinks, weights[0], weights[1],
        softmax_scale, H, R, W - R, topk, kv.shape[0],
        grad_out.stride(0), grad_out.stride(1), q.stride(0), q.stride(1), kv.stride(0),
        indices.stride(0), out.stride(0), out.stride(1), lse.stride(0),
        0 if grad_lse is None else grad_lse.stride(0),
        DOT=triton_dtype(q.dtype), PRECISION="tf32x3" if target.backend == "cuda" else "ieee",
        ROWS=rows, KEYS=keys, WIDE=wide, BLOCKS=cdiv(R, wide), EVEN=R % wide == 0,
        D_TILE=max(next_power_of_2(W - R), 16),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def launch_pair(grad_out, q, topk_length, weights, shares):
    (S, H, W), R, topk = q.shape, grad_out.shape[-1], shares.shape[1]
    target = arch.of(q.device)
    heads, keys, warps, stages = pair_tile(target, q.dtype, H)
    pair_kernel[(S * cdiv(topk, keys), cdiv(W, COLUMNS))](
        grad_out, q, topk_length, weights[0], weights[1], shares, H, R, W, topk,
        grad_out.stride(0), grad_out.stride(1), q.stride(0), q.stride(1),
        PRECISION="tf32x3" if target.backend == "cuda" else "ieee",
        HEADS=heads, KEYS=keys, COLUMNS=COLUMNS, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def launch_sum(indices, topk_length, shares, total):
    topk, (Skv, W) = indices.shape[1], total.shape
    counts = (indices >= 0) & (indices < Skv)
    if topk_length is not None:
        counts &= torch.arange(topk, device=indices.device) < topk_length[:, None]
    row, pair = torch.where(counts, indices, Skv).flatten().sort(stable=True)
    bounds = torch.arange(Skv + 1, dtype=torch.int32, device=indices.device)
    starts = torch.searchsorted(row, bounds, out_int32=True)
    sum_kernel[(Skv, cdiv(W, COLUMNS))](
        shares, pair, starts, total, W, PAIRS=PAIRS, COLUMNS=COLUMNS, num_warps=2
    )


def query_tile(target, dtype: torch.dtype, H: int) -> tuple[int, ...]:
    """(rows, keys, wide, warps, stages) of `query_kernel`, made for 512 + 64 values a row."""
    nvidia, roomy = target.backend == "cuda", target.smem >= 160 << 10
    if dtype == torch.float32:
        return (16, 16, 64, 8, 1) if nvidia else (16, 16, 128, 4, 1)
    if not nvidia:
        return (16, 32, 128, 4, 2)
    return (32 if H > 16 and roomy else 16, 32, 128, 8, 2)  # 64 rows spill


def pair_tile(target, dtype: torch.dtype, H: int) -> tuple[int, ...]:
    """(heads, keys, warps, stages) of `pair_kernel`."""
    if dtype == torch.float32:
        return (16, 32, 8, 1)
    return (16 if H <= 16 else 32 if H <= 32 else 64, 128, 8, 2)


@triton.jit(do_not_specialize=["topk", "Skv"])
def query_kernel(
    grad_out_ptr, grad_lse_ptr, q_ptr, kv_ptr, indices_ptr, length_ptr, sink_ptr, out_ptr, lse_ptr,
    grad_q_ptr, sinks_ptr, weights_ptr, slopes_ptr,
    softmax_scale, H, R, D, topk, Skv,
    grad_out_query, grad_out_head, q_query, q_head, kv_row,
    indices_query, out_query, out_head, lse_query, grad_lse_query,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDE: tl.constexpr,
    BLOCKS: tl.constexpr, EVEN: tl.constexpr, D_TILE: tl.constexpr,
):  # fmt: skip
    """grad_q, p and grad_score of a tile of heads of one query."""
    tiles = tl.cdiv(H, ROWS)
    query = (tl.program_id(0) // tiles).to(tl.int64)
    head = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    known = (head < H)[:, None]
    length = length_of(length_ptr, query, topk)
    wide_head = head.to(tl.int64)[:, None]
    q_row = q_ptr + query * q_query + wide_head * q_head
    q_rope = load_rope(q_row + R, D, known, DOT, DOT, D_TILE)
    q_latent, grad_out, grad_q = (), (), ()  # BLOCKS of [ROWS, WIDE] each
    delta = tl.zeros((ROWS,), tl.float32)  # grad_out . out
    for j in tl.static_range(BLOCKS):
        q_latent = q_latent + (load_block(q_row, j, R, known, DOT, WIDE, EVEN),)
        grad_row = grad_out_ptr + query * grad_out_query + wide_head * grad_out_head
        grad_out = grad_out + (load_block(grad_row, j, R, known, DOT, WIDE, EVEN),)
        out_row = out_ptr + query * out_query + wide_head * out_head
        out = load_block(out_row, j, R, known, DOT, WIDE, EVEN).to(tl.float32)
        delta += tl.sum(grad_out[j].to(tl.float32) * out, 1)
        grad_q = grad_q + (tl.zeros((ROWS, WIDE), tl.float32),)
    grad_rope = tl.zeros((ROWS, D_TILE), tl.float32)
    lse = tl.load(lse_ptr + query * lse_query + head, mask=head < H, other=0.0) * LOG2_E
    share = share_beside_sink(sink_ptr, head, head < H, lse)
    slope = tl.zeros((ROWS,), tl.float32)  # of the scores by lse
    if grad_lse_ptr is not None:
        slope = tl.load(grad_lse_ptr + query * grad_lse_query + head, mask=head < H, other=0.0)

    indices_row = indices_ptr + query * indices_query
    pair_row = (query * H + head) * topk
    for start in range(0, length, KEYS):
        n = start + tl.arange(0, KEYS)
        row = tl.load(indices_row + n, mask=n < length, other=-1)
        present = (row >= 0) & (row < Skv)  # [KEYS]
        key_row = kv_ptr + (row.to(tl.int64) * kv_row)[:, None]
        rope = load_rope(key_row + R, D, present[:, None], DOT, DOT, D_TILE)
        scores = tl.dot(q_rope, tl.trans(rope), input_precision=PRECISION)
        grad_weights = tl.zeros((ROWS, KEYS), tl.float32)
        latent = ()  # BLOCKS of [KEYS, WIDE]
        for j in tl.static_range(BLOCKS):
            values = load_block(key_row, j, R, present[:, None], DOT, WIDE, EVEN)
            scores = tl.dot(q_latent[j], tl.trans(values), scores, input_precision=PRECISION)
            grad_weights = tl.dot(
                grad_out[j], tl.trans(values), grad_weights, input_precision=PRECISION
            )
            latent = latent + (values,)
        plain = tl.exp2(scores * (softmax_scale * LOG2_E) - lse[:, None])  # without sinks
        plain = tl.where(present[None, :], plain, 0.0)
        weights = plain * share[:, None]
        slopes = weights * (grad_weights - delta[:, None]) + plain * slope[:, None]
        slopes = (slopes * softmax_scale).to(DOT)
        inside = known & (n < length)[None, :]
        tl.store(weights_ptr + pair_row[:, None] + n, weights.to(DOT), mask=inside)
        tl.store(slopes_ptr + pair_row[:, None] + n, slopes, mask=inside)
        grad_rope = tl.dot(slopes, rope, grad_rope, input_precision=PRECISION)
        old = grad_q
        grad_q = ()
        for j in tl.static_range(BLOCKS):
            grad_q = grad_q + (tl.dot(slopes, latent[j], old[j], input_precision=PRECISION),)

    grad_q_row = grad_q_ptr + ((query * H + head) * (R + D))[:, None]
    for j in tl.static_range(BLOCKS):
        at = j * WIDE + tl.arange(0, WIDE)[None, :]
        tl.store(grad_q_row + at, grad_q[j].to(DOT), mask=known & ((at < R) | EVEN))
    column = tl.arange(0, D_TILE)[None, :]
    tl.store(grad_q_row + R + column, grad_rope.to(DOT), mask=known & (column < D))
    if sinks_ptr is not None:
        sink = tl.load(sink_ptr + head, mask=head < H, other=0.0) * LOG2_E
        # As 1 - share, without losing the digits of a sink far below lse.
        lost = tl.where(lse == float("-inf"), 0.0, 1.0 / (1.0 + tl.exp2(lse - sink)))
        tl.store(sinks_ptr + query * H + head, -lost * delta, mask=head < H)


@triton.jit(do_not_specialize=["topk"])
def pair_kernel(
    grad_out_ptr, q_ptr, length_ptr, weights_ptr, slopes_ptr, shares_ptr, H, R, W, topk,
    grad_out_query, grad_out_head, q_query, q_head,
    PRECISION: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The shares of KEYS indices of one query in COLUMNS columns of grad_kv."""
    tiles = tl.cdiv(topk, KEYS)
    query = (tl.program_id(0) // tiles).to(tl.int64)
    n = tl.program_id(0) % tiles * KEYS + tl.arange(0, KEYS)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    length = length_of(length_ptr, query, topk)
    if tl.program_id(0) % tiles * KEYS >= length:
        return
    share = tl.zeros((KEYS, COLUMNS), tl.float32)
    for start in range(0, H, HEADS):
        head = (start + tl.arange(0, HEADS)).to(tl.int64)[:, None]
        pair = (query * H + head) * topk + n[None, :]  # [HEADS, KEYS]
        inside = (head < H) & (n < length)[None, :]
        weights = tl.load(weights_ptr + pair, mask=inside, other=0.0)
        slopes = tl.load(slopes_ptr + pair, mask=inside, other=0.0)
        grad_at = grad_out_ptr + query * grad_out_query + head * grad_out_head + column
        grad_out = tl.load(grad_at, mask=(head < H) & (column < R), other=0.0)  # [HEADS, COLUMNS]
        q_at = q_ptr + query * q_query + head * q_head + column
        q = tl.load(q_at, mask=(head < H) & (column < W), other=0.0)
        share = tl.dot(tl.trans(weights), grad_out, share, input_precision=PRECISION)
        share = tl.dot(tl.trans(slopes), q, share, input_precision=PRECISION)
    at = shares_ptr + ((query * topk + n) * W)[:, None] + column
    tl.store(at, share, mask=(n < length)[:, None] & (column < W))


@triton.jit
def sum_kernel(
    shares_ptr, pair_ptr, starts_ptr, total_ptr, W, PAIRS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Adds to a row of the total the shares of its pairs, every PAIRS-th to the same sum."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    begin, end = tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)
    if begin >= end:
        return
    sums = tl.zeros((PAIRS, COLUMNS), tl.float32)
    for start in range(begin, end, PAIRS):
        i = start + tl.arange(0, PAIRS)
        pair = tl.load(pair_ptr + i, mask=i < end, other=0)
        inside = (i < end)[:, None] & (column < W)[None, :]
        sums += tl.load(shares_ptr + (pair * W)[:, None] + column, mask=inside, other=0.0)
    total = tl.load(total_ptr + row * W + column, mask=column < W, other=0.0)
    tl.store(total_ptr + row * W + column, total + tl.sum(sums, 0), mask=column < W)
