"""Sequences of different lengths, end to end in one tensor, cut into tiles on the device.

`cu_seqlens` says where they begin, and the host does not know what it holds. So `cut` writes a
table of tiles: never more than ceil(rows / BLOCK) + B + 1, which bounds the grid. Each sequence is
cut from its own first row on, so that where a row stands in its tile is its sequence's own matter.
One program goes over all boundaries and adds the tiles up, then each sequence writes its own.

The contents are not trusted. They count as `quant/groups.py` repairs them: clamped to the tensor,
then raised to the largest one before. Rows before the first and past the last sequence come in
tiles of their own, which have nothing to attend to: the table covers every row exactly once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv, next_power_of_2
from ..quant.groups import larger


def cut(cu: Tensor, rows: int, other_cu: Tensor, other_rows: int, BLOCK: int, last_first: bool):
    """int32 [tiles, 4]: a tile's first row, its sequence's end, and its begin and end on the other
    side (keys for queries, queries for keys). What the tiles do not fill is (0, 0, 0, 0).

    last_first: whether the last tile of a sequence comes first; put the longest work there.
    """
    spans = cu.shape[0] + 1
    slots = cdiv(rows, BLOCK) + spans - 1
    found = torch.empty(5, spans, dtype=torch.int32, device=cu.device)
    tiles = torch.empty(slots, 4, dtype=torch.int32, device=cu.device)
    span_kernel[(1,)](cu, other_cu, found, spans, rows, other_rows, BLOCK=BLOCK, CHUNK=1024)
    cut_kernel[(spans,)](found, tiles, spans, slots, BLOCK=BLOCK, LAST_FIRST=last_first)
    return tiles


@triton.jit(do_not_specialize=["spans", "rows", "other_rows"])
def span_kernel(
    cu_ptr, other_cu_ptr, found_ptr, spans, rows, other_rows,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Of each span: first row, end, begin and end on the other side, and how many tiles precede.

    Spans are what lies before the first sequence, the sequences, and what lies past the last.
    """
    reached, other_reached, tiles = 0, 0, 0
    for start in range(0, spans, CHUNK):
        span = start + tl.arange(0, CHUNK)
        first, end = edges(cu_ptr, span, spans, rows, reached)
        begin, stop = edges(other_cu_ptr, span, spans, other_rows, other_reached)
        reached, other_reached = tl.max(end, 0), tl.max(stop, 0)
        sequence = (span > 0) & (span < spans - 1)
        count = tl.cdiv(end - first, BLOCK)
        known = span < spans
        tl.store(found_ptr + span, first, mask=known)
        tl.store(found_ptr + spans + span, end, mask=known)
        tl.store(found_ptr + 2 * spans + span, tl.where(sequence, begin, 0), mask=known)
        tl.store(found_ptr + 3 * spans + span, tl.where(sequence, stop, 0), mask=known)
        tl.store(found_ptr + 4 * spans + span, tiles + tl.cumsum(count, 0) - count, mask=known)
        tiles += tl.sum(count, 0)


@triton.jit
def edges(cu_ptr, span, spans, rows, reached):
    """Where spans begin and end: at 0, the boundaries and `rows`, none before one before it."""
    first = tl.load(cu_ptr + span - 1, mask=(span > 0) & (span < spans), other=0)
    first = tl.where(span < spans, tl.minimum(tl.maximum(first, 0), rows), rows)
    first = tl.maximum(tl.associative_scan(first, 0, larger), reached)
    end = tl.load(cu_ptr + span, mask=span < spans - 1, other=rows)
    return first, tl.maximum(first, tl.minimum(end, rows))


