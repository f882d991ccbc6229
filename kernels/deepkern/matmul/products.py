"""What every FP8 matrix product is made of: its operands, and a tile of block-scaled sums.

    tile[r, c] = Σ_j x_scale[r, j] · y_scale[c, j] · Σ_{k in block j} x[r, k] · y[c, k]

The inner sums, over 128 values of K, are the tensor core's; each is scaled and added to a float32
accumulator by one fused multiply-add ("promotion": Hopper's tensor core keeps some 14 bits of an
FP8 sum, so a sum over all of K must not stay in it). The steps along K are pipelined: the next
tiles are in flight, through TMA descriptors where the target has them, else by pointers.

Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.2; DeepGEMM.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..quant.fp8 import BLOCK, as_bits, matrix_operand
from ..runtime.arch import Arch
from ..runtime.contract import check_that
from .k_major import k_major


class Operand(NamedTuple):
    """FP8 rows of K and their scales, as a kernel takes them; matrices lie one under another."""

    matrix: Tensor  # [matrices * rows, K]
    tiles: TensorDescriptor | None  # reads [rows of a tile, 128] of it; None: by pointers
    row: int  # strides of the matrix
    column: int
    scale: Tensor  # [matrices, rows or rows/128, K/128]
    scale_matrix: int  # strides of the scales
    scale_row: int
    scale_block: int


def operand(x: Tensor, scale: Tensor, target: Arch, tile_rows: int) -> Operand:
    """`x` [..., rows, K] with `scale`, copied first if `target` cannot read it as it lies."""
    matrix = as_bits(k_major(x, target), target.native_fp8)
    tiles = None
    if target.tma:
        shape, strides = list(matrix.shape), list(matrix.stride())
        tiles = TensorDescriptor(matrix, shape, strides, [tile_rows, BLOCK])
    strides = scale.stride() if scale.dim() == 3 else (0, *scale.stride())
    return Operand(matrix, tiles, *matrix.stride(), scale, *strides)


def check_b_scale(name: str, b: Tensor, b_scale: Tensor, argument: str = "b_scale") -> None:
    """The scales of b [..., N, K] are one per 128x128, or one per 1x128."""
    N, per_block = b.shape[-2], -(-b.shape[-2] // BLOCK)
    if b_scale.shape[-2] in (per_block, N):
        return
    expected = f"[N/128, K/128] or [N, K/128], so {per_block} or {N} rows"
    got = f"shape {tuple(b_scale.shape)}"
    check_that(name, argument, False, expected, got)


def rows_of_a_scale(b: Tensor, b_scale: Tensor) -> int:
    """How many rows of b [..., N, K] share a scale: 1 or 128."""
    return 1 if b_scale.shape[-2] == b.shape[-2] else BLOCK


def index_type(*operands: Operand) -> tl.dtype:
    """What counts offsets within a tile: 32 bits, unless rows lie far apart."""
    farthest = max(max(x.row, x.column, x.scale_row) for x in operands)
    return tl.int64 if farthest >= 2**24 else tl.int32


@triton.jit
def products(
    a, a_tile, b, b_tile, part, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    B_BLOCK: tl.constexpr, SWAPPED: tl.constexpr, TMA: tl.constexpr, TAIL: tl.constexpr,
    SPLIT: tl.constexpr, NATIVE_FP8: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """The tile [BLOCK_M, BLOCK_N] of a·bᵀ over a part of K; SWAPPED computes b·aᵀ and turns it.

    a_tile, b_tile: (first row of the tile, rows of it that are inside, row at which the operand's
    matrix begins, element at which its scales begin). B_BLOCK: rows of b that share a scale, 1 or
    128; with 128 the tile lies within such rows.
    part: (first column, block of the scales there, whole blocks, length, columns of the matrices,
    blocks that are summed for themselves). With TAIL, what `length` has beyond the whole blocks
    follows; with SPLIT the last one counts. Whole blocks need a first column divisible by 16.
    """
    if SWAPPED:
        return scaled_products(b, b_tile, a, a_tile, part, BLOCK_N, BLOCK_M, B_BLOCK, 1,
                               TMA, TAIL, SPLIT, NATIVE_FP8, INDEX).T  # fmt: skip
    else:
        return scaled_products(a, a_tile, b, b_tile, part, BLOCK_M, BLOCK_N, 1, B_BLOCK,
                               TMA, TAIL, SPLIT, NATIVE_FP8, INDEX)  # fmt: skip


@triton.jit
def scaled_products(
    x, x_tile, y, y_tile, part, X_ROWS: tl.constexpr, Y_ROWS: tl.constexpr,
    X_BLOCK: tl.constexpr, Y_BLOCK: tl.constexpr, TMA: tl.constexpr, TAIL: tl.constexpr,
    SPLIT: tl.constexpr, NATIVE_FP8: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    r, c, k = tl.arange(0, X_ROWS).to(INDEX), tl.arange(0, Y_ROWS).to(INDEX), tl.arange(0, 128)
    x_inside, y_inside = (r < x_tile[1])[:, None], (c < y_tile[1])[:, None]
    x_row, y_row = x_tile[0] + x_tile[2], y_tile[0] + y_tile[2]
    k_first, block_first, blocks, length, width, split = part
    x_rows = x.matrix + tl.cast(x_row, tl.int64) * x.row + r[:, None] * x.row  # [X_ROWS, 1]
    y_rows = y.matrix + tl.cast(y_row, tl.int64) * y.row + c[:, None] * y.row  # [Y_ROWS, 1]
    first = k_first // 16 * 16  # so that the compiler sees it
    x_at = x_rows + tl.cast(first, tl.int64) * x.column + k[None, :] * x.column  # [X_ROWS, 128]
    y_at = y_rows + tl.cast(first, tl.int64) * y.column + k[None, :] * y.column  # [Y_ROWS, 128]

    sum = tl.zeros((X_ROWS, Y_ROWS), tl.float32)
    total = sum
    for j in range(0, blocks):
        if SPLIT:
            if j % split == 0:
                total += sum
                sum = tl.zeros((X_ROWS, Y_ROWS), tl.float32)
        if TMA:
            x_values = x.tiles.load([x_row, first + j * 128])  # rows outside are zeros
            y_values = y.tiles.load([y_row, first + j * 128])
        else:
            step = tl.cast(j * 128, tl.int64)
            x_values = tl.load(x_at + step * x.column, mask=x_inside, other=0.0)
            y_values = tl.load(y_at + step * y.column, mask=y_inside, other=0.0)
        x_values = matrix_operand(x_values, NATIVE_FP8)
        y_values = matrix_operand(y_values, NATIVE_FP8)
        scale = factors(x, x_tile, r, y, y_tile, c, block_first + j, X_BLOCK, Y_BLOCK)
        sum = tl.fma(tl.dot(x_values, y_values.T), scale, sum)
    if TAIL:
        for j in tl.range(blocks, tl.cdiv(length, 128), num_stages=1):
            if SPLIT:
                if j % split == 0:
                    total += sum
                    sum = tl.zeros((X_ROWS, Y_ROWS), tl.float32)
            start, end = k_first + j * 128, k_first + tl.minimum(j * 128 + 128, length)
            inside = (x_inside, y_inside, start, end)
            block_sum = tl.zeros((X_ROWS, Y_ROWS), tl.float32)
            for i in tl.static_range(5):
                sixteenth = start // 16 + 2 * i
                block_sum = add_part(
                    block_sum, x, x_rows, y, y_rows, inside, sixteenth, width, NATIVE_FP8
                )
            scale = factors(x, x_tile, r, y, y_tile, c, block_first + j, X_BLOCK, Y_BLOCK)
            sum = tl.fma(block_sum, scale, sum)
    if SPLIT:
        sum += total
    return sum


@triton.jit
def add_part(sum, x, x_rows, y, y_rows, inside, sixteenth, width, NATIVE_FP8: tl.constexpr):
    """Adds the products over those of 32 columns from 16·sixteenth on that are inside.

    inside: (rows of x, rows of y, first column, column after the last). Whatever these are, what is
    read lies at multiples of 16 bytes; the rest of it counts as zeros.
    """
    column = sixteenth * 16 + tl.arange(0, 32)
    there = (column < tl.cdiv(width, 16) * 16)[None, :]
    counts = ((column >= inside[2]) & (column < inside[3]))[None, :]
    column = column.to(tl.int64)[None, :]
    x_values = tl.load(x_rows + column * x.column, mask=inside[0] & there, other=0.0)
    y_values = tl.load(y_rows + column * y.column, mask=inside[1] & there, other=0.0)
    x_values = tl.where(counts, x_values, tl.zeros_like(x_values))
    y_values = tl.where(counts, y_values, tl.zeros_like(y_values))
    x_values = matrix_operand(x_values, NATIVE_FP8)
    y_values = matrix_operand(y_values, NATIVE_FP8)
    return tl.dot(x_values, y_values.T, sum)


@triton.jit
def factors(
    x, x_tile, r, y, y_tile, c, block, X_BLOCK: tl.constexpr, Y_BLOCK: tl.constexpr
):  # fmt: skip
    """x_scale · y_scale in a block of K, multiplied first: [X_ROWS or 1, Y_ROWS or 1]."""
    x_scale = scales(x, x_tile, r, block, X_BLOCK)
    y_scale = scales(y, y_tile, c, block, Y_BLOCK)
    if X_BLOCK == 1 and Y_BLOCK == 1:
        return x_scale[:, None] * y_scale[None, :]
    elif X_BLOCK == 1:
        return (x_scale * y_scale)[:, None]
    else:
        return (x_scale * y_scale)[None, :]


@triton.jit
def scales(x, tile, r, block, ROWS: tl.constexpr):
    """The scales of a tile's rows in a block of K, [..]; where ROWS share one, that one."""
    at = x.scale + tile[3] + tl.cast(block, tl.int64) * x.scale_block
    if ROWS == 1:
        at += tl.cast(tile[0], tl.int64) * x.scale_row
        return tl.load(at + r * x.scale_row, mask=r < tile[1], other=0.0)
    else:
        return tl.load(at + tl.cast(tile[0] // ROWS, tl.int64) * x.scale_row)


@triton.jit
def tile_in_bands(t, rows, columns, GROUP_M: tl.constexpr):
    """The row and column of tile `t` of rows x columns: down a band of GROUP_M rows, then right."""
    band = t // (GROUP_M * columns)
    first = band * GROUP_M
    height = min(rows - first, GROUP_M)
    within = t % (GROUP_M * columns)
    return first + within % height, within // height
