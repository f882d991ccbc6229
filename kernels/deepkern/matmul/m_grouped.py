"""Shared by the m-grouped FP8 GEMMs, contiguous and masked: rows of group g times b[g]ᵀ.

    d[m] = a[m] · b[g]ᵀ  with block scales, for every row m of group g

Parallelization: the kernel is persistent. Each program loops over the output tiles of all groups
and finds the group of a tile from a prefix sum of the groups' tile counts. The tiles of a group
start at the group's first row, so groups need no alignment and an empty group costs nothing. Group
sizes are on the device, and the host does not read them.

Limit: many rows per group are bound by the tensor core, few by the bandwidth of reading each b[g].

Source: DeepGEMM's m-grouped GEMMs; `block_scaled_gemm.py` for the mainloop.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv, next_power_of_2
from ..quant.fp8 import BLOCK
from ..runtime import arch
from ..runtime.contract import check_that
from ..runtime.tiles import GemmTile, choose_gemm_tile
from .block_scaled_gemm import (
    KRange,
    TileRows,
    compute_tile,
    gemm_operand,
    index_type,
    rows_per_scale,
    swizzle_tile,
)


def choose_m_grouped_tile(a: Tensor, b: Tensor, b_scale: Tensor, rows_per_group: int) -> GemmTile:
    """The tile for groups of about `rows_per_group` rows each."""
    G, N, K = b.shape
    groups = G if a.dim() == 3 else min(G, len(a))  # groups that can have rows
    target, b_rows = arch.of(a.device), rows_per_scale(b, b_scale)
    rows = max(rows_per_group, 1)
    return choose_gemm_tile(target, rows, N, K, b_rows, groups=max(groups, 1), variant="m_grouped")


def launch_m_grouped_gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    out: Tensor,
    tile: GemmTile,
    group_index: Tensor | None,
    group_bounds: Tensor,
) -> None:
    """Writes the rows of `out` that belong to a group.

    Contiguous layout: a [M, K], out [M, N], `group_index` int32 [M], and `group_bounds` int32
    [2, G] as `find_group_bounds` returns them. A program writes a row only if `group_index` names
    its group. Masked layout: a [G, M, K], out [G, M, N], `group_index` None, and `group_bounds`
    int32 [G], the number of valid rows.
    """
    target = arch.of(a.device)
    (G, N, K), M = b.shape, a.shape[-2]
    a_operand, a_desc = gemm_operand(a, a_scale, target, tile.BLOCK_M)
    b_operand, b_desc = gemm_operand(b, b_scale, target, tile.BLOCK_N)
    m_grouped_fp8_gemm_nt_kernel[(grid_size(a, b, tile),)](
        a_operand, a_desc, b_operand, b_desc, out, group_index, group_bounds, M, N, K, G,
        GROUPS=max(8, next_power_of_2(G)), SWAPPED=tile.swapped,
        B_ROWS_PER_SCALE=rows_per_scale(b, b_scale),
        TAIL=K % BLOCK != 0 and a_desc is None, NATIVE_FP8=target.native_fp8,
        INDEX=index_type(a_operand, b_operand), BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N,
        GROUP_M=tile.GROUP_M, FLATTEN=target.tma, **tile.options(target),
    )  # fmt: skip


def grid_size(a: Tensor, b: Tensor, tile: GemmTile) -> int:
    """Programs of a persistent launch over the tiles of all groups."""
    G, N, _ = b.shape
    # Upper bound of the row tiles: all full ones, and one partial tile per group.
    num_rows = a[..., 0].numel()
    row_tiles = num_rows // tile.BLOCK_M + min(G, num_rows)
    return tile.grid(arch.of(a.device), row_tiles * cdiv(N, tile.BLOCK_N))


@triton.jit
def load_group_bounds(group_index_ptr, group_bounds_ptr, M, G, GROUPS: tl.constexpr):
    """The first row of each group and the row after its last: two int32 [GROUPS]."""
    group = tl.arange(0, GROUPS)
    if group_index_ptr is not None:
        first = M - tl.load(group_bounds_ptr + group, mask=group < G, other=0)
        return first, tl.load(group_bounds_ptr + G + group, mask=group < G, other=0)
    else:
        rows = tl.load(group_bounds_ptr + group, mask=group < G, other=0)
        return tl.zeros((GROUPS,), tl.int32), tl.minimum(tl.maximum(rows, 0), M)


@triton.jit
def find_group_tile(
    row_block,
    first,  # int32 [GROUPS], here and below; see load_group_bounds
    end,
    tiles,  # row tiles of a group
    first_tile,
    BLOCK_M: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """The group of a row tile (int64), its first row and the number of its rows."""
    is_group = (row_block >= first_tile) & (row_block < first_tile + tiles)  # exactly one is true
    group = tl.sum(tl.where(is_group, tl.arange(0, GROUPS), 0), 0)
    first_row = first + (row_block - first_tile) * BLOCK_M
    first_row = tl.sum(tl.where(is_group, first_row, 0), 0)
    valid_rows = tl.sum(tl.where(is_group, end, 0), 0) - first_row
    return tl.cast(group, tl.int64), first_row, valid_rows


@triton.jit(do_not_specialize=["M", "G"])
def m_grouped_fp8_gemm_nt_kernel(
    a,  # Operand [M, K], or [G, M, K]
    a_desc,  # its TMA descriptor, or None
    b,  # Operand [G, N, K]
    b_desc,
    out_ptr,  # [M, N], or [G, M, N]
    group_index_ptr,  # int32 [M], or None for the masked layout
    group_bounds_ptr,  # int32 [2, G] or [G]; see launch_m_grouped_gemm
    M,
    N,
    K,
    G,
    GROUPS: tl.constexpr,  # power of two, at least G
    SWAPPED: tl.constexpr,  # b is the left operand of the matrix instruction
    B_ROWS_PER_SCALE: tl.constexpr,  # 1 or 128
    TAIL: tl.constexpr,  # K may end within a block; TMA fills it up with zeros instead
    NATIVE_FP8: tl.constexpr,
    INDEX: tl.constexpr,  # type of offsets within a tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,  # tile rows per L2 group
    FLATTEN: tl.constexpr,  # pipeline across output tiles
):
    first, end = load_group_bounds(group_index_ptr, group_bounds_ptr, M, G, GROUPS)
    tiles = (tl.maximum(end - first, 0) + BLOCK_M - 1) // BLOCK_M  # row tiles of a group, [GROUPS]
    first_tile = tl.cumsum(tiles, 0) - tiles  # [GROUPS]
    tile_rows, tile_columns = tl.sum(tiles, 0), tl.cdiv(N, BLOCK_N)
    k_range = KRange(0, 0, K // 128 if TAIL else tl.cdiv(K, 128), K, K, 0)
    num_tiles = tile_rows * tile_columns
    for t in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=FLATTEN):
        row_block, column_block = swizzle_tile(t, tile_rows, tile_columns, GROUP_M)
        group, first_row, valid_rows = find_group_tile(
            row_block, first, end, tiles, first_tile, BLOCK_M, GROUPS
        )
        first_column = column_block * BLOCK_N
        # The matrix of a; an int64 zero, because both branches must have one type.
        a_group = group * 0 if group_index_ptr is not None else group
        a_matrix_row, b_matrix_row = (a_group * M).to(tl.int32), (group * N).to(tl.int32)
        a_rows = TileRows(first_row, valid_rows, a_matrix_row, a_group * a.scale_matrix_stride)
        b_rows = TileRows(
            first_column, N - first_column, b_matrix_row, group * b.scale_matrix_stride
        )
        acc = compute_tile(
            a, a_desc, a_rows, b, b_desc, b_rows, k_range, BLOCK_M, BLOCK_N, B_ROWS_PER_SCALE,
            SWAPPED, TAIL, False, NATIVE_FP8, INDEX,
        )  # fmt: skip
        # Epilogue.
        m, column = tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
        row = a_group * M + first_row + m
        row_mask = m < valid_rows
        if group_index_ptr is not None:
            # The row range of a group can contain skipped rows, and rows of other groups if
            # group_index is not sorted.
            row_mask &= tl.load(group_index_ptr + row, mask=row_mask, other=-1) == group
        mask = row_mask[:, None] & (column < N)[None, :]
        out_ptrs = out_ptr + row[:, None] * N + column[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def find_group_bounds(group_index: Tensor, G: int, out: Tensor) -> Tensor:
    """The row range of each group, int32 [2, G]; also zeros the rows of `out` in no group.

    bounds[0, g] = M - first row of g, bounds[1, g] = last row of g + 1; both 0 for an empty group.
    The first row is counted from the end, so that atomic_max finds it and zeros mean empty.
    """
    group_bounds = group_index.new_zeros(2, G)
    M, N = out.shape
    m_grouped_find_group_bounds_kernel[(cdiv(M, 128), 8)](group_index, group_bounds, out, M, N, G)
    return group_bounds


@triton.jit(do_not_specialize=["M", "G"])
def m_grouped_find_group_bounds_kernel(
    group_index_ptr,  # int32 [M]
    group_bounds_ptr,  # int32 [2, G], zeros at the start
    out_ptr,  # [M, N]
    M,
    N,
    G,
):
    """Only rows at which `group_index` changes use atomics. Their maxima do not depend on order."""
    row = tl.program_id(0) * 128 + tl.arange(0, 128)
    group = tl.load(group_index_ptr + row, mask=row < M, other=0)
    valid = (group >= 0) & (group < G)
    zero_rows(out_ptr, row, (row < M) & (valid == 0), N)
    if tl.program_id(1) == 0:
        valid &= row < M
        previous = tl.load(group_index_ptr + row - 1, mask=(row > 0) & (row < M), other=-1)
        following = tl.load(group_index_ptr + row + 1, mask=row + 1 < M, other=-1)
        tl.atomic_max(group_bounds_ptr + group, M - row, mask=valid & (previous != group))
        tl.atomic_max(group_bounds_ptr + G + group, row + 1, mask=valid & (following != group))


def check_group_index(op: str, group_index: Tensor, G: int) -> None:
    """For DEEPKERN_DEBUG=1: the values of group_index ascend and are in [-1, G)."""
    found = group_index[group_index != -1]
    outside = found[(found < 0) | (found >= G)]
    expected = f"values from -1 to {G - 1}"
    check_that(op, "group_index", not len(outside), expected, outside[:1].tolist())
    expected = "ascending values, or -1"
    check_that(op, "group_index", bool((found.diff() >= 0).all()), expected, found.tolist())


def zero_masked_rows(masked_m: Tensor, out: Tensor) -> None:
    """Zeros the rows of `out` [G, M, N] from masked_m[g] on."""
    G, M, N = out.shape
    m_grouped_zero_masked_rows_kernel[(cdiv(M, 128), 8, G)](masked_m, out, M, N)


@triton.jit
def m_grouped_zero_masked_rows_kernel(
    masked_m_ptr,  # int32 [G]
    out_ptr,  # [G, M, N]
    M,
    N,
):
    group = tl.cast(tl.program_id(2), tl.int64)
    row = tl.program_id(0) * 128 + tl.arange(0, 128)
    masked_m = tl.load(masked_m_ptr + group)
    zero_rows(out_ptr + group * M * N, row, (row >= masked_m) & (row < M), N)


@triton.jit
def zero_rows(
    out_ptr,  # [_, N]
    row,  # int32 [128]
    mask,  # [128], rows to zero
    N,
):
    """Zeros rows in every eighth block of 128 columns, from block program_id(1) on."""
    if tl.max(mask.to(tl.int32), 0) > 0:
        row_ptrs = out_ptr + row.to(tl.int64)[:, None] * N
        for start in range(tl.program_id(1) * 128, N, 8 * 128):
            column = start + tl.arange(0, 128)
            zeros = tl.zeros((128, 128), out_ptr.dtype.element_ty)
            tl.store(row_ptrs + column[None, :], zeros, mask=mask[:, None] & (column < N)[None, :])