@triton.jit(do_not_specialize=["spans", "slots"])
def cut_kernel(
    found_ptr, tiles_ptr, spans, slots, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr
):  # fmt: skip
    """A program writes the tiles of a span; the last one also the empty ones."""
    span = tl.program_id(0)
    first, end = tl.load(found_ptr + span), tl.load(found_ptr + spans + span)
    begin, stop = tl.load(found_ptr + 2 * spans + span), tl.load(found_ptr + 3 * spans + span)
    before = tl.load(found_ptr + 4 * spans + span)
    count = tl.cdiv(end - first, BLOCK)
    for start in range(0, count, 128):
        i = start + tl.arange(0, 128)
        entry = tiles_ptr + 4 * (before + (count - 1 - i if LAST_FIRST else i))
        tl.store(entry, first + i * BLOCK, mask=i < count)
        tl.store(entry + 1, tl.zeros_like(i) + end, mask=i < count)
        tl.store(entry + 2, tl.zeros_like(i) + begin, mask=i < count)
        tl.store(entry + 3, tl.zeros_like(i) + stop, mask=i < count)
    if span == spans - 1:
        for start in range(4 * (before + count), 4 * slots, 512):
            i = start + tl.arange(0, 512)
            tl.store(tiles_ptr + i, tl.zeros_like(i), mask=i < 4 * slots)


@triton.jit
def tile_at(tiles_ptr, tile):
    """An entry of the table: first row, end, begin and end of the other side."""
    entry = tiles_ptr + 4 * tile
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)


def parts(width: int) -> tuple[int, int]:
    """A width as two tiles of powers of two, the second 0 where one does: 192 = 128 + 64."""
    whole = max(next_power_of_2(width), 16)
    rest = max(next_power_of_2(max(width - whole // 2, 1)), 16)
    return (whole // 2, rest) if whole // 2 + rest < whole else (whole, 0)


@triton.jit
def load_parts(
    x_ptr, index, stride, present, width,
    MASKED: tl.constexpr, EVEN: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr,
):  # fmt: skip
    """Rows `index` of x as a tuple of [ROWS, W0] and, unless W1 is 0, [ROWS, W1].

    0 where MASKED and not present, and beyond the width, which may only be if it is not EVEN.
    """
    row_ptr = x_ptr + index.to(tl.int64)[:, None] * stride
    found = ()
    for p in tl.static_range(2 if W1 > 0 else 1):
        column = (p * W0 + tl.arange(0, W1 if p == 1 else W0))[None, :]
        if MASKED:
            x = tl.load(
                row_ptr + column, mask=present[:, None] & ((column < width) | EVEN), other=0.0
            )
        elif EVEN:
            x = tl.load(row_ptr + column)
        else:
            x = tl.load(row_ptr + column, mask=(index >= 0)[:, None] & (column < width), other=0.0)
        found = found + (x,)
    return found


@triton.jit
def store_parts(x_ptr, index, stride, present, width, values, EVEN: tl.constexpr, W0: tl.constexpr):
    """Writes the tuple `values` to rows `index` of x, in its dtype."""
    row_ptr = x_ptr + index.to(tl.int64)[:, None] * stride
    for p in tl.static_range(len(values)):
        column = (p * W0 + tl.arange(0, values[p].shape[1]))[None, :]
        inside = present[:, None] & ((column < width) | EVEN)
        tl.store(row_ptr + column, values[p].to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def zero_parts(ROWS: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr):
    found = (tl.zeros((ROWS, W0), tl.float32),)
    if W1 > 0:
        found = found + (tl.zeros((ROWS, W1), tl.float32),)
    return found


@triton.jit
def scaled_parts(x, factor):
    found = ()
    for p in tl.static_range(len(x)):
        found = found + (x[p] * factor,)
    return found


@triton.jit
def dot_parts(a, b, PRECISION: tl.constexpr):
    """a . b^T, summed over the parts of both: fp32 [rows of a, rows of b]."""
    product = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    if len(a) > 1:
        product = tl.dot(a[1], tl.trans(b[1]), product, input_precision=PRECISION)
    return product


@triton.jit
def add_products(acc, a, b, PRECISION: tl.constexpr):
    """acc + a . b, for each part of b and acc."""
    found = ()
    for p in tl.static_range(len(b)):
        found = found + (tl.dot(a, b[p], acc[p], input_precision=PRECISION),)
    return found
