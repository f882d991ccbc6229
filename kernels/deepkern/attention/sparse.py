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

from ..runtime import arch
from ..runtime.contract import check_that
from .cache import alignment, e4m3_over_256, load, parts, strides
from .mla_decode import LOG2_E, Tile, dot_dtype, rope_dtype, triton_dtype
from .splits import LN_2, combine, length_of, share_beside_sink, split_length_of

MAX_SPLITS = 8


def min_split(H: int) -> int:
    """Indices in a split at least: its partial result costs 4 to 7 tokens a head of traffic."""
    return min(max(8 * triton.next_power_of_2(max(H, 1)), 256), 1024)


def tile(q: Tensor, cache: Tensor, v_head_dim: int) -> Tile:
    """The tile for these widths and H heads; how many queries there are may not decide it."""
    target = arch.of(q.device)
    H, W = q.shape[-2:]
    rows, keys, wide, warps, stages = _tile(target, dot_dtype(q, cache), cache.dtype, H)
    wide = max(min(wide, triton.next_power_of_2(max(v_head_dim, 1))), 16)
    # Wider tokens than V3's 576 values need shorter tiles for the same shared memory.
    room = keys * 640
    while keys > 16 and keys * W > room:
        keys //= 2
    return Tile(rows, keys, wide, warps, stages, MAX_SPLITS)


