"""Sequences of different lengths, end to end in one tensor, cut into tiles on the device.

`cu_seqlens` says where they begin, and the host does not know what it holds. So `cut` writes a
table of tiles: never more than ceil(rows / BLOCK) + B + 1, which bounds the grid. Each sequence is
cut from its own first row on, so that where a row stands in its tile is its sequence's own matter.

The contents are not trusted. They count as `quant/groups.py` repairs them: clamped to the tensor,
then raised to the largest one before. Rows before the first and past the last sequence come in
tiles of their own, which have nothing to attend to: the table covers every row exactly once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quant.groups import group_spans


def cut(cu: Tensor, rows: int, other_cu: Tensor, other_rows: int, BLOCK: int, last_first: bool):
    """int32 [tiles, 4]: a tile's first row, its sequence's end, and its begin and end on the other
    side (keys for queries, queries for keys). What the tiles do not fill is (0, 0, 0, 0).

    last_first: whether the last tile of a sequence comes first; put the longest work there.
    """
    B = cu.shape[0] - 1
    slots = triton.cdiv(rows, BLOCK) + B + 1
    tiles = torch.empty(slots, 4, dtype=torch.int32, device=cu.device)
    cut_kernel[(B + 2,)](
        cu, other_cu, tiles, B, rows, other_rows, slots,
        BLOCK=BLOCK, LAST_FIRST=last_first, GROUPS=triton.next_power_of_2(max(B, 1)), num_warps=4,
    )  # fmt: skip
    return tiles


@triton.jit(do_not_specialize=["B", "rows", "other_rows", "slots"])
def cut_kernel(
    cu_ptr, other_cu_ptr, tiles_ptr, B, rows, other_rows, slots,
    BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Program s cuts sequence s - 1; the first the rows before all, the last those after them."""
    sequence = tl.program_id(0) - 1
    group = tl.arange(0, GROUPS)
    own = group == sequence  # nowhere, before the first
    first, last = group_spans(cu_ptr, B, rows, GROUPS)
    lead = tl.min(first, 0)
    begin = tl.sum(tl.where(own, first, 0), 0)
    end = tl.where(sequence < 0, lead, tl.sum(tl.where(own, last, 0), 0))
    begin = tl.where(sequence < B, begin, tl.max(last, 0))
    end = tl.where(sequence < B, end, rows)
    before = tl.sum(tl.where(group < sequence, tl.cdiv(last - first, BLOCK), 0), 0)
    before += tl.where(sequence < 0, 0, tl.cdiv(lead, BLOCK))
    other_first, other_last = group_spans(other_cu_ptr, B, other_rows, GROUPS)
    other_begin = tl.sum(tl.where(own, other_first, 0), 0)
    other_end = tl.sum(tl.where(own, other_last, 0), 0)

    count = tl.cdiv(end - begin, BLOCK)
    for start in range(0, count, 128):
        i = start + tl.arange(0, 128)
        at = before + (count - 1 - i if LAST_FIRST else i)
        entry = tiles_ptr + 4 * at
        tl.store(entry, begin + i * BLOCK, mask=i < count)
        tl.store(entry + 1, tl.zeros_like(i) + end, mask=i < count)
        tl.store(entry + 2, tl.zeros_like(i) + other_begin, mask=i < count)
        tl.store(entry + 3, tl.zeros_like(i) + other_end, mask=i < count)
    if sequence == B:
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
    whole = max(triton.next_power_of_2(width), 16)
    rest = max(triton.next_power_of_2(max(width - whole // 2, 1)), 16)
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
