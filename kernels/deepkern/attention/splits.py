"""Attention over a long sequence in splits: where the splits are, and how results are combined.

Used by `mla_decode`, `mla_sparse_decode` and `mla_sparse_prefill`, whose kernels write out_i (fp32,
normalised) and lse_i (to the base 2) of each split i:

    lse = log2(sum over splits i of 2^lse_i)
    out = sum over i of 2^(lse_i - lse) . out_i, times the sink factor

Parallelization: one program of `mla_combine_splits_kernel` takes ROWS rows and adds their splits in
order. Each partial result is read once; the speed is limited by memory bandwidth.

Source: splitting as in Flash-Decoding.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def length_of(length_ptr, sequence, max_length):
    """Length of a sequence, clamped to [0, max_length]; max_length if there are no lengths."""
    if length_ptr is None:
        length = max_length
    else:
        length = tl.minimum(tl.maximum(tl.load(length_ptr + sequence), 0), max_length)
    return length


@triton.jit
def split_length_of(length, KEYS: tl.constexpr, MIN_SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """Tokens in each split except the last. It depends on the sequence's own length and,
    through the constants, on Sq · H; not on the batch."""
    return tl.maximum(tl.cdiv(tl.cdiv(length, MAX_SPLITS), KEYS) * KEYS, MIN_SPLIT)


@triton.jit
def sink_factor(sink_ptr, head, row_mask, lse):
    """exp(lse) / (exp(lse) + exp(sink)) of rows whose lse is to the base 2; 1 without sinks."""
    factor = tl.full(lse.shape, 1.0, tl.float32)
    if sink_ptr is not None:
        sink = tl.load(sink_ptr + head, mask=row_mask, other=0.0) * 1.4426950408889634
        # A row without tokens is 0 with any factor, and inf - inf would be NaN.
        factor = tl.where(lse == float("-inf"), 1.0, 1.0 / (1.0 + tl.exp2(sink - lse)))
    return factor


@triton.jit
def mla_combine_splits_kernel(
    partial_ptr,  # fp32 [B, num_splits, Sq * H, R], normalised results of the splits
    partial_lse_ptr,  # fp32 [B, num_splits, Sq * H], to the base 2
    length_ptr,  # int32 [B], or None: max_length everywhere
    sink_ptr,  # fp32 [H], or None
    out_ptr,  # [B, Sq, H, R]
    lse_ptr,  # fp32 [B, H, Sq], natural log
    Sq,
    H,
    R,
    max_length,  # tokens
    num_splits,
    ROWS: tl.constexpr,  # rows of a program
    R_TILE: tl.constexpr,  # R rounded up to a power of two
    KEYS: tl.constexpr,  # these three: see split_length_of
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """Adds up the splits of ROWS rows; a row is a head of a query.

    A sequence of one split is skipped: the attention kernel has written out and lse itself.
    """
    tiles = tl.cdiv(Sq * H, ROWS)
    sequence = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    length = length_of(length_ptr, sequence, max_length)
    split_length = split_length_of(length, KEYS, MIN_SPLIT, MAX_SPLITS)
    if split_length >= length:
        return
    row_mask = row < Sq * H
    count = tl.cdiv(length, split_length)
    first = sequence * num_splits * Sq * H + row  # [ROWS], of split 0
    split = tl.arange(0, MAX_SPLITS)[None, :]
    all_lse = partial_lse_ptr + first[:, None] + split * (Sq * H)
    split_mask = row_mask[:, None] & (split < count)
    row_max = tl.max(tl.load(all_lse, mask=split_mask, other=float("-inf")), 1)
    finite_max = tl.where(row_max == float("-inf"), 0.0, row_max)  # [ROWS]

    column = tl.arange(0, R_TILE)[None, :]
    mask = row_mask[:, None] & (column < R)
    row_sum = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, R_TILE), tl.float32)
    for i in range(0, count):
        at = first + i * (Sq * H)
        split_lse = tl.load(partial_lse_ptr + at, mask=row_mask, other=float("-inf"))
        weight = tl.exp2(split_lse - finite_max)
        row_sum += weight
        partial = tl.load(partial_ptr + at[:, None] * R + column, mask=mask, other=0.0)
        acc += weight[:, None] * partial
    result = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    lse = tl.where(row_sum == 0.0, float("-inf"), row_max + tl.log2(row_sum))
    query, head = row // H, row % H
    result *= sink_factor(sink_ptr, head, row_mask, lse)[:, None]
    out = out_ptr + (sequence * Sq * H + row)[:, None] * R + column
    tl.store(out, result.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + (sequence * H + head) * Sq + query, lse * LN_2, mask=row_mask)
