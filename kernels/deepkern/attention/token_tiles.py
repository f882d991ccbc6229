"""One online-softmax step: a tile of queries against a tile of cached tokens.

Used by the kernels of `mla_decode`, `mla_sparse_decode` and `mla_sparse_prefill`, which find the
tokens; the loads of rows also by `mla_sparse_prefill_backward`.

    score[m, n] = log2(e) * softmax_scale * q[m] . token[n]             over R + D
    acc[m]      = sum over n of 2^(score[m, n] - row_max[m]) . token[n, :R]

R is processed in blocks of R_BLOCK latents: acc, q and the tokens' latents are tuples of
NUM_R_BLOCKS tiles. The D RoPE values are a tile of their own. row_max [ROWS] is an exponent of 2,
row_sum [ROWS] a sum of powers of 2. With bf16 q and FP8 tokens (HALF) products with latents are
float16 and acc is over a power of two, `unit`: see fp8_tokens.py.

Source: FlashAttention-2 (arXiv 2307.08691) for the online softmax.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cache import load
from .fp8_tokens import (
    WEIGHT_RANGE,
    half_queries,
    inverse,
    load_e4m3,
    load_scales,
    unit_of,
)
from .splits import LN_2


@triton.jit
def load_queries(
    q_row,  # [ROWS, 1] pointers to rows of R + D values
    R,
    D,
    row_mask,  # [ROWS]; rows outside load as 0
    HALF: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    R_BLOCK: tl.constexpr,
    NUM_R_BLOCKS: tl.constexpr,
    EVEN_R: tl.constexpr,
    D_TILE: tl.constexpr,
):
    """RoPE values [ROWS, D_TILE]; NUM_R_BLOCKS tiles of latents [ROWS, R_BLOCK]; their unit.

    With HALF the latents are float16, over their unit [ROWS, 1]; otherwise the unit is 1.
    """
    mask = row_mask[:, None]
    rope = load_rope(q_row + R, D, mask, q_row.dtype.element_ty, DOT_DTYPE, D_TILE)
    DTYPE: tl.constexpr = tl.float32 if HALF else DOT_DTYPE
    latent, unit = (), 1.0
    for j in tl.static_range(NUM_R_BLOCKS):
        latent = latent + (load_block(q_row, j, R, mask, DTYPE, R_BLOCK, EVEN_R),)
    if HALF:
        latent, unit = half_queries(latent)
    return rope, latent, unit


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
    unit,  # of acc; 1 without HALF
    row_max,  # [ROWS]
    row_sum,  # [ROWS]
    q,  # as load_queries returns them
    token,  # of token_pointers
    key_mask,  # [KEYS]; other tokens load as 0, so NaN in unused cache cannot propagate
    attn_mask,  # [ROWS or 1, KEYS]; other scores are -inf
    any_key,  # a run-time condition that holds, see softmax_weights
    score_scale,  # softmax_scale * log2(e)
    R,
    D,
    FP8: tl.constexpr,
    HALF: tl.constexpr,
    ASM: tl.constexpr,
    BRANCH: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    ROPE_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    R_BLOCK: tl.constexpr,
    EVEN_R: tl.constexpr,
    D_TILE: tl.constexpr,
):
    """acc, unit, row_max and row_sum after these tokens."""
    NUM_R_BLOCKS: tl.constexpr = len(acc)
    latent_row, scale_row, rope_row = token
    token_mask = key_mask[:, None]
    scale, new_unit = (), unit  # NUM_R_BLOCKS times fp32 [KEYS]
    if FP8:
        scale = load_scales(scale_row, latent_row, key_mask, R, R_BLOCK, NUM_R_BLOCKS)
    if HALF:
        new_unit = unit_of(scale, unit)
    rope = load_rope(rope_row, D, token_mask, ROPE_DTYPE, DOT_DTYPE, D_TILE)
    VALUE_DTYPE: tl.constexpr = tl.float16 if HALF else DOT_DTYPE
    latent = ()  # NUM_R_BLOCKS tiles [KEYS, R_BLOCK]
    for j in tl.static_range(NUM_R_BLOCKS):
        if FP8:
            values = load_e4m3(latent_row, j, R, token_mask, VALUE_DTYPE, ASM, R_BLOCK, EVEN_R)
        else:
            values = load_block(latent_row, j, R, token_mask, DOT_DTYPE, R_BLOCK, EVEN_R)
        latent = latent + (values,)

    # The values without a token. Not constants, which would take smem during the whole loop.
    shape: tl.constexpr = (row_sum.shape[0], key_mask.shape[0])
    weights = (tl.broadcast_to(row_sum[:, None], shape).to(VALUE_DTYPE),)
    for _ in tl.static_range(len(scale) - 1):
        weights = weights + (weights[0],)
    alpha, new_max = row_max, row_max
    if any_key if BRANCH else True:
        weights, alpha, new_max, row_sum = softmax_weights(
            row_max, row_sum, q, rope, latent, scale, new_unit, attn_mask, score_scale,
            BRANCH, VALUE_DTYPE, PRECISION,
        )  # fmt: skip
    if HALF:
        alpha *= unit * inverse(new_unit)
    new_acc = ()
    for j in tl.static_range(NUM_R_BLOCKS):
        rescaled = acc[j] * alpha[:, None]
        weight = weights[j if FP8 else 0]
        new_acc = new_acc + (tl.dot(weight, latent[j], rescaled, input_precision=PRECISION),)
    return new_acc, new_unit, new_max, row_sum


@triton.jit
def softmax_weights(
    row_max,  # [ROWS], before these tokens
    row_sum,  # [ROWS], before these tokens
    q,  # as load_queries returns them
    rope,  # [KEYS, D_TILE]
    latent,  # NUM_R_BLOCKS tiles [KEYS, R_BLOCK]
    scale,  # of each tile [KEYS], or () without FP8
    unit,  # of the weights
    attn_mask,
    score_scale,
    BRANCH: tl.constexpr,
    DTYPE: tl.constexpr,  # of the weights
    PRECISION: tl.constexpr,
):
    """The weights, a tile [ROWS, KEYS] for each scale or one; alpha, row_max and row_sum.

    Weights are times the scale; in float16 over the unit and times WEIGHT_RANGE too.

    Triton gives each warp whole rows of a product on whose result another product depends. With 64
    rows, of which four warps hold 16 each, two warp groups then compute everything twice. So the
    caller puts this into a branch (BRANCH), behind which Triton does not look, and products are
    scaled before they are added up: a shared accumulator is such a dependence too.
    """
    q_rope, q_latent, q_unit = q
    scores = tl.dot(q_rope, tl.trans(rope), input_precision=PRECISION)
    if BRANCH or len(scale) > 0:
        scores *= score_scale
        latent_scale = q_unit * score_scale
        for j in tl.static_range(len(q_latent)):
            product = tl.dot(q_latent[j], tl.trans(latent[j]), input_precision=PRECISION)
            if len(scale) > 0:
                product *= scale[j][None, :]
            scores += product * latent_scale
    else:
        for j in tl.static_range(len(q_latent)):
            scores = tl.dot(q_latent[j], tl.trans(latent[j]), scores, input_precision=PRECISION)
        scores *= score_scale
    scores = tl.where(attn_mask, scores, float("-inf"))  # [ROWS, KEYS]

    new_max = tl.maximum(row_max, tl.max(scores, 1))
    finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)  # no token yet: weights are 0
    exponentials = tl.exp2(scores - finite_max[:, None])
    alpha = tl.exp2(row_max - finite_max)
    row_sum = row_sum * alpha + tl.sum(exponentials, 1)
    weights = ()
    for j in tl.static_range(len(scale)):
        factor = scale[j]
        if tl.float16 == DTYPE:
            factor *= WEIGHT_RANGE * inverse(unit)
        weights = weights + ((exponentials * factor[None, :]).to(DTYPE),)
    if len(scale) == 0:
        weights = (exponentials.to(DTYPE),)
    return weights, alpha, new_max, row_sum


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
    unit,  # of acc
    row_sum,
    factor,  # [ROWS], multiplies out, not the partial result; None: 1
    R,
    HALF: tl.constexpr,  # whether products were float16
    R_BLOCK: tl.constexpr,
    EVEN_R: tl.constexpr,
):
    """Stores acc, normalised, in out or, if there are other splits, in the partial results."""
    for j in tl.static_range(len(acc)):
        column = j * R_BLOCK + tl.arange(0, R_BLOCK)[None, :]
        mask = row_mask[:, None] & ((column < R) | EVEN_R)
        norm = tl.where(row_sum == 0.0, 1.0, row_sum)
        result = acc[j] / norm[:, None]
        if HALF:
            result *= unit * (1.0 / WEIGHT_RANGE)
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
def load_rope(
    row_ptr, D, mask, ROPE_DTYPE: tl.constexpr, DTYPE: tl.constexpr, D_TILE: tl.constexpr
):
    """D values ROPE_DTYPE of each row, or their bytes: [rows, D_TILE] of DTYPE, 0 elsewhere."""
    column = tl.arange(0, D_TILE)[None, :]
    return load(row_ptr, column, mask & (column < D), ROPE_DTYPE).to(DTYPE)
