"""FP8 products of groups of rows with a matrix each: what the contiguous and masked forms share.

    d[m] = a[m] · b[g]ᵀ  with block scales, for every row m of group g

How many rows a group has is known on the device only. Cut: a group's rows are cut into tiles of
BLOCK_M from the group's first row on, so groups need no alignment, and empty ones cost nothing. As
many programs run as fit on the GPU; each goes through the tiles of all groups in strides, finding
the group of a tile from the groups' numbers of tiles, which it sums up once. Nothing is read back.

With many rows the tensor core is the limit, with few the reading of every b[g] that has any.

Source: DeepGEMM's m-grouped products; `products.py` for one tile.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..quant.fp8 import BLOCK
from ..runtime import arch
from ..runtime.integers import cdiv, next_power_of_2
from ..runtime.tiles import GemmTile, gemm_tile
from .products import index_type, operand, products, rows_of_a_scale, tile_in_bands


def choose_tile(a: Tensor, b: Tensor, b_scale: Tensor, rows: int) -> GemmTile:
    """The tile for groups that have about so many rows each."""
    G, N, K = b.shape
    groups = G if a.dim() == 3 else min(G, len(a))  # that may have rows
    target, b_rows = arch.of(a.device), rows_of_a_scale(b, b_scale)
    return gemm_tile(target, max(rows, 1), N, K, b_rows, groups=max(groups, 1), form="m_grouped")


def multiply(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor, t: GemmTile,
    group_index: Tensor | None, extent: Tensor,
) -> None:  # fmt: skip
    """Writes the rows of `out` that belong to a group.

    a, out: [M, K] and [M, N] with `group_index` int32 [M], which says for each row whether a tile
    of a group may write it; or [G, M, K] and [G, M, N]. `extent`: int32 [2, G] from `survey`, or
    the number of rows in use, int32 [G]. (`survey`, or `experts/placement.py` as it places rows.)
    """
    target = arch.of(a.device)
    (G, N, K), M = b.shape, a.shape[-2]
    x, y = operand(a, a_scale, target, t.BLOCK_M), operand(b, b_scale, target, t.BLOCK_N)
    # Row tiles, if the rows of a group lie together: those that are full, and one for each group.
    most = a[..., 0].numel() // t.BLOCK_M + min(G, a[..., 0].numel())
    m_grouped_fp8_gemm_nt_kernel[(t.grid(target, most * cdiv(N, t.BLOCK_N)),)](
        x, y, out, group_index, extent, M, N, K, G,
        GROUPS=max(8, next_power_of_2(G)), SWAPPED=t.swapped,
        B_BLOCK=rows_of_a_scale(b, b_scale),
        TAIL=K % BLOCK != 0 and x.tiles is None, NATIVE_FP8=target.native_fp8,
        INDEX=index_type(x, y), BLOCK_M=t.BLOCK_M, BLOCK_N=t.BLOCK_N, GROUP_M=t.GROUP_M,
        FLATTEN=target.tma, **t.options(target),
    )  # fmt: skip


@triton.jit
def group_rows(group_index_ptr, extent_ptr, M, G, GROUPS: tl.constexpr):
    """The first row of each group, and the row after its last: two of int32 [GROUPS]."""
    group = tl.arange(0, GROUPS)
    if group_index_ptr is not None:
        first = M - tl.load(extent_ptr + group, mask=group < G, other=0)
        return first, tl.load(extent_ptr + G + group, mask=group < G, other=0)
    else:
        rows = tl.load(extent_ptr + group, mask=group < G, other=0)
        return tl.zeros((GROUPS,), tl.int32), tl.minimum(tl.maximum(rows, 0), M)


@triton.jit(do_not_specialize=["M", "G"])
def m_grouped_fp8_gemm_nt_kernel(
    a, b, out_ptr, group_index_ptr, extent_ptr, M, N, K, G, GROUPS: tl.constexpr,
    SWAPPED: tl.constexpr, B_BLOCK: tl.constexpr, TAIL: tl.constexpr, NATIVE_FP8: tl.constexpr,
    INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
):  # fmt: skip
    first, end = group_rows(group_index_ptr, extent_ptr, M, G, GROUPS)
    tiles = (tl.maximum(end - first, 0) + BLOCK_M - 1) // BLOCK_M  # [GROUPS]
    before = tl.cumsum(tiles, 0) - tiles
    rows, columns = tl.sum(tiles, 0), tl.cdiv(N, BLOCK_N)
    blocks = K // 128 if TAIL else tl.cdiv(K, 128)
    part = (0, 0, blocks, K, K, 0)
    for t in tl.range(tl.program_id(0), rows * columns, tl.num_programs(0), flatten=FLATTEN):
        row_block, column_block = tile_in_bands(t, rows, columns, GROUP_M)
        mine = (row_block >= before) & (row_block < before + tiles)
        group = tl.sum(tl.where(mine, tl.arange(0, GROUPS), 0), 0)
        first_row = tl.sum(tl.where(mine, first + (row_block - before) * BLOCK_M, 0), 0)
        rows_left = tl.sum(tl.where(mine, end, 0), 0) - first_row
        first_column = column_block * BLOCK_N
        group = tl.cast(group, tl.int64)
        a_group = group * 0 if group_index_ptr is not None else group
        a_first, b_first = (a_group * M).to(tl.int32), (group * N).to(tl.int32)
        a_tile = (first_row, rows_left, a_first, a_group * a.scale_matrix)
        b_tile = (first_column, N - first_column, b_first, group * b.scale_matrix)
        sum = products(a, a_tile, b, b_tile, part, BLOCK_M, BLOCK_N, B_BLOCK, SWAPPED,
                       a.tiles is not None, TAIL, False, NATIVE_FP8, INDEX)  # fmt: skip
        m, column = tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
        row = a_group * M + first_row + m
        row_inside = m < rows_left
        if group_index_ptr is not None:
            # Rows of no group lie among those of a group, and so may, in bad input, another's.
            row_inside &= tl.load(group_index_ptr + row, mask=row_inside, other=-1) == group
        inside = row_inside[:, None] & (column < N)[None, :]
        out_tile = out_ptr + row[:, None] * N + column[None, :]
        tl.store(out_tile, sum.to(out_ptr.dtype.element_ty), mask=inside)


def survey(group_index: Tensor, G: int, out: Tensor) -> Tensor:
    """Where each group lies, int32 [2, G] for `multiply`; zeros the rows of `out` in no group."""
    extent = group_index.new_zeros(2, G)
    M, N = out.shape
    survey_kernel[(cdiv(M, 128), 8)](group_index, extent, out, M, N, G)
    return extent


@triton.jit(do_not_specialize=["M", "G"])
def survey_kernel(group_index_ptr, extent_ptr, out_ptr, M, N, G):
    """extent[0, g] = M - first row of g, extent[1, g] = last row of g + 1; 0 for an empty group.

    Only where a run of equal indices begins or ends the atomics are asked; they take maxima, so
    their order does not matter.
    """
    row = tl.program_id(0) * 128 + tl.arange(0, 128)
    group = tl.load(group_index_ptr + row, mask=row < M, other=0)
    valid = (group >= 0) & (group < G)
    zero_rows(out_ptr, row, (row < M) & (valid == 0), N)
    if tl.program_id(1) == 0:
        valid &= row < M
        before = tl.load(group_index_ptr + row - 1, mask=(row > 0) & (row < M), other=-1)
        after = tl.load(group_index_ptr + row + 1, mask=row + 1 < M, other=-1)
        tl.atomic_max(extent_ptr + group, M - row, mask=valid & (before != group))
        tl.atomic_max(extent_ptr + G + group, row + 1, mask=valid & (after != group))


def zero_unused(masked_m: Tensor, out: Tensor) -> None:
    """Zeros the rows of `out` [G, M, N] from masked_m[g] on."""
    G, M, N = out.shape
    unused_kernel[(cdiv(M, 128), 8, G)](masked_m, out, M, N)


@triton.jit
def unused_kernel(masked_m_ptr, out_ptr, M, N):
    group = tl.cast(tl.program_id(2), tl.int64)
    row = tl.program_id(0) * 128 + tl.arange(0, 128)
    used = tl.load(masked_m_ptr + group)
    zero_rows(out_ptr + group * M * N, row, (row >= used) & (row < M), N)


@triton.jit
def zero_rows(out_ptr, row, skipped, N):
    """Zeros the skipped ones of 128 rows, in each eighth block of columns from program_id(1) on."""
    if tl.max(skipped.to(tl.int32), 0) > 0:
        line = out_ptr + row.to(tl.int64)[:, None] * N
        for first in range(tl.program_id(1) * 128, N, 8 * 128):
            column = first + tl.arange(0, 128)
            zeros = tl.zeros((128, 128), out_ptr.dtype.element_ty)
            tl.store(line + column[None, :], zeros, mask=skipped[:, None] & (column < N)[None, :])
