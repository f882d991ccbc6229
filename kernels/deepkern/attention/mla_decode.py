"""Attention of a few new queries per sequence over the paged latent cache, weights absorbed.

A cached token is one key for all heads, and its first R values are its value too:

    score[s, h, n] = softmax_scale * q[s, h] . cache[n]          over R + D
    out[s, h]      = softmax over the seen n of score . cache[n, :R]

Cut: the Sq * H queries of a sequence, which all read the same tokens, are rows of a tile; the
tokens are cut into splits, and a program takes one tile of rows over one split, reading each token
once for both products. Partial results are then combined in the order of the splits (splits.py).
Where the cuts fall depends on the sequence's own length alone, which a program reads for itself:
neither the batch nor the width of the block table can change a bit, and nothing is read back.

Up to about a hundred rows the speed is that of reading the cache, beyond that of the matrix units.

Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1; splitting as in Flash-Decoding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv, next_power_of_2
from ..runtime import arch
from ..runtime.contract import check_that
from ..runtime.op import op
from .cache import alignment, check_width, parts, strides
from .splits import LN_2, combine, length_of, split_length_of
from .token_tiles import attend, load_queries, store_results, tiles_of_zeros, token_at

LOG2_E = 1.4426950408889634


@op(
    q="real [B, Sq, H, W]",
    cache="real|uint8 [blocks, page, 1, _]",
    block_table="int32 [B, P]",
    cache_seqlens="int32 [B]",
)
def mla_decode(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    softmax_scale: float,
    causal: bool = True,
    v_head_dim: int = 512,
) -> tuple[Tensor, Tensor]:
    """Attends Sq new queries of each sequence to its tokens in the paged latent cache.

    Args:
        q: bf16, fp16 or fp32 [B, Sq, H, R + D]; the latent part has the key's up-projection
            absorbed. Any H and Sq, any strides but a contiguous last dimension.
        cache: as `mla_cache_append` writes it: [blocks, page, 1, R + D] bf16, fp16 or fp32, or
            the FP8 format uint8 [blocks, page, 1, R + 4 * ceil(R / 128) + 2 * D].
        block_table: int32 [B, P], the pages of each sequence, in order. The tokens of a page
            that is not in [0, blocks) count as absent. P * page is at most 2**30.
        cache_seqlens: int32 [B], tokens of each sequence, the Sq new ones included; taken as 0
            if negative, as P * page if larger.
        softmax_scale: multiplies the scores.
        causal: query s sees the first `cache_seqlens - (Sq - 1 - s)` tokens; otherwise all do.
        v_head_dim: R, how many of a token's values are its value.

    Returns:
        out: [B, Sq, H, R] in q's dtype; 0 where there is nothing to attend to.
        lse: fp32 [B, H, Sq], natural log of the sum of exponentials; -inf in that case.

    Accumulates in fp32. Tokens are multiplied in q's dtype if the cache has the same one, or if
    q is bf16 and the cache FP8; in fp32 otherwise, which is slow and exact.

    Raises:
        TypeError, ValueError: an argument is not as above; with DEEPKERN_DEBUG=1 also for lengths
            and page numbers out of range.
    """
    B, Sq, H, W = q.shape
    check_that("mla_decode", "v_head_dim", 0 <= v_head_dim <= W,
               f"a part of q's last dimension {W}", v_head_dim)  # fmt: skip
    check_width("mla_decode", cache, v_head_dim, W - v_head_dim)
    # Not 2**31: the end of a split that reaches past the sequence is computed in 32 bits.
    check_that("mla_decode", "block_table", block_table.shape[1] * cache.shape[1] <= 2**30,
               "at most 2**30 tokens a sequence",
               f"{block_table.shape[1]} pages of {cache.shape[1]}")  # fmt: skip
    check_that("mla_decode", "cache", cache.shape[1] * cache.stride(1) < 2**31,
               "pages of fewer than 2**31 elements", f"shape {tuple(cache.shape)}")  # fmt: skip
    out = q.new_empty(B, Sq, H, v_head_dim)
    return out, q.new_empty(B, H, Sq, dtype=torch.float32)


class Tile(NamedTuple):
    """How a launch is cut: rows and keys of a tile, latents multiplied at a time, and so on."""

    rows: int
    keys: int
    wide: int
    warps: int
    stages: int
    max_splits: int
    min_split: int = 512  # tokens: a split's result costs as much traffic as 3.6 tokens a row


@mla_decode.op.register_tile
def choose_tile(q, cache, block_table, cache_seqlens, softmax_scale, causal, v_head_dim) -> Tile:
    """The tile for these shapes; neither B nor the width of the table may decide it."""
    target = arch.of(q.device)
    total = q.shape[1] * q.shape[2]
    rows, keys, wide, warps, stages = _tile(target, dot_dtype(q, cache), cache.dtype, total)
    wide = max(min(wide, next_power_of_2(max(v_head_dim, 1))), 16)
    # Wider tokens than V3's 576 values need shorter tiles for the same shared memory.
    room = keys * 640
    while keys > 16 and keys * q.shape[3] > room:
        keys //= 2
    tiles = next_power_of_2(cdiv(max(total, 1), rows))
    # A lone long sequence gets as many programs as keep the memory busy, where that bounds it, and
    # otherwise about as many as there are multiprocessors.
    max_splits = 64 if tiles == 1 else max(128 // tiles, 8)
    return Tile(rows, keys, wide, warps, stages, max_splits, 512 if total <= 32 else 1024)


def _tile(target, dot: torch.dtype, cached: torch.dtype, total: int) -> tuple[int, ...]:
    """(rows, keys, wide, warps, stages) for `total` rows, made for 512 + 64 values a token."""
    nvidia, roomy = target.backend == "cuda", target.smem >= 160 << 10
    if dot == torch.float32:
        return (16, 16, 64, 8, 1) if nvidia else (16, 16, 128, 4, 1)
    if not nvidia:
        return (16 if total <= 16 or cached == torch.uint8 else 32, 32, 128, 4, 2)
    if cached == torch.uint8:
        # 32 and 64 rows spill: besides the results, they hold a scale for each key and block.
        return (16, 32, 128, 8 if target.name in ("sm_100", "sm_120") else 4, 2)
    if total <= 16:
        return (16, 64, 128, 4, 2)
    if total > 32 and target.wgmma:
        return (64, 32, 128, 8, 2)  # 64 keys spill
    return (32, 64 if roomy else 32, 128, 8, 2)


def dot_dtype(q: Tensor, cache: Tensor) -> torch.dtype:
    """What the products are taken in: the dtype of both operands, or one that holds both."""
    cached = rope_dtype(cache)
    return cached if q.dtype == cached else torch.float32


def rope_dtype(cache: Tensor) -> torch.dtype:
    return torch.bfloat16 if cache.dtype == torch.uint8 else cache.dtype


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return getattr(tl, str(dtype).removeprefix("torch."))


@mla_decode.op.register_launcher("triton")
def _launch_triton(q, cache, block_table, cache_seqlens, softmax_scale, causal, v_head_dim):
    args = q, cache, block_table, cache_seqlens, softmax_scale, causal, v_head_dim
    out, lse = mla_decode.op.allocate(*args)
    if lse.numel() == 0:
        return out, lse
    (B, Sq, H, W), R = q.shape, v_head_dim
    blocks, page = cache.shape[:2]
    capacity = block_table.shape[1] * page
    target = arch.of(q.device)
    t = choose_tile(*args)
    splits = max(min(cdiv(capacity, t.min_split), t.max_splits), 1)
    partial = partial_lse = None
    if splits > 1:
        partial = q.new_empty(B, splits, Sq * H, R, dtype=torch.float32)
        partial_lse = q.new_empty(B, splits, Sq * H, dtype=torch.float32)
    cached = parts(cache, R, torch.int32)
    mla_decode_kernel[(B * cdiv(Sq * H, t.rows), splits)](
        q, *cached, block_table, cache_seqlens, out, lse, partial, partial_lse,
        softmax_scale * LOG2_E, Sq, H, R, W - R, capacity, blocks, page,
        q.stride(0), q.stride(1), q.stride(2), block_table.stride(0), *strides(*cached),
        CAUSAL=causal, FP8=cache.dtype == torch.uint8,
        DOT=triton_dtype(dot_dtype(q, cache)), ROPE=triton_dtype(rope_dtype(cache)),
        LATENT_ALIGN=alignment(cached[0]), ROPE_ALIGN=alignment(cached[2]),
        PRECISION="tf32x3" if target.backend == "cuda" else "ieee",
        ROWS=t.rows, KEYS=t.keys, WIDE=t.wide, BLOCKS=cdiv(R, t.wide), EVEN=R % t.wide == 0,
        D_TILE=max(next_power_of_2(W - R), 16),
        MIN_SPLIT=t.min_split, MAX_SPLITS=t.max_splits,
        num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    if splits > 1:
        ROWS = 4
        combine[(B * cdiv(Sq * H, ROWS),)](
            partial, partial_lse, cache_seqlens, None, out, lse, Sq, H, R, capacity, splits,
            ROWS=ROWS, R_TILE=max(next_power_of_2(R), 1), KEYS=t.keys,
            MIN_SPLIT=t.min_split, MAX_SPLITS=t.max_splits, num_warps=4,
        )  # fmt: skip
    return out, lse


@triton.jit
def mla_decode_kernel(
    q_ptr, latent_ptr, scale_ptr, rope_ptr, table_ptr, length_ptr, out_ptr, lse_ptr,
    partial_ptr, partial_lse_ptr,
    score_scale, Sq, H, R, D, capacity, blocks, page,
    q_batch, q_query, q_head, table_stride,
    latent_block, latent_slot, scale_block, scale_slot, rope_block, rope_slot,
    CAUSAL: tl.constexpr, FP8: tl.constexpr,
    DOT: tl.constexpr, ROPE: tl.constexpr, PRECISION: tl.constexpr,
    LATENT_ALIGN: tl.constexpr, ROPE_ALIGN: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDE: tl.constexpr,
    BLOCKS: tl.constexpr, EVEN: tl.constexpr,
    D_TILE: tl.constexpr,
    MIN_SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(Sq * H, ROWS)
    sequence = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    length = length_of(length_ptr, sequence, capacity)
    split_length = split_length_of(length, KEYS, MIN_SPLIT, MAX_SPLITS)
    begin = split * split_length
    if (begin >= length) & (split > 0):
        return
    end = tl.minimum(begin + split_length, length)

    known = row < Sq * H
    query, head = (row // H).to(tl.int64), (row % H).to(tl.int64)
    q_row = q_ptr + sequence * q_batch + (query * q_query + head * q_head)[:, None]
    q = load_queries(q_row, R, D, known, DOT, WIDE, BLOCKS, EVEN, D_TILE)
    acc = tiles_of_zeros(BLOCKS, (ROWS, WIDE))
    used = tiles_of_zeros(BLOCKS if FP8 else 0, (ROWS, KEYS))
    limit = length - (Sq - 1 - row // H) if CAUSAL else tl.zeros_like(row) + length  # [ROWS]
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(begin, end, KEYS):
        key = start + tl.arange(0, KEYS)
        block = tl.load(table_ptr + sequence * table_stride + key // page, mask=key < end, other=-1)
        present = (block >= 0) & (block < blocks)  # [KEYS]
        token = token_at(
            latent_ptr, scale_ptr, rope_ptr, block, key % page,
            latent_block, latent_slot, scale_block, scale_slot, rope_block, rope_slot,
            LATENT_ALIGN, ROPE_ALIGN,
        )  # fmt: skip
        seen = present[None, :] & (key[None, :] < limit[:, None])
        acc, used, top, total = attend(
            acc, used, top, total, q, token, present, seen, score_scale, R, D,
            FP8, DOT, ROPE, PRECISION, WIDE, EVEN, D_TILE,
        )  # fmt: skip

    lse = tl.where(total == 0.0, float("-inf"), top + tl.log2(total))
    out_row = sequence * Sq * H + row
    partial_row = (sequence * tl.num_programs(1) + split) * Sq * H + row
    whole = split_length >= length  # the only split
    if whole:
        tl.store(lse_ptr + (sequence * H + head) * Sq + query, lse * LN_2, mask=known)
    elif partial_ptr is not None:
        tl.store(partial_lse_ptr + partial_row, lse, mask=known)
    store_results(
        out_ptr, partial_ptr, out_row, partial_row, known, whole, acc, used, total, None, R,
        WIDE, EVEN,
    )  # fmt: skip


@mla_decode.op.register_debug_check
def check_contents(q, cache, block_table, cache_seqlens, *_) -> None:
    blocks, page = cache.shape[:2]
    P = block_table.shape[1]
    wrong = cache_seqlens[(cache_seqlens < 0) | (cache_seqlens > P * page)]
    check_that("mla_decode", "cache_seqlens", wrong.numel() == 0,
               f"lengths in [0, {P * page}]", wrong[:1].tolist())  # fmt: skip
    first_token = torch.arange(P, device=q.device) * page
    used = block_table[first_token < cache_seqlens[:, None]]
    wrong = used[(used < 0) | (used >= blocks)]
    check_that("mla_decode", "block_table", wrong.numel() == 0,
               f"pages in [0, {blocks})", wrong[:1].tolist())  # fmt: skip


@mla_decode.op.register_limits("cuda")
def _unsupported_on_hopper(q, cache, block_table, cache_seqlens, softmax_scale, causal, v_head_dim):
    """What the `cuda` backend (csrc/sm90/mla_decode.cuh) does not serve, or None."""
    if q.dtype != torch.bfloat16 or cache.dtype not in (torch.bfloat16, torch.uint8):
        return (
            f"it supports q in bfloat16 and a bfloat16 or FP8 cache, not {q.dtype}, {cache.dtype}"
        )
    if q.shape[-1:] != (576,) or v_head_dim != 512:
        return f"it supports 512 + 64 values a token, not v_head_dim {v_head_dim} of {q.shape[-1:]}"
    strides = [stride * cache.element_size() for stride in cache.stride()[:2]]
    if cache.data_ptr() % 16 or any(stride % 16 for stride in strides):
        return f"it supports tokens at multiples of 16 bytes, not strides {strides} in bytes"
    return None
