"""Attention of queries over cached tokens that they name by index: what the sparse ops share.

    score[h, n] = softmax_scale * q[h] . token[indices[n]]          over R + D
    out[h]      = softmax over n of score . token[indices[n], :R], times the share beside a sink

`mla_sparse_prefill` is `mla_sparse_decode` with one query a sequence and pages of one token, so
both launch this kernel. Cut: the H heads of a query, which read the same tokens, are rows of a
tile; a program takes one tile of rows over one split of the indices and reads each token once, as
key and as value. Splits are combined as `mla_decode` does; where they fall depends on the query's
own length and on H alone.

With 64 rows a program does 64 * 2 * 1088 operations for a token of 1152 or 656 bytes, which is
about what a Hopper GPU needs to be bound by its matrix units; with fewer, reading bounds it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv, next_power_of_2
from ..runtime import arch
from ..runtime.contract import check_that
from .cache import alignment, parts, strides
from .mla_decode import LOG2_E, Tile, dot_dtype, rope_dtype, triton_dtype
from .splits import LN_2, combine, length_of, share_beside_sink, split_length_of
from .token_tiles import attend as attend_tile
from .token_tiles import load_queries, store_results, tiles_of_zeros, token_at

MAX_SPLITS = 8


def min_split(H: int) -> int:
    """Indices in a split at least: its partial result costs 4 to 7 tokens a head of traffic."""
    return min(max(8 * next_power_of_2(max(H, 1)), 256), 1024)


def choose_tile(q: Tensor, cache: Tensor, v_head_dim: int) -> Tile:
    """The tile for these widths and H heads; how many queries there are may not decide it."""
    target = arch.of(q.device)
    H, W = q.shape[-2:]
    rows, keys, wide, warps, stages = _tile(target, dot_dtype(q, cache), cache.dtype, H)
    wide = max(min(wide, next_power_of_2(max(v_head_dim, 1))), 16)
    # Wider tokens than V3's 576 values need shorter tiles for the same shared memory.
    room = keys * 640
    while keys > 16 and keys * W > room:
        keys //= 2
    return Tile(rows, keys, wide, warps, stages, MAX_SPLITS)


def _tile(target, dot: torch.dtype, cached: torch.dtype, H: int) -> tuple[int, ...]:
    """(rows, keys, wide, warps, stages) for H heads, made for 512 + 64 values a token."""
    nvidia, roomy = target.backend == "cuda", target.smem >= 160 << 10
    if dot == torch.float32:
        return (16, 16, 64, 8, 1) if nvidia else (16, 16, 128, 4, 1)
    if not nvidia:
        return (16 if H <= 16 or cached == torch.uint8 else 32, 32, 128, 4, 2)
    if cached == torch.uint8:  # 64 rows spill, on sm_120 also 32
        rows = 16 if H <= 16 or target.name == "sm_120" else 32
        return (rows, 64 if roomy else 32, 128, 8, 2)
    if H <= 16:
        return (16, 64, 128, 4, 2)
    if H > 32 and target.wgmma:
        return (64, 32, 128, 8, 2)  # 64 keys spill
    return (32, 64 if roomy else 32, 128, 8, 2)


def attend(
    q: Tensor,
    cache: Tensor,
    indices: Tensor,
    softmax_scale: float,
    topk_length: Tensor | None,
    attn_sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
    max_logits: Tensor | None = None,
    max_splits: int = MAX_SPLITS,
) -> None:
    """Launches the kernels: q [B, Sq, H, R + D], indices [B, Sq, topk], topk_length [B].

    Writes out [B, Sq, H, R], lse and max_logits [B, H, Sq].
    """
    if lse.numel() == 0:
        return
    (B, Sq, H, W), R, topk = q.shape, out.shape[-1], indices.shape[-1]
    blocks, page = cache.shape[:2]
    target = arch.of(q.device)
    t = choose_tile(q, cache, R)
    least = min_split(H)
    splits = max(min(cdiv(topk, least), max_splits), 1)
    partial = partial_lse = None
    if splits > 1:
        partial = q.new_empty(B, splits, Sq * H, R, dtype=torch.float32)
        partial_lse = q.new_empty(B, splits, Sq * H, dtype=torch.float32)
    cached = parts(cache, R, torch.int32)
    mla_sparse_attention_kernel[(B * Sq * cdiv(H, t.rows), splits)](
        q, *cached, indices, topk_length, attn_sink, out, lse, max_logits, partial, partial_lse,
        softmax_scale * LOG2_E, Sq, H, R, W - R, topk, blocks * page, page,
        q.stride(0), q.stride(1), q.stride(2), indices.stride(0), indices.stride(1),
        *strides(*cached),
        FP8=cache.dtype == torch.uint8,
        DOT=triton_dtype(dot_dtype(q, cache)), ROPE=triton_dtype(rope_dtype(cache)),
        LATENT_ALIGN=alignment(cached[0]), ROPE_ALIGN=alignment(cached[2]),
        PRECISION="tf32x3" if target.backend == "cuda" else "ieee",
        ROWS=t.rows, KEYS=t.keys, WIDE=t.wide, BLOCKS=cdiv(R, t.wide), EVEN=R % t.wide == 0,
        D_TILE=max(next_power_of_2(W - R), 16),
        MIN_SPLIT=least, MAX_SPLITS=max_splits,
        num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    if splits > 1:
        ROWS = 4
        combine[(B * cdiv(Sq * H, ROWS),)](
            partial, partial_lse, topk_length, attn_sink, out, lse, Sq, H, R, topk, splits,
            ROWS=ROWS, R_TILE=max(next_power_of_2(R), 1), KEYS=t.keys,
            MIN_SPLIT=least, MAX_SPLITS=max_splits, num_warps=4,
        )  # fmt: skip


@triton.jit(do_not_specialize=["topk"])
def mla_sparse_attention_kernel(
    q_ptr, latent_ptr, scale_ptr, rope_ptr, indices_ptr, length_ptr, sink_ptr,
    out_ptr, lse_ptr, max_ptr, partial_ptr, partial_lse_ptr,
    score_scale, Sq, H, R, D, topk, slots, page,
    q_batch, q_query, q_head, indices_batch, indices_query,
    latent_block, latent_slot, scale_block, scale_slot, rope_block, rope_slot,
    FP8: tl.constexpr, DOT: tl.constexpr, ROPE: tl.constexpr,
    LATENT_ALIGN: tl.constexpr, ROPE_ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDE: tl.constexpr,
    BLOCKS: tl.constexpr, EVEN: tl.constexpr, D_TILE: tl.constexpr,
    MIN_SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    # Tiles of one query run side by side, so that its tokens come from memory once.
    tiles = tl.cdiv(H, ROWS)
    number = tl.program_id(0) // tiles
    sequence, query = (number // Sq).to(tl.int64), (number % Sq).to(tl.int64)
    head = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    length = length_of(length_ptr, sequence, topk)
    split_length = split_length_of(length, KEYS, MIN_SPLIT, MAX_SPLITS)
    begin = split * split_length
    if (begin >= length) & (split > 0):
        return
    end = tl.minimum(begin + split_length, length)

    known = head < H
    q_row = q_ptr + sequence * q_batch + query * q_query + (head.to(tl.int64) * q_head)[:, None]
    q = load_queries(q_row, R, D, known, DOT, WIDE, BLOCKS, EVEN, D_TILE)
    acc = tiles_of_zeros(BLOCKS, (ROWS, WIDE))
    used = tiles_of_zeros(BLOCKS if FP8 else 0, (ROWS,))
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    indices_row = indices_ptr + sequence * indices_batch + query * indices_query
    n = begin + tl.arange(0, KEYS)
    next_slot = tl.load(indices_row + n, mask=n < end, other=-1)
    for start in range(begin, end, KEYS):
        # Read a step ahead: the tokens' addresses hang on it.
        slot = next_slot
        n = start + KEYS + tl.arange(0, KEYS)
        next_slot = tl.load(indices_row + n, mask=n < end, other=-1)
        present = (slot >= 0) & (slot < slots)  # [KEYS]
        token = token_at(
            latent_ptr, scale_ptr, rope_ptr, slot // page, slot % page,
            latent_block, latent_slot, scale_block, scale_slot, rope_block, rope_slot,
            LATENT_ALIGN, ROPE_ALIGN,
        )  # fmt: skip
        acc, used, top, total = attend_tile(
            acc, used, top, total, q, token, present, present[None, :], score_scale, R, D,
            FP8, DOT, ROPE, PRECISION, WIDE, EVEN, D_TILE,
        )  # fmt: skip

    lse = tl.where(total == 0.0, float("-inf"), top + tl.log2(total))
    whole = split_length >= length  # the only split
    row = (sequence * Sq + query) * H + head
    partial_row = (sequence * tl.num_programs(1) + split) * Sq * H + query * H + head
    if whole:
        at = (sequence * H + head) * Sq + query
        tl.store(lse_ptr + at, lse * LN_2, mask=known)
        if max_ptr is not None:
            tl.store(max_ptr + at, top * LN_2, mask=known)
    elif partial_ptr is not None:
        tl.store(partial_lse_ptr + partial_row, lse, mask=known)
    share = share_beside_sink(sink_ptr, head, known, lse)
    store_results(
        out_ptr, partial_ptr, row, partial_row, known, whole, acc, used, total, share, R, WIDE, EVEN
    )


def check_indices(op: str, indices: Tensor, topk_length: Tensor | None, slots: int) -> None:
    """For DEEPKERN_DEBUG=1: lengths in [0, topk], and the indices within them in [-1, slots)."""
    topk = indices.shape[-1]
    if topk_length is not None:
        wrong = topk_length[(topk_length < 0) | (topk_length > topk)]
        check_that(op, "topk_length", wrong.numel() == 0,
                   f"lengths in [0, {topk}]", wrong[:1].tolist())  # fmt: skip
        beyond = torch.arange(topk, device=indices.device) >= topk_length[:, None, None]
        indices = indices.masked_fill(beyond, -1)
    wrong = indices[(indices < -1) | (indices >= slots)]
    check_that(op, "indices", wrong.numel() == 0,
               f"values in [-1, {slots})", wrong[:1].tolist())  # fmt: skip
