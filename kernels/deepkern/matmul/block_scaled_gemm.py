"""Shared by all FP8 GEMMs: operands as kernel arguments, and the block-scaled mainloop of one tile.

    tile[r, c] = Σ_j x_scale[r, j] · y_scale[c, j] · Σ_{k in block j} x[r, k] · y[c, k]

Parallelization: one call computes one [X_ROWS, Y_ROWS] tile in one program.

The tensor core computes the inner sum over one block of 128 values of K. One fused multiply-add
per value then scales it and adds it to a float32 accumulator. This is called promotion: Hopper's
FP8 tensor core keeps about 14 bits of a sum, so a sum over all of K must not stay in it. The
mainloop is pipelined: the loads of the next tiles are in flight, through TMA where available.

Limit: the tensor core for large tiles, L2 bandwidth for small ones.

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
    """FP8 rows along K with their scales, as a kernel argument. Strides are in elements.

    Several matrices are stacked: matrix g starts at row g · rows. The tensor descriptor of `matrix`
    is a kernel argument of its own, because the launcher of Triton 3.6 and 3.7 does not find
    descriptors inside tuples.
    """

    matrix: Tensor  # FP8 or its bytes [matrices · rows, K]
    row_stride: int
    k_stride: int
    scale: Tensor  # fp32 [matrices, rows or ceil(rows / 128), ceil(K / 128)]
    scale_matrix_stride: int
    scale_row_stride: int
    scale_block_stride: int


class TileRows(NamedTuple):
    """The rows of an operand that a tile covers."""

    first: tl.tensor  # first row, counted within its matrix
    valid: tl.tensor  # rows of the tile that exist; the others are masked
    matrix_row: tl.tensor  # row of `Operand.matrix` at which the matrix starts
    scale_offset: tl.tensor  # element of `Operand.scale` at which its scales start


class KRange(NamedTuple):
    """The range of K that a tile sums over."""

    start: tl.tensor  # first column
    first_block: tl.tensor  # index of the scale block at `start`
    num_blocks: tl.tensor  # whole blocks of 128; they need a `start` divisible by 16
    length: tl.tensor  # columns; what exceeds the whole blocks is summed with masks (TAIL)
    width: tl.tensor  # columns of the matrices
    blocks_per_split: tl.tensor  # blocks that are summed separately (SPLIT)


def gemm_operand(
    x: Tensor, scale: Tensor, target: Arch, tile_rows: int
) -> tuple[Operand, TensorDescriptor | None]:
    """The kernel arguments for `x` [..., rows, K]: the operand, and its TMA descriptor or None.

    `x` is copied first if `target` cannot read its layout. The descriptor loads tiles of
    [tile_rows, 128].
    """
    values = as_bits(k_major(x, target), target.native_fp8)
    descriptor = None
    if target.tma:
        shape = list(values.shape)
        # The pitch of a single row is never used, but the driver checks it.
        pitch = values.stride(0) if len(values) > 1 else -(-shape[1] // 16) * 16
        descriptor = TensorDescriptor(values, shape, [pitch, 1], [tile_rows, BLOCK])
    scale_strides = scale.stride() if scale.dim() == 3 else (0, *scale.stride())
    return Operand(values, *values.stride(), scale, *scale_strides), descriptor


def check_b_scale(op: str, b: Tensor, b_scale: Tensor, argument: str = "b_scale") -> None:
    """Checks that the scales of b [..., N, K] are one per 128x128 or one per 1x128."""
    N, blocks = b.shape[-2], -(-b.shape[-2] // BLOCK)
    if b_scale.shape[-2] in (blocks, N):
        return
    expected = f"[N/128, K/128] or [N, K/128], so {blocks} or {N} rows"
    check_that(op, argument, False, expected, f"shape {tuple(b_scale.shape)}")


def rows_per_scale(b: Tensor, b_scale: Tensor) -> int:
    """The number of rows of b [..., N, K] that one scale covers: 1 or 128."""
    return 1 if b_scale.shape[-2] == b.shape[-2] else BLOCK


def index_type(*operands: Operand) -> tl.dtype:
    """Integer type of offsets within a tile: int64 if a stride is 2^24 elements or more."""
    largest = max(max(x.row_stride, x.k_stride, x.scale_row_stride) for x in operands)
    return tl.int64 if largest >= 2**24 else tl.int32


@triton.jit
def compute_tile(
    a,  # Operand
    a_desc,  # its TMA descriptor, or None
    a_rows,  # TileRows
    b,
    b_desc,
    b_rows,
    k_range,  # KRange
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    B_ROWS_PER_SCALE: tl.constexpr,  # 1 or 128
    SWAPPED: tl.constexpr,  # b is the left operand of the matrix instruction
    TAIL: tl.constexpr,  # K may end within a block
    SPLIT: tl.constexpr,  # sum `blocks_per_split` blocks at a time, then add the sums in order
    NATIVE_FP8: tl.constexpr,
    INDEX: tl.constexpr,  # see index_type
):
    """The float32 tile [BLOCK_M, BLOCK_N] of a·bᵀ; with SWAPPED computed as (b·aᵀ)ᵀ."""
    if SWAPPED:
        return block_scaled_mainloop(
            b, b_desc, b_rows, a, a_desc, a_rows, k_range, BLOCK_N, BLOCK_M,
            B_ROWS_PER_SCALE, 1, TAIL, SPLIT, NATIVE_FP8, INDEX,
        ).T  # fmt: skip
    else:
        return block_scaled_mainloop(
            a, a_desc, a_rows, b, b_desc, b_rows, k_range, BLOCK_M, BLOCK_N,
            1, B_ROWS_PER_SCALE, TAIL, SPLIT, NATIVE_FP8, INDEX,
        )  # fmt: skip


@triton.jit
def block_scaled_mainloop(
    x, x_desc, x_rows, y, y_desc, y_rows, k_range,
    X_ROWS: tl.constexpr, Y_ROWS: tl.constexpr,
    X_ROWS_PER_SCALE: tl.constexpr, Y_ROWS_PER_SCALE: tl.constexpr, TAIL: tl.constexpr,
    SPLIT: tl.constexpr, NATIVE_FP8: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """The float32 tile [X_ROWS, Y_ROWS] of x·yᵀ over `k_range`. Parameters as in `compute_tile`."""
    r, c, k = tl.arange(0, X_ROWS).to(INDEX), tl.arange(0, Y_ROWS).to(INDEX), tl.arange(0, 128)
    x_mask, y_mask = (r < x_rows.valid)[:, None], (c < y_rows.valid)[:, None]
    x_row, y_row = x_rows.first + x_rows.matrix_row, y_rows.first + y_rows.matrix_row
    # Pointers to the first value of each row: [X_ROWS, 1] and [Y_ROWS, 1].
    x_row_ptrs = x.matrix + tl.cast(x_row, tl.int64) * x.row_stride + r[:, None] * x.row_stride
    y_row_ptrs = y.matrix + tl.cast(y_row, tl.int64) * y.row_stride + c[:, None] * y.row_stride
    start = k_range.start // 16 * 16  # makes the alignment visible to the compiler
    x_ptrs = x_row_ptrs + tl.cast(start, tl.int64) * x.k_stride + k[None, :] * x.k_stride
    y_ptrs = y_row_ptrs + tl.cast(start, tl.int64) * y.k_stride + k[None, :] * y.k_stride

    acc = tl.zeros((X_ROWS, Y_ROWS), tl.float32)
    sum_of_splits = acc
    for j in range(0, k_range.num_blocks):
        if SPLIT:
            if j % k_range.blocks_per_split == 0:
                sum_of_splits += acc
                acc = tl.zeros((X_ROWS, Y_ROWS), tl.float32)
        if x_desc is not None:
            x_values = x_desc.load([x_row, start + j * 128])  # zeros out of bounds
            y_values = y_desc.load([y_row, start + j * 128])
        else:
            offset = tl.cast(j * 128, tl.int64)
            x_values = tl.load(x_ptrs + offset * x.k_stride, mask=x_mask, other=0.0)
            y_values = tl.load(y_ptrs + offset * y.k_stride, mask=y_mask, other=0.0)
        x_values = matrix_operand(x_values, NATIVE_FP8)
        y_values = matrix_operand(y_values, NATIVE_FP8)
        scale = block_scales_product(
            x, x_rows, r, y, y_rows, c, k_range.first_block + j, X_ROWS_PER_SCALE, Y_ROWS_PER_SCALE
        )
        acc = tl.fma(tl.dot(x_values, y_values.T), scale, acc)
    if TAIL:
        for j in tl.range(k_range.num_blocks, tl.cdiv(k_range.length, 128), num_stages=1):
            if SPLIT:
                if j % k_range.blocks_per_split == 0:
                    sum_of_splits += acc
                    acc = tl.zeros((X_ROWS, Y_ROWS), tl.float32)
            first = k_range.start + j * 128
            end = k_range.start + tl.minimum(j * 128 + 128, k_range.length)
            block_sum = tl.zeros((X_ROWS, Y_ROWS), tl.float32)
            for i in tl.static_range(5):  # a block that is not 16-byte aligned overlaps 5 pieces
                block_sum = dot_32_columns(
                    block_sum, x, x_row_ptrs, x_mask, y, y_row_ptrs, y_mask,
                    first // 16 + 2 * i, first, end, k_range.width, NATIVE_FP8,
                )  # fmt: skip
            scale = block_scales_product(
                x, x_rows, r, y, y_rows, c, k_range.first_block + j,
                X_ROWS_PER_SCALE, Y_ROWS_PER_SCALE,
            )  # fmt: skip
            acc = tl.fma(block_sum, scale, acc)
    if SPLIT:
        acc += sum_of_splits
    return acc


@triton.jit
def dot_32_columns(
    acc,  # float32 [X_ROWS, Y_ROWS]
    x,
    x_row_ptrs,  # [X_ROWS, 1]
    x_mask,  # [X_ROWS, 1]
    y,
    y_row_ptrs,
    y_mask,
    sixteenth,  # the piece starts at column 16 · sixteenth
    start,  # columns outside [start, end) count as zeros
    end,
    width,  # columns of the matrices
    NATIVE_FP8: tl.constexpr,
):
    """acc + x·yᵀ over 32 columns. Loads start at multiples of 16 bytes, whatever `start` is."""
    column = sixteenth * 16 + tl.arange(0, 32)
    loaded = (column < tl.cdiv(width, 16) * 16)[None, :]
    counted = ((column >= start) & (column < end))[None, :]
    column = column.to(tl.int64)[None, :]
    x_values = tl.load(x_row_ptrs + column * x.k_stride, mask=x_mask & loaded, other=0.0)
    y_values = tl.load(y_row_ptrs + column * y.k_stride, mask=y_mask & loaded, other=0.0)
    x_values = tl.where(counted, x_values, tl.zeros_like(x_values))
    y_values = tl.where(counted, y_values, tl.zeros_like(y_values))
    x_values = matrix_operand(x_values, NATIVE_FP8)
    y_values = matrix_operand(y_values, NATIVE_FP8)
    return tl.dot(x_values, y_values.T, acc)


@triton.jit
def block_scales_product(
    x, x_rows, r, y, y_rows, c, block,
    X_ROWS_PER_SCALE: tl.constexpr, Y_ROWS_PER_SCALE: tl.constexpr,
):  # fmt: skip
    """x_scale · y_scale of block `block` of K, in this order: [X_ROWS or 1, Y_ROWS or 1]."""
    ONE_LOAD: tl.constexpr = X_ROWS_PER_SCALE * Y_ROWS_PER_SCALE == 1 and r.shape[0] == 128
    if ONE_LOAD and c.shape[0] == 128:
        # Triton loads each of 256 scales once and passes them through shared memory. With two
        # loads each thread has 34 pointers, and 128x128 spills 416 bytes on sm_90.
        ptrs = tl.join(row_scales(x, x_rows, r, block), row_scales(y, y_rows, c, block))
        mask = tl.join(r < x_rows.valid, c < y_rows.valid)
        x_scale, y_scale = tl.split(tl.load(ptrs, mask=mask, other=0.0))
    else:
        x_scale = load_scales(x, x_rows, r, block, X_ROWS_PER_SCALE)
        y_scale = load_scales(y, y_rows, c, block, Y_ROWS_PER_SCALE)
    if X_ROWS_PER_SCALE == 1 and Y_ROWS_PER_SCALE == 1:
        return x_scale[:, None] * y_scale[None, :]
    elif X_ROWS_PER_SCALE == 1:
        return (x_scale * y_scale)[:, None]
    else:
        return (x_scale * y_scale)[None, :]


@triton.jit
def load_scales(x, rows, r, block, ROWS_PER_SCALE: tl.constexpr):
    """The scales of a tile's rows `r` in block `block` of K; one scalar if the rows share it."""
    if ROWS_PER_SCALE == 1:
        return tl.load(row_scales(x, rows, r, block), mask=r < rows.valid, other=0.0)
    else:
        ptr = x.scale + rows.scale_offset + tl.cast(block, tl.int64) * x.scale_block_stride
        row = tl.cast(rows.first // ROWS_PER_SCALE, tl.int64)
        return tl.load(ptr + row * x.scale_row_stride)


@triton.jit
def row_scales(x, rows, r, block):
    """Pointers to the scales of a tile's rows `r` in block `block` of K."""
    ptr = x.scale + rows.scale_offset + tl.cast(block, tl.int64) * x.scale_block_stride
    ptr += tl.cast(rows.first, tl.int64) * x.scale_row_stride
    return ptr + r * x.scale_row_stride


@triton.jit
def swizzle_tile(t, tile_rows, tile_columns, GROUP_M: tl.constexpr):
    """(row, column) of output tile `t`: column by column through groups of GROUP_M tile rows.

    Programs that run at the same time then share tiles of b in L2.
    """
    group = t // (GROUP_M * tile_columns)
    first_row = group * GROUP_M
    height = min(tile_rows - first_row, GROUP_M)
    within = t % (GROUP_M * tile_columns)
    return first_row + within % height, within // height
