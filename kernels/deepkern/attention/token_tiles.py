"""A tile of queries meets a tile of cached tokens: the step that dense and sparse attention share.

    score[m, n] = softmax_scale * q[m] . token[n]               over R + D
    acc[m]      = sum over n of 2^(score - top[m]) . token[n, :R]

`kernel` of mla_decode.py and of sparse.py finds the tokens, each in its way, and gives them here.
R is taken WIDE latents at a time: acc, q and the tokens' latents are tuples of BLOCKS tiles. The
RoPE values are a tile of their own. A running maximum `top` and sum `total` [ROWS], to the base 2,
stand beside acc, and for FP8 tokens `used`: per block, the sum of the weights as they were rounded.

Source: FlashAttention-2 (arXiv 2307.08691) for the running softmax.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cache import e4m3_over_256, load


@triton.jit
def load_queries(
    q_row, R, D, known,
    DOT: tl.constexpr, WIDE: tl.constexpr, BLOCKS: tl.constexpr, EVEN: tl.constexpr,
    D_TILE: tl.constexpr,
):  # fmt: skip
    """RoPE values [ROWS, D_TILE] and latents, BLOCKS of [ROWS, WIDE]; 0 for rows not `known`."""
    rope = load_rope(q_row + R, D, known[:, None], q_row.dtype.element_ty, DOT, D_TILE)
    latent = ()
    for j in tl.static_range(BLOCKS):
        latent = latent + (load_block(q_row, j, R, known[:, None], DOT, WIDE, EVEN),)
    return rope, latent


@triton.jit
def tiles_of_zeros(BLOCKS: tl.constexpr, SHAPE: tl.constexpr):
    found = ()
    for _ in tl.static_range(BLOCKS):
        found = found + (tl.zeros(SHAPE, tl.float32),)
    return found


@triton.jit
def token_at(
    latent_ptr, scale_ptr, rope_ptr, block, offset,
    latent_block, latent_slot, scale_block, scale_slot, rope_block, rope_slot,
    LATENT_ALIGN: tl.constexpr, ROPE_ALIGN: tl.constexpr,
):  # fmt: skip
    """Where the latents, scales and RoPE values of the tokens at `offset` of pages `block` are."""
    block = block.to(tl.int64)
    latent_at = tl.multiple_of(block * latent_block + offset * latent_slot, LATENT_ALIGN)
    rope_at = tl.multiple_of(block * rope_block + offset * rope_slot, ROPE_ALIGN)
    scale_row = scale_ptr + block * scale_block + offset * scale_slot
    return latent_ptr + latent_at[:, None], scale_row, rope_ptr + rope_at[:, None]


@triton.jit
def attend(
    acc, used, top, total, q, token, present, seen, score_scale, R, D,
    FP8: tl.constexpr, DOT: tl.constexpr, ROPE: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, EVEN: tl.constexpr, D_TILE: tl.constexpr,
):  # fmt: skip
    """acc, used, top and total with the tokens added that are `seen` [ROWS or 1, KEYS].

    q: as `load_queries` gives it. token: as `token_at` does; where one is not `present` [KEYS],
    nothing is read but 0, so that it cannot spoil the products whatever stands there.
    """
    rope = load_rope(token[2], D, present[:, None], ROPE, DOT, D_TILE)
    scores = tl.dot(q[0], tl.trans(rope), input_precision=PRECISION)
    latent, scale = (), ()  # BLOCKS of [KEYS, WIDE]; FP8: of [1, KEYS]
    for j in tl.static_range(len(q[1])):
        if FP8:
            values = load_e4m3(token[0], j, R, present[:, None], DOT, WIDE, EVEN)
            # The scale is applied outside the product, where nothing rounds it.
            block_scale = load(token[1], j * WIDE // 128, present, tl.float32) * 256.0
            scale = scale + (block_scale[None, :],)
            product = tl.dot(q[1][j], tl.trans(values), input_precision=PRECISION)
            scores += product * scale[j]
        else:
            values = load_block(token[0], j, R, present[:, None], DOT, WIDE, EVEN)
            scores = tl.dot(q[1][j], tl.trans(values), scores, input_precision=PRECISION)
        latent = latent + (values,)
    scores = tl.where(seen, scores * score_scale, float("-inf"))  # [ROWS, KEYS]

    new_top = tl.maximum(top, tl.max(scores, 1))
    zero = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen yet: weights are 0
    weights = tl.exp2(scores - zero[:, None])
    shrink = tl.exp2(top - zero)
    total = total * shrink + tl.sum(weights, 1)
    new_acc, new_used = (), ()
    for j in tl.static_range(len(q[1])):
        if FP8:
            # What rounding to DOT makes of a weight times its scale is counted as the weight,
            # so that it cancels where one token outweighs the others.
            scaled = (weights * scale[j]).to(DOT)
            back = scaled.to(tl.float32) * (1.0 / scale[j])
            back = tl.where(tl.abs(scale[j]) < 1e-30, weights, back)
            new_used = new_used + (counted(used[j], shrink, back),)
        else:
            scaled = weights.to(DOT)
        shrunk = acc[j] * shrink[:, None]
        new_acc = new_acc + (tl.dot(scaled, latent[j], shrunk, input_precision=PRECISION),)
    return new_acc, new_used, new_top, total


@triton.jit
def counted(used, shrink, weights):
    """`used` and the weights: by row, or, where registers allow it, by row and place of the key,
    which leaves the sum over the keys to the end."""
    if len(used.shape) == 1:
        return used * shrink + tl.sum(weights, 1)
    else:
        return used * shrink[:, None] + weights


@triton.jit
def store_results(
    out_ptr, partial_ptr, out_row, partial_row, known, whole, acc, used, total, share, R,
    WIDE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """acc, normalised: to `partial`, or if this is the `whole` to `out`, times `share` if given."""
    for j in tl.static_range(len(acc)):
        at = j * WIDE + tl.arange(0, WIDE)[None, :]
        inside = known[:, None] & ((at < R) | EVEN)
        norm = total
        if len(used) > 0:
            norm = used[j] if len(used[j].shape) == 1 else tl.sum(used[j], 1)
        result = acc[j] / tl.where(total == 0.0, 1.0, norm)[:, None]
        if whole:
            if share is not None:
                result *= share[:, None]
            cast = result.to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + out_row[:, None] * R + at, cast, mask=inside)
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
