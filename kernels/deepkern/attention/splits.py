"""Attention over a long sequence in splits: where they fall, and how their results are combined.

    lse = log2(sum over splits i of 2^lse_i)
    out = sum over i of 2^(lse_i - lse) . out_i, times the share beside a sink

`kernel` of mla_decode.py and of sparse.py writes out_i (fp32, normalised) and lse_i (to the base
2). Cut: a program of `combine` takes a few rows and adds up their splits in order. Each partial
result is read once; the speed is that of memory.

Source: splitting as in Flash-Decoding.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def length_of(length_ptr, sequence, capacity):
    """Tokens of a sequence, clamped to [0, capacity]; all of the capacity without lengths."""
    if length_ptr is None:
        length = capacity
    else:
        length = tl.minimum(tl.maximum(tl.load(length_ptr + sequence), 0), capacity)
    return length


@triton.jit
def split_length_of(length, KEYS: tl.constexpr, MIN_SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """Tokens in each split (but the last) of a sequence: a function of its own length alone."""
    return tl.maximum(tl.cdiv(tl.cdiv(length, MAX_SPLITS), KEYS) * KEYS, MIN_SPLIT)


@triton.jit
def share_beside_sink(sink_ptr, head, known, lse):
    """exp(lse) / (exp(lse) + exp(sink)) of rows whose lse is to the base 2; 1 without sinks."""
    share = tl.full(lse.shape, 1.0, tl.float32)
    if sink_ptr is not None:
        sink = tl.load(sink_ptr + head, mask=known, other=0.0) * 1.4426950408889634
        # Where nothing is attended to, the result is 0 as it is, and inf - inf would be NaN.
        share = tl.where(lse == float("-inf"), 1.0, 1.0 / (1.0 + tl.exp2(sink - lse)))
    return share


@triton.jit
def combine(
    partial_ptr, partial_lse_ptr, length_ptr, sink_ptr, out_ptr, lse_ptr,
    Sq, H, R, capacity, splits,
    ROWS: tl.constexpr, R_TILE: tl.constexpr, KEYS: tl.constexpr,
    MIN_SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    """Adds up the splits of ROWS rows, each weighted with its share of the sum of exponentials.

    Also for `mla_sparse_decode`, which has sinks and may have no lengths.
    """
    tiles = tl.cdiv(Sq * H, ROWS)
    sequence = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    length = length_of(length_ptr, sequence, capacity)
    split_length = split_length_of(length, KEYS, MIN_SPLIT, MAX_SPLITS)
    if split_length >= length:
        return
    known = row < Sq * H
    count = tl.cdiv(length, split_length)
    first = sequence * splits * Sq * H + row  # [ROWS], of split 0
    split = tl.arange(0, MAX_SPLITS)[None, :]
    used = known[:, None] & (split < count)
    all_lse = partial_lse_ptr + first[:, None] + split * (Sq * H)
    top = tl.max(tl.load(all_lse, mask=used, other=float("-inf")), 1)
    zero = tl.where(top == float("-inf"), 0.0, top)  # [ROWS]

    column = tl.arange(0, R_TILE)[None, :]
    inside = known[:, None] & (column < R)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, R_TILE), tl.float32)
    for i in range(0, count):
        at = first + i * (Sq * H)
        weight = tl.exp2(tl.load(partial_lse_ptr + at, mask=known, other=float("-inf")) - zero)
        total += weight
        result = tl.load(partial_ptr + at[:, None] * R + column, mask=inside, other=0.0)
        acc += weight[:, None] * result
    result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    lse = tl.where(total == 0.0, float("-inf"), top + tl.log2(total))
    query, head = row // H, row % H
    result *= share_beside_sink(sink_ptr, head, known, lse)[:, None]
    out = out_ptr + (sequence * Sq * H + row)[:, None] * R + column
    tl.store(out, result.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + (sequence * H + head) * Sq + query, lse * LN_2, mask=known)
