"""Shared by `mqa_logits` and `paged_mqa_logits`: the score of a tile of keys for some queries.

    sum[n, s] = Σ_h weights[s, h] · ReLU(kv[n] · q[s, h])

Parallelization: one call computes the scores of KEYS keys for QUERIES queries in one program. It
multiplies the keys (rows) by the heads of all queries (columns); the heads of each query are padded
to HEADS, a power of two. With keys as rows, one thread holds most heads of a key and query in the
tensor core's result, so the sum over heads needs registers and at most two shuffles.

The order of the sum is fixed: pairs of neighbours by a multiplication and a fused multiply-add,
then the second half onto the first. If HEADS is less than H, these sums are added one after
another. So the bits of a query depend neither on other queries nor on QUERIES. The kernels are
compiled with `enable_fp_fusion=False`, because fusion could change the order.

Limit: see mqa_logits.py and paged_mqa_logits.py.

Source: DeepSeek-V3.2 (arXiv 2512.02556), section 2.1; DeepGEMM, which has keys as rows, too.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import next_power_of_2
from ..quant.fp8 import matrix_operand
from ..runtime.arch import Arch
from ..runtime.contract import check_that

MAX_D_BLOCK = 128  # columns of the head dimension per product

# Tiles that compile without spills, as (keys, columns, warps, stages). First: one product computes
# all heads and all of D. Second: sums over several products, or byte addresses, need registers too.
TILES = {
    "sm_80": ((64, 64, 4, 3), (64, 64, 8, 3)),
    "sm_89": ((64, 128, 4, 3), (64, 64, 8, 3)),
    "sm_90": ((64, 256, 4, 3), (64, 128, 4, 3)),
    "sm_100": ((64, 128, 4, 3), (64, 64, 4, 3)),
    "sm_120": ((64, 128, 4, 3), (64, 64, 4, 3)),
    "gfx942": ((64, 64, 4, 2), (64, 64, 4, 2)),
    "gfx950": ((64, 128, 4, 2), (64, 64, 4, 2)),
}


class Tile(NamedTuple):
    """The tile of one program, and how it is compiled."""

    keys: int
    queries: int
    heads: int  # of a query, per product
    d_block: int  # columns of the head dimension, per product
    warps: int
    stages: int

    def options(self, H: int, D: int) -> dict[str, object]:
        """The compile-time arguments of a kernel for H heads of D values."""
        return {
            "KEYS": self.keys,
            "QUERIES": self.queries,
            "HEADS": self.heads,
            "D_BLOCK": self.d_block,
            "ONE_PRODUCT": self.heads >= H and self.d_block >= D,
            "num_warps": self.warps,
            "num_stages": self.stages,
            "enable_fp_fusion": False,
        }


class QueryRows(NamedTuple):
    """The queries of a program and their weights."""

    q_ptrs: tl.tensor  # [QUERIES], pointers to head 0: FP8 or its bytes [H, D]
    weight_ptrs: tl.tensor  # [QUERIES], pointers to fp32 [H]
    mask: tl.tensor  # [QUERIES]
    head_stride: tl.tensor  # of q, elements
    H: tl.tensor
    D: tl.tensor


def choose_query_tile(target: Arch, H: int, D: int, max_queries: int) -> Tile:
    """The tile for H heads of D values, with at most `max_queries` queries."""
    one_product, several_products = TILES[target.name]
    keys, columns, warps, stages = one_product
    if columns < H or D > MAX_D_BLOCK or D % 16:
        keys, columns, warps, stages = several_products
    heads = min(max(next_power_of_2(H), 2), columns)
    d_block = min(max(next_power_of_2(D), 32), MAX_D_BLOCK)
    queries = max(min(columns // heads, max_queries), 16 // heads, 1)
    return Tile(keys, queries, heads, d_block, warps, stages)


def check_queries(op: str, q: Tensor) -> None:
    """Raises ValueError if offsets of heads within a query exceed 32 bits."""
    check_that(op, "q", (q.shape[-2] - 1) * q.stride(-2) < 2**31,
               "heads within 2**31 elements", f"strides {q.stride()}")  # fmt: skip


@triton.jit
def load_query_block(
    queries,  # QueryRows
    first_head,
    first_column,
    HEADS: tl.constexpr,
    D_BLOCK: tl.constexpr,
):
    """A block of q: [QUERIES * HEADS, D_BLOCK]; zeros outside."""
    QUERIES: tl.constexpr = queries.mask.shape[0]
    head = first_head + tl.arange(0, HEADS)
    column = (first_column + tl.arange(0, D_BLOCK))[None, None, :]
    ptrs = queries.q_ptrs[:, None, None] + head[None, :, None] * queries.head_stride + column
    head_mask = (head < queries.H)[None, :, None]
    mask = queries.mask[:, None, None] & head_mask & (column < queries.D)
    return tl.reshape(tl.load(ptrs, mask=mask, other=0.0), (QUERIES * HEADS, D_BLOCK))


@triton.jit
def load_weights(queries, first_head, HEADS: tl.constexpr):
    """The weights of even and of odd heads: two of fp32 [QUERIES, HEADS / 2]; zeros outside."""
    even = first_head + 2 * tl.arange(0, HEADS // 2)[None, :]
    ptrs, mask = queries.weight_ptrs[:, None] + even, queries.mask[:, None]
    return (tl.load(ptrs, mask=mask & (even < queries.H), other=0.0),
            tl.load(ptrs + 1, mask=mask & (even + 1 < queries.H), other=0.0))  # fmt: skip


@triton.jit
def preload_queries(
    queries,  # QueryRows
    HEADS: tl.constexpr,
    D_BLOCK: tl.constexpr,
    ONE_PRODUCT: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
):
    """With ONE_PRODUCT all of q, as a matrix operand, and the weights, for `head_sums`; else ()."""
    preloaded = ()
    if ONE_PRODUCT:
        values = matrix_operand(load_query_block(queries, 0, 0, HEADS, D_BLOCK), NATIVE_FP8)
        preloaded = (values,) + load_weights(queries, 0, HEADS)
    return preloaded


@triton.jit
def load_keys(
    key_ptrs,  # [KEYS], pointers to rows of D values
    key_mask,  # [KEYS]
    D,
    first_column,
    D_BLOCK: tl.constexpr,
):
    """A block of the keys: [KEYS, D_BLOCK]; zeros outside."""
    column = (first_column + tl.arange(0, D_BLOCK))[None, :]
    return tl.load(key_ptrs[:, None] + column, mask=key_mask[:, None] & (column < D), other=0.0)


@triton.jit
def head_sums(
    key_ptrs,  # [KEYS], pointers to FP8 rows of D values, or their bytes
    key_mask,  # [KEYS]; other keys load as 0, so NaN in them cannot propagate
    queries,  # QueryRows
    preloaded,  # of preload_queries
    HEADS: tl.constexpr,
    D_BLOCK: tl.constexpr,
    ONE_PRODUCT: tl.constexpr,  # one product computes all H heads and all of D
    NATIVE_FP8: tl.constexpr,
):
    """The sums over heads: fp32 [KEYS, QUERIES]."""
    KEYS: tl.constexpr = key_ptrs.shape[0]
    QUERIES: tl.constexpr = queries.mask.shape[0]
    if ONE_PRODUCT:
        q, even, odd = preloaded
        kv = matrix_operand(load_keys(key_ptrs, key_mask, queries.D, 0, D_BLOCK), NATIVE_FP8)
        acc = weighted_relu(tl.dot(kv, q.T), even, odd)
    else:
        acc = tl.zeros((KEYS, QUERIES), tl.float32)
        for first_head in range(0, queries.H, HEADS):
            products = tl.zeros((KEYS, QUERIES * HEADS), tl.float32)
            for first_column in range(0, queries.D, D_BLOCK):
                kv = load_keys(key_ptrs, key_mask, queries.D, first_column, D_BLOCK)
                kv = matrix_operand(kv, NATIVE_FP8)
                q = load_query_block(queries, first_head, first_column, HEADS, D_BLOCK)
                products += tl.dot(kv, matrix_operand(q, NATIVE_FP8).T)
            even, odd = load_weights(queries, first_head, HEADS)
            acc += weighted_relu(products, even, odd)
    return acc


@triton.jit
def weighted_relu(
    products,  # fp32 [KEYS, QUERIES * HEADS]
    even,  # weights of even heads, fp32 [QUERIES, HEADS / 2]
    odd,  # weights of odd heads
):
    """Σ_h weights[s, h] · ReLU(products[n, s, h]): [KEYS, QUERIES]. NaN propagates."""
    KEYS: tl.constexpr = products.shape[0]
    QUERIES: tl.constexpr = even.shape[0]
    PAIRS: tl.constexpr = even.shape[1]
    a, b = tl.split(tl.reshape(products, (KEYS, QUERIES, PAIRS, 2)))
    a = tl.maximum(a, 0.0, propagate_nan=tl.PropagateNan.ALL)
    b = tl.maximum(b, 0.0, propagate_nan=tl.PropagateNan.ALL)
    even, odd = tl.broadcast_to(even[None], a.shape), tl.broadcast_to(odd[None], a.shape)
    x = tl.fma(a, even, b * odd)  # [KEYS, QUERIES, PAIRS]
    for i in tl.static_range(1, 32):
        if (PAIRS >> i) > 0:
            x = tl.sum(tl.reshape(x, (KEYS, QUERIES, 2, PAIRS >> i)), 2)
    return tl.reshape(x, (KEYS, QUERIES))


@triton.jit
def store_logits(
    out_ptrs,  # [1, QUERIES], pointers to rows of fp32 `width`
    key,  # [KEYS], columns of the rows
    width,
    query_mask,  # [QUERIES]
    sums,  # [KEYS, QUERIES], of head_sums
    scale,  # fp32 [KEYS], of the keys
    attn_mask,  # [KEYS, QUERIES]; other logits are -inf
):
    """Writes the logits of a tile of keys."""
    logits = tl.where(attn_mask, sums * scale[:, None], float("-inf"))
    mask = (key < width)[:, None] & query_mask[None, :]
    tl.store(out_ptrs + key.to(tl.int64)[:, None], logits, mask=mask)


@triton.jit
def fill_with_neg_inf(
    out_ptrs,  # [1, QUERIES], pointers to rows of fp32 `width`
    begin,
    end,
    width,
    query_mask,  # [QUERIES]
    KEYS: tl.constexpr,
):
    """Writes -inf to whole tiles of KEYS keys, the last one of which contains key end - 1."""
    for n in range(begin, end, KEYS):
        key = (n + tl.arange(0, KEYS))[:, None]
        values = tl.full((KEYS, query_mask.shape[0]), float("-inf"), tl.float32)
        mask = (key < width) & query_mask[None, :]
        tl.store(out_ptrs + key.to(tl.int64), values, mask=mask)
