"""Tiles of sequences of different lengths, packed end to end in one tensor (ragged sequences).

`ragged_tiles` writes a table with one entry per tile, on the device: `cu_seqlens` holds the row at
which each sequence starts, and the host does not read it. The table has ceil(rows / BLOCK) + B + 1
entries, which bounds the grid; entries without a tile are zeros. Tiles start at the first row of
their sequence, so the position of a row within its tile does not depend on other sequences.

`cu_seqlens` is not trusted. Values are clamped to the tensor, then raised to the largest preceding
one, as in `quant/groups.py`. Rows before the first and after the last sequence get tiles of their
own, without keys: the table covers every row exactly once.

Rows wider than a power of two are held as two tiles: a width of 192 is 128 + 64 (`split_width`).
"Split rows" below are a tuple of one or two tiles [ROWS, W0] and [ROWS, W1].

Parallelization: one program scans all boundaries and counts the tiles, CHUNK spans at a time. Then
one program per span writes the entries of its tiles.

Limit: latency, two launches of a few microseconds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv, next_power_of_2
from ..quant.groups import larger


class HeadRows(NamedTuple):
    """A tensor [rows, heads, width], or one head of it, as a kernel argument."""

    ptr: Tensor  # contiguous along the width
    row_stride: int  # elements
    head_stride: int  # elements
    width: int


class RaggedTile(NamedTuple):
    """An entry of the table: BLOCK rows of one sequence, and what they attend to."""

    first: tl.tensor  # first row of the tile
    end: tl.tensor  # row after the last of the sequence; the tile is empty if first >= end
    other_begin: tl.tensor  # first row of the sequence on the other side (keys for queries)
    other_end: tl.tensor  # row after its last one on the other side


def head_rows(x: Tensor) -> HeadRows:
    """The kernel argument for `x` [rows, heads, width]."""
    return HeadRows(x, x.stride(0), x.stride(1), x.shape[2])


def ragged_tiles(
    cu: Tensor, rows: int, other_cu: Tensor, other_rows: int, BLOCK: int, last_first: bool
) -> Tensor:
    """The table of tiles: int32 [num_tiles, 4], the fields of `RaggedTile`.

    Args:
        cu: int32 [B + 1], the boundaries of the sequences that are tiled.
        rows: rows of their tensor.
        other_cu: int32 [B + 1], the boundaries on the other side: keys for queries, or queries
            for keys.
        other_rows: rows of that tensor.
        BLOCK: rows of a tile.
        last_first: whether the last tile of a sequence comes first. Tiles with the most work
            should come first.
    """
    num_spans = cu.shape[0] + 1
    num_tiles = cdiv(rows, BLOCK) + num_spans - 1
    spans = torch.empty(5, num_spans, dtype=torch.int32, device=cu.device)
    tiles = torch.empty(num_tiles, 4, dtype=torch.int32, device=cu.device)
    ragged_spans_kernel[(1,)](
        cu, other_cu, spans, num_spans, rows, other_rows, BLOCK=BLOCK, CHUNK=1024
    )
    ragged_tiles_kernel[(num_spans,)](
        spans, tiles, num_spans, num_tiles, BLOCK=BLOCK, LAST_FIRST=last_first
    )
    return tiles


@triton.jit(do_not_specialize=["num_spans", "rows", "other_rows"])
def ragged_spans_kernel(
    cu_ptr,  # int32 [B + 1]
    other_cu_ptr,  # int32 [B + 1]
    spans_ptr,  # int32 [5, num_spans]: first row, end, other begin, other end, preceding tiles
    num_spans,  # B + 2: the rows before the first sequence, B sequences, the rows after the last
    rows,
    other_rows,
    BLOCK: tl.constexpr,  # rows of a tile
    CHUNK: tl.constexpr,  # spans per step
):
    last_end, last_other_end, num_tiles = 0, 0, 0
    for start in range(0, num_spans, CHUNK):
        span = start + tl.arange(0, CHUNK)
        first, end = span_bounds(cu_ptr, span, num_spans, rows, last_end)
        other_begin, other_end = span_bounds(
            other_cu_ptr, span, num_spans, other_rows, last_other_end
        )
        last_end, last_other_end = tl.max(end, 0), tl.max(other_end, 0)
        is_sequence = (span > 0) & (span < num_spans - 1)
        count = tl.cdiv(end - first, BLOCK)
        mask = span < num_spans
        tl.store(spans_ptr + span, first, mask=mask)
        tl.store(spans_ptr + num_spans + span, end, mask=mask)
        tl.store(spans_ptr + 2 * num_spans + span, tl.where(is_sequence, other_begin, 0), mask=mask)
        tl.store(spans_ptr + 3 * num_spans + span, tl.where(is_sequence, other_end, 0), mask=mask)
        preceding = num_tiles + tl.cumsum(count, 0) - count
        tl.store(spans_ptr + 4 * num_spans + span, preceding, mask=mask)
        num_tiles += tl.sum(count, 0)


@triton.jit
def span_bounds(
    cu_ptr,  # int32 [num_spans - 1]
    span,  # [CHUNK]
    num_spans,
    rows,
    last_end,  # end of the preceding span
):
    """First row and end of each span, clamped to [0, rows] and ascending."""
    first = tl.load(cu_ptr + span - 1, mask=(span > 0) & (span < num_spans), other=0)
    first = tl.where(span < num_spans, tl.minimum(tl.maximum(first, 0), rows), rows)
    first = tl.maximum(tl.associative_scan(first, 0, larger), last_end)
    end = tl.load(cu_ptr + span, mask=span < num_spans - 1, other=rows)
    return first, tl.maximum(first, tl.minimum(end, rows))


@triton.jit(do_not_specialize=["num_spans", "num_tiles"])
def ragged_tiles_kernel(
    spans_ptr,  # int32 [5, num_spans], of `ragged_spans_kernel`
    tiles_ptr,  # int32 [num_tiles, 4]
    num_spans,
    num_tiles,  # entries of the table
    BLOCK: tl.constexpr,  # rows of a tile
    LAST_FIRST: tl.constexpr,
):
    """One program writes the tiles of a span; the last program also writes the empty entries."""
    span = tl.program_id(0)
    first, end = tl.load(spans_ptr + span), tl.load(spans_ptr + num_spans + span)
    other_begin = tl.load(spans_ptr + 2 * num_spans + span)
    other_end = tl.load(spans_ptr + 3 * num_spans + span)
    preceding = tl.load(spans_ptr + 4 * num_spans + span)
    count = tl.cdiv(end - first, BLOCK)
    for start in range(0, count, 128):
        i = start + tl.arange(0, 128)
        entry = tiles_ptr + 4 * (preceding + (count - 1 - i if LAST_FIRST else i))
        tl.store(entry, first + i * BLOCK, mask=i < count)
        tl.store(entry + 1, tl.zeros_like(i) + end, mask=i < count)
        tl.store(entry + 2, tl.zeros_like(i) + other_begin, mask=i < count)
        tl.store(entry + 3, tl.zeros_like(i) + other_end, mask=i < count)
    if span == num_spans - 1:
        for start in range(4 * (preceding + count), 4 * num_tiles, 512):
            i = start + tl.arange(0, 512)
            tl.store(tiles_ptr + i, tl.zeros_like(i), mask=i < 4 * num_tiles)


@triton.jit
def program_tile(
    tiles_ptr,  # int32 [num_tiles, 4], of ragged_tiles
    num_tiles,
):
    """The head (int64) and the RaggedTile of this program. The tiles of a head are consecutive."""
    head = (tl.program_id(0) // num_tiles).to(tl.int64)
    entry = tiles_ptr + 4 * (tl.program_id(0) % num_tiles)
    first, end = tl.load(entry), tl.load(entry + 1)
    return head, RaggedTile(first, end, tl.load(entry + 2), tl.load(entry + 3))


def split_width(width: int) -> tuple[int, int]:
    """The widths of one or two tiles that hold `width` columns: powers of two, the second may be 0.

    Two are used where they have fewer columns than one: 192 = 128 + 64.
    """
    whole = max(next_power_of_2(width), 16)
    rest = max(next_power_of_2(max(width - whole // 2, 1)), 16)
    return (whole // 2, rest) if whole // 2 + rest < whole else (whole, 0)


@triton.jit
def select_head(x, head):
    """Head `head` (int64) of a HeadRows."""
    return HeadRows(x.ptr + head * x.head_stride, x.row_stride, x.head_stride, x.width)


@triton.jit
def select_contiguous_head(ptr, heads, head, width):
    """Head `head` (int64) of a contiguous [rows, heads, width].

    The kernels take their outputs as pointers: with strides as arguments of their own, ptxas uses
    up to 12 more registers in mla_prefill_backward_dkv_kernel on sm_100.
    """
    return HeadRows(ptr + head * width, heads * width, width, width)


@triton.jit
def load_split_rows(
    x,  # HeadRows, one head
    row,  # int32 [ROWS]
    row_mask,  # [ROWS]; used with MASKED
    MASKED: tl.constexpr,  # rows outside row_mask are zeros and are not read
    EVEN: tl.constexpr,  # the width is W0 + W1; otherwise columns past the width are zeros
    W0: tl.constexpr,
    W1: tl.constexpr,
):
    """Rows of x as split rows: [ROWS, W0] and, unless W1 is 0, [ROWS, W1]."""
    row_ptrs = x.ptr + row.to(tl.int64)[:, None] * x.row_stride
    tiles = ()
    for i in tl.static_range(2 if W1 > 0 else 1):
        column = (i * W0 + tl.arange(0, W1 if i == 1 else W0))[None, :]
        if MASKED:
            mask = row_mask[:, None] & ((column < x.width) | EVEN)
            values = tl.load(row_ptrs + column, mask=mask, other=0.0)
        elif EVEN:
            values = tl.load(row_ptrs + column)
        else:
            mask = (row >= 0)[:, None] & (column < x.width)
            values = tl.load(row_ptrs + column, mask=mask, other=0.0)
        tiles = tiles + (values,)
    return tiles


@triton.jit
def store_split_rows(
    x,  # HeadRows, one head
    row,  # int32 [ROWS]
    row_mask,  # [ROWS]
    tiles,  # split rows
    EVEN: tl.constexpr,  # as in load_split_rows
    W0: tl.constexpr,
):
    """Writes split rows to x, in its dtype."""
    row_ptrs = x.ptr + row.to(tl.int64)[:, None] * x.row_stride
    for i in tl.static_range(len(tiles)):
        column = (i * W0 + tl.arange(0, tiles[i].shape[1]))[None, :]
        mask = row_mask[:, None] & ((column < x.width) | EVEN)
        tl.store(row_ptrs + column, tiles[i].to(x.ptr.dtype.element_ty), mask=mask)


@triton.jit
def zero_split_rows(ROWS: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr):
    """Split rows of fp32 zeros."""
    tiles = (tl.zeros((ROWS, W0), tl.float32),)
    if W1 > 0:
        tiles = tiles + (tl.zeros((ROWS, W1), tl.float32),)
    return tiles


@triton.jit
def scale_split_rows(tiles, factor):
    """tiles · factor, for a scalar or [ROWS, 1]."""
    scaled = ()
    for i in tl.static_range(len(tiles)):
        scaled = scaled + (tiles[i] * factor,)
    return scaled


@triton.jit
def dot_split_rows(a, b, PRECISION: tl.constexpr):
    """a · bᵀ of split rows: fp32 [rows of a, rows of b]."""
    product = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    if len(a) > 1:
        product = tl.dot(a[1], tl.trans(b[1]), product, input_precision=PRECISION)
    return product


@triton.jit
def add_dot_split_rows(acc, a, b, PRECISION: tl.constexpr):
    """acc + a · b, where a is [M, N], and b [N, ...] and acc [M, ...] are split rows."""
    tiles = ()
    for i in tl.static_range(len(b)):
        tiles = tiles + (tl.dot(a, b[i], acc[i], input_precision=PRECISION),)
    return tiles