def _tile(target, dot: torch.dtype, cached: torch.dtype, H: int) -> tuple[int, ...]:
    """(rows, keys, wide, warps, stages) for H heads, made for 512 + 64 values a token."""
    nvidia, roomy = target.backend == "cuda", target.shared >= 160 << 10
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
    t = tile(q, cache, R)
    least = min_split(H)
    splits = max(min(triton.cdiv(topk, least), max_splits), 1)
    partial = partial_lse = None
    if splits > 1:
        partial = q.new_empty(B, splits, Sq * H, R, dtype=torch.float32)
        partial_lse = q.new_empty(B, splits, Sq * H, dtype=torch.float32)
    cached = parts(cache, R, torch.int32)
    kernel[(B * Sq * triton.cdiv(H, t.rows), splits)](
        q, *cached, indices, topk_length, attn_sink, out, lse, max_logits, partial, partial_lse,
        softmax_scale * LOG2_E, Sq, H, R, W - R, topk, blocks * page, page,
        q.stride(0), q.stride(1), q.stride(2), indices.stride(0), indices.stride(1),
        *strides(*cached),
        FP8=cache.dtype == torch.uint8,
        DOT=triton_dtype(dot_dtype(q, cache)), ROPE=triton_dtype(rope_dtype(cache)),
        LATENT_ALIGN=alignment(cached[0]), ROPE_ALIGN=alignment(cached[2]),
        PRECISION="tf32x3" if target.backend == "cuda" else "ieee",
        ROWS=t.rows, KEYS=t.keys, WIDE=t.wide, BLOCKS=triton.cdiv(R, t.wide), EVEN=R % t.wide == 0,
        D_TILE=max(triton.next_power_of_2(W - R), 16),
        MIN_SPLIT=least, MAX_SPLITS=max_splits,
        num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    if splits > 1:
        ROWS = 4
        combine[(B * triton.cdiv(Sq * H, ROWS),)](
            partial, partial_lse, topk_length, attn_sink, out, lse, Sq, H, R, topk, splits,
            ROWS=ROWS, R_TILE=max(triton.next_power_of_2(R), 1), KEYS=t.keys,
            MIN_SPLIT=least, MAX_SPLITS=max_splits, num_warps=4,
        )  # fmt: skip


@triton.jit(do_not_specialize=["topk"])
def kernel(
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
    q_rope = load_rope(q_row + R, D, known[:, None], q_ptr.dtype.element_ty, DOT, D_TILE)
    q_latent, acc = (), ()  # BLOCKS of [ROWS, WIDE] each
    used = ()  # FP8: BLOCKS of [ROWS], the sum of the weights that went into acc
    for j in tl.static_range(BLOCKS):
        q_latent = q_latent + (load_block(q_row, j, R, known[:, None], DOT, WIDE, EVEN),)
        acc = acc + (tl.zeros((ROWS, WIDE), tl.float32),)
        if FP8:
            used = used + (tl.zeros((ROWS,), tl.float32),)
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
        # What is absent is read as 0, so that it cannot spoil the products whatever stands there.
        present = (slot >= 0) & (slot < slots)  # [KEYS]
        block, offset = (slot // page).to(tl.int64), slot % page
        latent_at = tl.multiple_of(block * latent_block + offset * latent_slot, LATENT_ALIGN)
        scale_row = scale_ptr + block * scale_block + offset * scale_slot
        rope_at = tl.multiple_of(block * rope_block + offset * rope_slot, ROPE_ALIGN)
        rope = load_rope(rope_ptr + rope_at[:, None], D, present[:, None], ROPE, DOT, D_TILE)
        latent_row = latent_ptr + latent_at[:, None]
        scores = tl.dot(q_rope, tl.trans(rope), input_precision=PRECISION)
        latent, scale = (), ()  # BLOCKS of [KEYS, WIDE]; FP8: of [1, KEYS]
        for j in tl.static_range(BLOCKS):
            if FP8:
                values = load_e4m3(latent_row, j, R, present[:, None], DOT, WIDE, EVEN)
                # The scale is applied outside the product, where nothing rounds it.
                block_scale = load(scale_row, j * WIDE // 128, present, tl.float32) * 256.0
                scale = scale + (block_scale[None, :],)
                product = tl.dot(q_latent[j], tl.trans(values), input_precision=PRECISION)
                scores += product * scale[j]
            else:
                values = load_block(latent_row, j, R, present[:, None], DOT, WIDE, EVEN)
                scores = tl.dot(q_latent[j], tl.trans(values), scores, input_precision=PRECISION)
            latent = latent + (values,)
        scores = tl.where(present[None, :], scores * score_scale, float("-inf"))  # [ROWS, KEYS]

        new_top = tl.maximum(top, tl.max(scores, 1))
        zero = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen yet: weights are 0
        weights = tl.exp2(scores - zero[:, None])
        shrink = tl.exp2(top - zero)
        total = total * shrink + tl.sum(weights, 1)
        top = new_top
        old_acc, old_used = acc, used
        acc, used = (), ()
        for j in tl.static_range(BLOCKS):
            if FP8:
                # What rounding to DOT makes of a weight times its scale is counted as the weight,
                # so that it cancels where one token outweighs the others.
                scaled = (weights * scale[j]).to(DOT)
                back = scaled.to(tl.float32) * (1.0 / scale[j])
                back = tl.where(tl.abs(scale[j]) < 1e-30, weights, back)
                used = used + (old_used[j] * shrink + tl.sum(back, 1),)
            else:
                scaled = weights.to(DOT)
            shrunk = old_acc[j] * shrink[:, None]
            acc = acc + (tl.dot(scaled, latent[j], shrunk, input_precision=PRECISION),)

    lse = tl.where(total == 0.0, float("-inf"), top + tl.log2(total))
    whole = split_length >= length  # the only split
    row = (sequence * Sq + query) * H + head
    partial_row = (sequence * tl.num_programs(1) + split) * Sq * H + query * H + head
    share = share_beside_sink(sink_ptr, head, known, lse)
    if whole:
        at = (sequence * H + head) * Sq + query
        tl.store(lse_ptr + at, lse * LN_2, mask=known)
        if max_ptr is not None:
            tl.store(max_ptr + at, top * LN_2, mask=known)
    elif partial_ptr is not None:
        tl.store(partial_lse_ptr + partial_row, lse, mask=known)
    for j in tl.static_range(BLOCKS):
        at = j * WIDE + tl.arange(0, WIDE)[None, :]
        inside = known[:, None] & ((at < R) | EVEN)
        norm = used[j] if FP8 else total
        result = acc[j] / tl.where(total == 0.0, 1.0, norm)[:, None]
        if whole:
            cast = (result * share[:, None]).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + row[:, None] * R + at, cast, mask=inside)
        elif partial_ptr is not None:
            tl.store(partial_ptr + partial_row[:, None] * R + at, result, mask=inside)


@triton.jit
def load_block(row_ptr, j, R, mask, DOT: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr):
    """Values j * WIDE and on of each row's R: [rows, WIDE] of DOT; 0 where masked and past R."""
    at = j * WIDE + tl.arange(0, WIDE)[None, :]
    return tl.load(row_ptr + at, mask=mask & ((at < R) | EVEN), other=0.0).to(DOT)


@triton.jit
def load_e4m3(row_ptr, j, R, mask, DOT: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr):
    """As `load_block`, of e4m3 values, not yet times 256 times their scales; from words."""
    word = j * (WIDE // 4) + tl.arange(0, WIDE // 4)[None, :]
    values = e4m3_over_256(load(row_ptr, word, mask & ((word * 4 < R) | EVEN), tl.int32), DOT)
    if not EVEN:  # the last word may be of R % 4 values
        at = j * WIDE + tl.arange(0, WIDE)[None, :]
        values = tl.where(mask & (at < R), values, 0.0)
    return values


@triton.jit
def load_rope(row_ptr, D, mask, ROPE: tl.constexpr, DOT: tl.constexpr, D_TILE: tl.constexpr):
    """D values of each row, which may be bytes of ROPE: [rows, D_TILE] of DOT, 0 elsewhere."""
    column = tl.arange(0, D_TILE)[None, :]
    return load(row_ptr, column, mask & (column < D), ROPE).to(DOT)


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
