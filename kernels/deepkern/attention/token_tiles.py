"""One online-softmax step: a tile of queries against a tile of cached tokens.

Used by the kernels of `mla_decode`, `mla_sparse_decode` and `mla_sparse_prefill`, which find the
tokens; the loads of rows also by `mla_sparse_prefill_backward`.

    score[m, n] = log2(e) * softmax_scale * q[m] . token[n]             over R + D
    acc[m]      = sum over n of 2^(score[m, n] - row_max[m]) . token[n, :R]

R is processed in blocks of R_BLOCK latents: acc, q and the tokens' latents are tuples of
NUM_R_BLOCKS tiles. The D RoPE values are a tile of their own. row_max [ROWS] is an exponent of 2,
row_sum [ROWS] a sum of powers of 2. With FP8 tokens, `rounded_sum` holds the sums of the weights
after rounding, per block.

Source: FlashAttention-2 (arXiv 2307.08691) for the online softmax.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cache import e4m3_over_256, load
from .splits import LN_2


@triton.jit
def load_queries(
    q_row,  # [ROWS, 1] pointers to rows of R + D values
    R,
    D,
    row_mask,  # [ROWS]; rows outside load as 0
    DOT_DTYPE: tl.constexpr,
    R_BLOCK: tl.constexpr,
    NUM_R_BLOCKS: tl.constexpr,
    EVEN_R: tl.constexpr,
    D_TILE: tl.constexpr,
):
    """RoPE values [ROWS, D_TILE], and latents: NUM_R_BLOCKS tiles [ROWS, R_BLOCK]."""
    mask = row_mask[:, None]
    rope = load_rope(q_row + R, D, mask, q_row.dtype.element_ty, DOT_DTYPE, D_TILE)
    latent = ()
    for j in tl.static_range(NUM_R_BLOCKS):
        latent = latent + (load_block(q_row, j, R, mask, DOT_DTYPE, R_BLOCK, EVEN_R),)
    return rope, latent


@triton.jit
def zero_tiles(COUNT: tl.constexpr, SHAPE: tl.constexpr):
    """COUNT fp32 tiles of zeros."""
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros(SHAPE, tl.float32),)
    return tiles


@triton.jit
def token_pointers(
    cache,  # CacheView
    page,  # [KEYS]
    offset,  # [KEYS], within the page
    LATENT_ALIGN: tl.constexpr,
    ROPE_ALIGN: tl.constexpr,
):
    """Pointers to the latents [KEYS, 1], scales [KEYS] and RoPE values [KEYS, 1] of tokens."""
    page = page.to(tl.int64)
    latent = page * cache.latent_page_stride + offset * cache.latent_token_stride
    rope = page * cache.rope_page_stride + offset * cache.rope_token_stride
    latent, rope = tl.multiple_of(latent, LATENT_ALIGN), tl.multiple_of(rope, ROPE_ALIGN)
    # Two additions to the pointer: with one, Triton copies scales to smem asynchronously, and
    # mla_decode over an FP8 cache spills 32 B on sm_90.
    scale_row = cache.scale + page * cache.scale_page_stride + offset * cache.scale_token_stride
    return cache.latent + latent[:, None], scale_row, cache.rope + rope[:, None]


@triton.jit
def online_softmax_step(
    acc,  # NUM_R_BLOCKS tiles fp32 [ROWS, R_BLOCK]
    rounded_sum,  # FP8: NUM_R_BLOCKS tiles, see add_rounded_weights; else ()
    row_max,  # [ROWS]
    row_sum,  # [ROWS]
    q,  # as load_queries returns them
    token,  # of token_pointers
    key_mask,  # [KEYS]; other tokens load as 0, so NaN in unused cache cannot propagate
    attn_mask,  # [ROWS or 1, KEYS]; other scores are -inf
    score_scale,  # softmax_scale * log2(e)
    R,
    D,
    FP8: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    ROPE_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    R_BLOCK: tl.constexpr,
    EVEN_R: tl.constexpr,
    D_TILE: tl.constexpr,
):
    """acc, rounded_sum, row_max and row_sum after these tokens."""
    q_rope, q_latent = q
    latent_row, scale_row, rope_row = token
    token_mask = key_mask[:, None]
    rope = load_rope(rope_row, D, token_mask, ROPE_DTYPE, DOT_DTYPE, D_TILE)
    scores = tl.dot(q_rope, tl.trans(rope), input_precision=PRECISION)
    latent, scale = (), ()  # NUM_R_BLOCKS tiles [KEYS, R_BLOCK]; FP8: [1, KEYS]
    for j in tl.static_range(len(q_latent)):
        if FP8:
            values = load_e4m3(latent_row, j, R, token_mask, DOT_DTYPE, R_BLOCK, EVEN_R)
            # The scale multiplies the fp32 product, where it is not rounded to DOT_DTYPE.
            block_scale = load(scale_row, j * R_BLOCK // 128, key_mask, tl.float32) * 256.0
            scale = scale + (block_scale[None, :],)
            product = tl.dot(q_latent[j], tl.trans(values), input_precision=PRECISION)
            scores += product * scale[j]
        else:
            values = load_block(latent_row, j, R, token_mask, DOT_DTYPE, R_BLOCK, EVEN_R)
            scores = tl.dot(q_latent[j], tl.trans(values), scores, input_precision=PRECISION)
        latent = latent + (values,)
    scores = tl.where(attn_mask, scores * score_scale, float("-inf"))  # [ROWS, KEYS]

    new_max = tl.maximum(row_max, tl.max(scores, 1))
    finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)  # no token yet: weights are 0
    weights = tl.exp2(scores - finite_max[:, None])
    alpha = tl.exp2(row_max - finite_max)
    row_sum = row_sum * alpha + tl.sum(weights, 1)
    new_acc, new_rounded_sum = (), ()
    for j in tl.static_range(len(q_latent)):
        if FP8:
            # acc is later divided by the sum of the weights as the product uses them, that is
            # after rounding: the rounding error cancels where one token dominates.
            scaled = (weights * scale[j]).to(DOT_DTYPE)
            rounded = scaled.to(tl.float32) * (1.0 / scale[j])
            rounded = tl.where(tl.abs(scale[j]) < 1e-30, weights, rounded)
            new_rounded_sum = new_rounded_sum + (
                add_rounded_weights(rounded_sum[j], alpha, rounded),
            )
        else:
            scaled = weights.to(DOT_DTYPE)
        rescaled = acc[j] * alpha[:, None]
        new_acc = new_acc + (tl.dot(scaled, latent[j], rescaled, input_precision=PRECISION),)
    return new_acc, new_rounded_sum, new_max, row_sum


@triton.jit
def add_rounded_weights(rounded_sum, alpha, weights):
    """rounded_sum * alpha + weights [ROWS, KEYS].

    rounded_sum is [ROWS], or [ROWS, KEYS] where registers allow it: then the reduction over keys
    happens once, after the loop.
    """
    if len(rounded_sum.shape) == 1:
        return rounded_sum * alpha + tl.sum(weights, 1)
    else:
        return rounded_sum * alpha[:, None] + weights


@triton.jit
def store_lse(
    lse_ptr,  # fp32 [B, H, Sq], natural log
    partial_lse_ptr,  # fp32 [B, num_splits, Sq * H], to the base 2; None with one split
    lse_index,  # [ROWS]
    partial_row,  # [ROWS]
    row_mask,  # [ROWS]
    only_split,  # whether this split is the whole sequence
    row_max,
    row_sum,
):
    """Stores the log of the sum of exponentials and returns it, to the base 2."""
    lse = tl.where(row_sum == 0.0, float("-inf"), row_max + tl.log2(row_sum))
    if only_split:
        tl.store(lse_ptr + lse_index, lse * LN_2, mask=row_mask)
    elif partial_lse_ptr is not None:
        tl.store(partial_lse_ptr + partial_row, lse, mask=row_mask)
    return lse


@triton.jit
def store_out(
    out_ptr,  # [B * Sq * H, R]
    partial_ptr,  # fp32 [B * num_splits * Sq * H, R]; None with one split
    out_row,  # [ROWS]
    partial_row,  # [ROWS]
    row_mask,  # [ROWS]
    only_split,  # whether this split is the whole sequence
    acc,
    rounded_sum,
    row_sum,
    factor,  # [ROWS], multiplies out, not the partial result; None: 1
    R,
    R_BLOCK: tl.constexpr,
    EVEN_R: tl.constexpr,
):
    """Stores acc, normalised, in out or, if there are other splits, in the partial results."""
    for j in tl.static_range(len(acc)):
        column = j * R_BLOCK + tl.arange(0, R_BLOCK)[None, :]
        mask = row_mask[:, None] & ((column < R) | EVEN_R)
        norm = row_sum
        if len(rounded_sum) > 0:
            norm = rounded_sum[j] if len(rounded_sum[j].shape) == 1 else tl.sum(rounded_sum[j], 1)
        result = acc[j] / tl.where(row_sum == 0.0, 1.0, norm)[:, None]
        if only_split:
            if factor is not None:
                result *= factor[:, None]
            cast = result.to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + out_row[:, None] * R + column, cast, mask=mask)
        elif partial_ptr is not None:
            tl.store(partial_ptr + partial_row[:, None] * R + column, result, mask=mask)


@triton.jit
def load_block(
    row_ptr, j, R, mask, DTYPE: tl.constexpr, R_BLOCK: tl.constexpr, EVEN_R: tl.constexpr
):
    """Block j of each row's R values: [rows, R_BLOCK] of DTYPE; 0 where masked and from R on."""
    column = j * R_BLOCK + tl.arange(0, R_BLOCK)[None, :]
    return tl.load(row_ptr + column, mask=mask & ((column < R) | EVEN_R), other=0.0).to(DTYPE)


@triton.jit
def load_e4m3(
    row_ptr, j, R, mask, DTYPE: tl.constexpr, R_BLOCK: tl.constexpr, EVEN_R: tl.constexpr
):
    """As `load_block`, of e4m3 values in int32 words, times 2^-8."""
    word = j * (R_BLOCK // 4) + tl.arange(0, R_BLOCK // 4)[None, :]
    values = e4m3_over_256(load(row_ptr, word, mask & ((word * 4 < R) | EVEN_R), tl.int32), DTYPE)
    if not EVEN_R:  # the last word may hold R % 4 values only
        column = j * R_BLOCK + tl.arange(0, R_BLOCK)[None, :]
        values = tl.where(mask & (column < R), values, 0.0)
    return values


@triton.jit
def load_rope(
    row_ptr, D, mask, ROPE_DTYPE: tl.constexpr, DTYPE: tl.constexpr, D_TILE: tl.constexpr
):
    """D values ROPE_DTYPE of each row, or their bytes: [rows, D_TILE] of DTYPE, 0 elsewhere."""
    column = tl.arange(0, D_TILE)[None, :]
    return load(row_ptr, column, mask & (column < D), ROPE_DTYPE).to(DTYPE)
