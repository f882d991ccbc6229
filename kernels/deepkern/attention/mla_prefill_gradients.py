"""The two kernels of `mla_prefill_backward` that multiply; see there.

Both compute scores and dS for tiles of queries and keys: `key_kernel` with the keys as rows of
every product, so that P^T and dS^T are left operands as they come out, `query_kernel` with the
queries.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .mla_prefill import LOG2_E, visible_keys
from .ragged import (
    add_products,
    dot_parts,
    load_parts,
    scaled_parts,
    store_parts,
    tile_at,
    zero_parts,
)


@triton.jit(do_not_specialize=["T", "tiles", "lse_head"])
def key_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, tiles_ptr, grad_k_ptr, grad_v_ptr,
    score_scale, softmax_scale, T, Hk, group, tiles, Dqk, Dv,
    grad_row, grad_head, q_row, q_head, k_row, k_head, v_row, v_head, lse_head,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    EVEN_QK: tl.constexpr, EVEN_V: tl.constexpr,
):  # fmt: skip
    """grad_k and grad_v of BLOCK_N keys of one head of k and v."""
    shared = (tl.program_id(0) // tiles).to(tl.int64)
    first, end, q_begin, q_end = tile_at(tiles_ptr, tl.program_id(0) % tiles)
    if first >= end:
        return
    key = first + tl.arange(0, BLOCK_N)
    known = key < end
    k = load_parts(k_ptr + shared * k_head, key, k_row, known, Dqk, True, EVEN_QK, D0, D1)
    v = load_parts(v_ptr + shared * v_head, key, v_row, known, Dv, True, EVEN_V, V0, V1)

    # A key is seen by the rows from its `since` on; by all of a tile of rows from `full` on.
    since = tl.zeros_like(key) + q_begin
    begin, full = q_begin, q_begin
    if CAUSAL:
        shift = end - q_end  # both sequences end together
        since = key - shift
        begin += tl.maximum(first - shift - q_begin, 0) // BLOCK_M * BLOCK_M
        full += tl.cdiv(tl.maximum(first + BLOCK_N - 1 - shift - q_begin, 0), BLOCK_M) * BLOCK_M
    grad_k, grad_v = zero_parts(BLOCK_N, D0, D1), zero_parts(BLOCK_N, V0, V1)
    for member in range(group):
        head = shared * group + member
        q_of_head, grad_of_head = q_ptr + head * q_head, grad_out_ptr + head * grad_head
        lse_of_head, delta_of_head = lse_ptr + head * lse_head, delta_ptr + head * T
        if CAUSAL:
            grad_k, grad_v = gather(
                grad_k, grad_v, k, v, q_of_head, grad_of_head, lse_of_head, delta_of_head,
                begin, tl.minimum(full, q_end), since, q_end, score_scale, q_row, grad_row, Dqk, Dv,
                True, PRECISION, BLOCK_M, D0, D1, V0, V1, EVEN_QK, EVEN_V,
            )  # fmt: skip
        grad_k, grad_v = gather(
            grad_k, grad_v, k, v, q_of_head, grad_of_head, lse_of_head, delta_of_head,
            full, q_end, since, q_end, score_scale, q_row, grad_row, Dqk, Dv,
            False, PRECISION, BLOCK_M, D0, D1, V0, V1, EVEN_QK, EVEN_V,
        )  # fmt: skip
    grad_k = scaled_parts(grad_k, softmax_scale)
    store_parts(grad_k_ptr + shared * Dqk, key, Hk * Dqk, known, Dqk, grad_k, EVEN_QK, D0)
    store_parts(grad_v_ptr + shared * Dv, key, Hk * Dv, known, Dv, grad_v, EVEN_V, V0)


@triton.jit
def gather(
    grad_k, grad_v, k, v, q_ptr, grad_out_ptr, lse_ptr, delta_ptr,
    begin, end, since, q_end, score_scale, q_row, grad_row, Dqk, Dv,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    EVEN_QK: tl.constexpr, EVEN_V: tl.constexpr,
):  # fmt: skip
    """Adds what the rows from `begin` to `end` give to the gradients of a tile of keys."""
    for start in range(begin, end, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        present = row < q_end
        q = load_parts(q_ptr, row, q_row, present, Dqk, True, EVEN_QK, D0, D1)
        grad_out = load_parts(grad_out_ptr, row, grad_row, present, Dv, True, EVEN_V, V0, V1)
        lse, delta = of_rows(lse_ptr, delta_ptr, row, present)
        weights = tl.exp2(dot_parts(k, q, PRECISION) * score_scale - lse[None, :])  # [N, M]
        if MASKED:
            weights = tl.where(row[None, :] >= since[:, None], weights, 0.0)
        grad_v = add_products(grad_v, weights.to(k[0].dtype), grad_out, PRECISION)
        grad_scores = weights * (dot_parts(v, grad_out, PRECISION) - delta[None, :])
        grad_k = add_products(grad_k, grad_scores.to(k[0].dtype), q, PRECISION)
    return grad_k, grad_v


@triton.jit
def of_rows(lse_ptr, delta_ptr, row, present):
    """lse to base 2 and delta of rows; where nothing is seen, an lse that makes all weights 0."""
    lse = tl.load(lse_ptr + row, mask=present, other=float("-inf")) * LOG2_E
    delta = tl.load(delta_ptr + row, mask=present, other=0.0)
    return tl.where(lse == float("-inf"), float("inf"), lse), delta


@triton.jit(do_not_specialize=["T", "tiles", "lse_head"])
def query_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, tiles_ptr, grad_q_ptr,
    score_scale, softmax_scale, T, H, group, tiles, Dqk, Dv,
    grad_row, grad_head, q_row, q_head, k_row, k_head, v_row, v_head, lse_head,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    EVEN_QK: tl.constexpr, EVEN_V: tl.constexpr,
):  # fmt: skip
    """grad_q of BLOCK_M queries of one head."""
    head = (tl.program_id(0) // tiles).to(tl.int64)
    first, end, k_begin, k_end = tile_at(tiles_ptr, tl.program_id(0) % tiles)
    if first >= end:
        return
    row = first + tl.arange(0, BLOCK_M)
    known = row < end
    grad_out_ptr += head * grad_head
    q = load_parts(q_ptr + head * q_head, row, q_row, known, Dqk, True, EVEN_QK, D0, D1)
    grad_out = load_parts(grad_out_ptr, row, grad_row, known, Dv, True, EVEN_V, V0, V1)
    lse, delta = of_rows(lse_ptr + head * lse_head, delta_ptr + head * T, row, known)
    k_ptr += head // group * k_head
    v_ptr += head // group * v_head
    limit, full, stop = visible_keys(row, first, end, k_begin, k_end, CAUSAL, BLOCK_M, BLOCK_N)
    grad_q = zero_parts(BLOCK_M, D0, D1)
    if q[0].dtype == tl.float32:
        full = k_begin  # masks throughout: there are no registers for two loops
    else:
        grad_q = spread(
            grad_q, q, grad_out, lse, delta, k_ptr, v_ptr, k_begin, full, limit, k_end, score_scale,
            k_row, v_row, Dqk, Dv, False, PRECISION, BLOCK_N, D0, D1, V0, V1, EVEN_QK, EVEN_V,
        )  # fmt: skip
    grad_q = spread(
        grad_q, q, grad_out, lse, delta, k_ptr, v_ptr, full, stop, limit, k_end, score_scale,
        k_row, v_row, Dqk, Dv, True, PRECISION, BLOCK_N, D0, D1, V0, V1, EVEN_QK, EVEN_V,
    )  # fmt: skip
    grad_q = scaled_parts(grad_q, softmax_scale)
    store_parts(grad_q_ptr + head * Dqk, row, H * Dqk, known, Dqk, grad_q, EVEN_QK, D0)


@triton.jit
def spread(
    grad_q, q, grad_out, lse, delta, k_ptr, v_ptr, begin, end, limit, k_end, score_scale,
    k_row, v_row, Dqk, Dv,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    EVEN_QK: tl.constexpr, EVEN_V: tl.constexpr,
):  # fmt: skip
    """Adds what the keys from `begin` to `end` give to the gradient of a tile of queries."""
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        present = key < k_end
        k = load_parts(k_ptr, key, k_row, present, Dqk, MASKED, EVEN_QK, D0, D1)
        v = load_parts(v_ptr, key, v_row, present, Dv, MASKED, EVEN_V, V0, V1)
        weights = tl.exp2(dot_parts(q, k, PRECISION) * score_scale - lse[:, None])  # [M, N]
        if MASKED:
            weights = tl.where(key[None, :] < limit[:, None], weights, 0.0)
        grad_scores = weights * (dot_parts(grad_out, v, PRECISION) - delta[:, None])
        grad_q = add_products(grad_q, grad_scores.to(q[0].dtype), k, PRECISION)
    return grad_q
