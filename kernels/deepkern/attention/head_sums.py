"""The arithmetic of the lightning indexer, shared by its two kernels: how keys score for queries.

    sum[n, s] = Σ_h weights[s, h] · ReLU(kv[n] · q[s, h])

A tile multiplies KEYS keys (rows) by the heads of some queries (columns), each query's heads padded
to a power of two. Keys are the rows because a tensor core's result has a thread hold most heads of
a key and query, so the sum over heads is taken in registers, and needs no more than two shuffles.
Its order is fixed: neighbours by a multiplication and a fused multiply-add, then halves onto halves
(and where HEADS is less than H, such sums in turn). Hence a query's bits depend on no other query
and not on how many a tile takes. Launch with `enable_fp_fusion=False`.

Source: DeepSeek-V3.2 (arXiv 2512.02556), section 2.1; DeepGEMM has the keys as rows, too.
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

WIDE = 128  # of the head dimension, multiplied at a time

# (keys, columns, warps, stages) that compile without spills: where one product takes all heads and
# all of D, and where sums over parts, or the addresses of single bytes, take registers too.
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
    """How a launch is cut."""

    keys: int
    queries: int
    heads: int  # of a query, multiplied at a time
    wide: int  # of the head dimension, multiplied at a time
    warps: int
    stages: int


def tile_for(target: Arch, H: int, D: int, most: int) -> Tile:
    """The tile for H heads of D values, at most `most` queries wide."""
    at_once, in_parts = TILES[target.name]
    keys, columns, warps, stages = at_once
    if at_once[1] < H or D > WIDE or D % 16:
        keys, columns, warps, stages = in_parts
    heads = min(max(next_power_of_2(H), 2), columns)
    wide = min(max(next_power_of_2(D), 32), WIDE)
    queries = max(min(columns // heads, most), 16 // heads, 1)
    return Tile(keys, queries, heads, wide, warps, stages)


def check_queries(op: str, q: Tensor) -> None:
    """Raises ValueError unless the heads of a query are in reach of 32-bit offsets."""
    check_that(op, "q", (q.shape[-2] - 1) * q.stride(-2) < 2**31,
               "heads within 2**31 elements", f"strides {q.stride()}")  # fmt: skip


@triton.jit
def load_queries(q, H, D, first_head, first, HEADS: tl.constexpr, WIDE: tl.constexpr):
    """[QUERIES * HEADS, WIDE] of q from that head and column on; zeros outside."""
    QUERIES: tl.constexpr = q[0].shape[0]
    head = first_head + tl.arange(0, HEADS)
    column = (first + tl.arange(0, WIDE))[None, None, :]
    at = q[0][:, None, None] + head[None, :, None] * q[2] + column
    inside = q[1][:, None, None] & (head < H)[None, :, None] & (column < D)
    return tl.reshape(tl.load(at, mask=inside, other=0.0), (QUERIES * HEADS, WIDE))


@triton.jit
def load_weights(weights, H, first_head, HEADS: tl.constexpr):
    """The weights of even and of odd heads, [QUERIES, HEADS / 2] each; zeros outside."""
    even = first_head + 2 * tl.arange(0, HEADS // 2)[None, :]
    at, known = weights[0][:, None] + even, weights[1][:, None]
    return (tl.load(at, mask=known & (even < H), other=0.0),
            tl.load(at + 1, mask=known & (even + 1 < H), other=0.0))  # fmt: skip


@triton.jit
def load_keys(kv_row, present, D, first, WIDE: tl.constexpr):
    """[KEYS, WIDE] of the keys from that column on; zeros outside."""
    column = (first + tl.arange(0, WIDE))[None, :]
    return tl.load(kv_row[:, None] + column, mask=present[:, None] & (column < D), other=0.0)


@triton.jit
def head_sums(
    kv_row, present, q, weights, held, H, D,
    HEADS: tl.constexpr, WIDE: tl.constexpr, WHOLE: tl.constexpr, NATIVE_FP8: tl.constexpr,
):  # fmt: skip
    """fp32 [KEYS, QUERIES]: the sums of the keys that start at `kv_row`, where `present`.

    q, weights: (where each query's begin, whether it exists), q also the stride of heads.
    held: with WHOLE (one product takes all H and D), what `load_queries`, as a matrix operand, and
    `load_weights` give; otherwise they are loaded here, part by part.
    """
    KEYS: tl.constexpr = kv_row.shape[0]
    QUERIES: tl.constexpr = q[0].shape[0]
    if WHOLE:
        kv = matrix_operand(load_keys(kv_row, present, D, 0, WIDE), NATIVE_FP8)
        total = weighted_relu(tl.dot(kv, held[0].T), held[1], held[2])
    else:
        total = tl.zeros((KEYS, QUERIES), tl.float32)
        for first_head in range(0, H, HEADS):
            products = tl.zeros((KEYS, QUERIES * HEADS), tl.float32)
            for first in range(0, D, WIDE):
                kv = matrix_operand(load_keys(kv_row, present, D, first, WIDE), NATIVE_FP8)
                part = load_queries(q, H, D, first_head, first, HEADS, WIDE)
                products += tl.dot(kv, matrix_operand(part, NATIVE_FP8).T)
            even, odd = load_weights(weights, H, first_head, HEADS)
            total += weighted_relu(products, even, odd)
    return total


@triton.jit
def weighted_relu(products, even, odd):
    """Σ_h weights[s, h] · ReLU(products[n, s, h]), with NaN kept: [KEYS, QUERIES]."""
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
