"""Grouped GEMM of bf16, fp16 or fp32, contiguous layout: the rows of all groups in one matrix.

    d[m] = a[m] · b[group_index[m]]ᵀ  in fp32, and 0 where group_index[m] is not a group

The products of routed experts, and with one group per head those of absorbed attention.

Parallelization: as in `m_grouped.py`. A small kernel finds the row range of each group and zeros
the skipped rows. Then each program of a persistent kernel loops over the tiles of all groups.

Limit: many rows per group are bound by the tensor core, few by the bandwidth of reading each b[g].

Source: DeepGEMM's contiguous layout, here without its alignment of groups; `real_gemm.py` for the
mainloop.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import next_power_of_2
from ..runtime import arch
from ..runtime.op import op
from ..runtime.tiles import GemmTile
from .block_scaled_gemm import swizzle_tile
from .gemm_nt import check_real_dtypes
from .m_grouped import (
    check_group_index,
    find_group_bounds,
    find_group_tile,
    grid_size,
    load_group_bounds,
)
from .real_gemm import block_k, choose_real_tile, index_type, multiply_real_tile


@op(a="real [M, K] strided", b="real [G, N, K] strided", group_index="int32 [M] strided")
def m_grouped_gemm_nt_contiguous(
    a: Tensor, b: Tensor, group_index: Tensor, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Multiplies each row by the matrix of its group: `a[m] @ b[group_index[m]].T`.

    Args:
        a: bf16, fp16 or fp32 [M, K], any strides.
        b: [G, N, K] in a's dtype, any strides.
        group_index: int32 [M] on the device: the group of each row, ascending. Rows whose value is
            outside [0, G) are skipped (use -1), anywhere in the order. Groups may be empty and need
            no alignment. An unsorted order gives the same result, slowly.
        out_dtype: bfloat16, float16 or float32; None (the default) for a's dtype.

    Returns:
        [M, N] of `out_dtype`; zeros in skipped rows. A row has the same bits in every batch, and
        those of `gemm_nt` with its group.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Example:
        >>> a, b = torch.randn(5, 256), torch.randn(2, 512, 256)
        >>> group_index = torch.tensor([0, 0, 1, 1, -1], dtype=torch.int32)
        >>> deepkern.m_grouped_gemm_nt_contiguous(a, b, group_index).shape
        torch.Size([5, 512])
    """
    dtype = check_real_dtypes("m_grouped_gemm_nt_contiguous", a, b, out_dtype)
    # Fake kernel: allocates the output; the launcher of a backend computes it.
    return a.new_empty((a.shape[0], b.shape[1]), dtype=dtype)


@m_grouped_gemm_nt_contiguous.op.register_debug_check
def check_contents(a, b, group_index, out_dtype) -> None:
    """For DEEPKERN_DEBUG=1: the values of group_index ascend and are in [-1, G)."""
    check_group_index("m_grouped_gemm_nt_contiguous", group_index, b.shape[0])


@m_grouped_gemm_nt_contiguous.op.register_tile
def choose_tile(a: Tensor, b: Tensor, *_) -> GemmTile:
    """The tile that the launcher uses for these arguments: that of groups of equal size."""
    G = max(b.shape[0], 1)
    return choose_real_tile(a, b, -(-len(a) // G), min(G, len(a)))


@m_grouped_gemm_nt_contiguous.op.register_launcher("triton")
def _launch_triton(
    a: Tensor, b: Tensor, group_index: Tensor, out_dtype: torch.dtype | None
) -> Tensor:
    out = m_grouped_gemm_nt_contiguous.op.allocate(a, b, group_index, out_dtype)
    if out.numel() == 0:
        return out
    if b.numel() == 0:
        return out.zero_()
    (M, K), (G, N, _), group_index = a.shape, b.shape, group_index.contiguous()
    bounds = find_group_bounds(group_index, G, out)
    target, tile, BLOCK_K = arch.of(a.device), choose_tile(a, b), block_k(a)
    m_grouped_gemm_nt_kernel[(grid_size(a, b, tile),)](
        a, b, out, group_index, bounds, M, N, K, G, *a.stride(), *b.stride(),
        GROUPS=max(8, next_power_of_2(G)), EVEN_K=K % BLOCK_K == 0, SWAPPED=tile.swapped,
        PRECISION=target.input_precision, INDEX=index_type(a, b[0]), BLOCK_M=tile.BLOCK_M,
        BLOCK_N=tile.BLOCK_N, BLOCK_K=BLOCK_K, GROUP_M=tile.GROUP_M, **tile.options(target),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["M", "G"])
def m_grouped_gemm_nt_kernel(
    a_ptr,  # real [M, K]
    b_ptr,  # [G, N, K]
    out_ptr,  # [M, N], contiguous
    group_index_ptr,  # int32 [M]
    group_bounds_ptr,  # int32 [2, G]; see find_group_bounds
    M,
    N,
    K,
    G,
    a_row_stride,  # all strides in elements
    a_k_stride,
    b_matrix_stride,
    b_row_stride,
    b_k_stride,
    GROUPS: tl.constexpr,  # power of two, at least G
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K
    SWAPPED: tl.constexpr,  # b is the left operand of the matrix instruction
    PRECISION: tl.constexpr,  # of fp32 products
    INDEX: tl.constexpr,  # type of offsets within a tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,  # tile rows per L2 group
):
    first, end = load_group_bounds(group_index_ptr, group_bounds_ptr, M, G, GROUPS)
    tiles = (tl.maximum(end - first, 0) + BLOCK_M - 1) // BLOCK_M  # row tiles of a group, [GROUPS]
    first_tile = tl.cumsum(tiles, 0) - tiles  # [GROUPS]
    tile_rows, tile_columns = tl.sum(tiles, 0), tl.cdiv(N, BLOCK_N)
    for t in tl.range(tl.program_id(0), tile_rows * tile_columns, tl.num_programs(0)):
        row_block, column_block = swizzle_tile(t, tile_rows, tile_columns, GROUP_M)
        group, first_row, valid_rows = find_group_tile(
            row_block, first, end, tiles, first_tile, BLOCK_M, GROUPS
        )
        m = tl.arange(0, BLOCK_M)
        row = tl.cast(first_row, tl.int64) + m
        column = tl.cast(column_block * BLOCK_N, tl.int64) + tl.arange(0, BLOCK_N)
        row_mask, column_mask = m < valid_rows, column < N
        acc = multiply_real_tile(
            a_ptr + row[:, None] * a_row_stride, row_mask[:, None], a_k_stride,
            b_ptr + group * b_matrix_stride + column[:, None] * b_row_stride,
            column_mask[:, None], b_k_stride, K,
            EVEN_K, SWAPPED, PRECISION, INDEX, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        # The row range of a group can contain skipped rows, and rows of other groups if
        # group_index is not sorted.
        row_mask &= tl.load(group_index_ptr + row, mask=row_mask, other=-1) == group
        out_ptrs = out_ptr + row[:, None] * N + column[None, :]
        mask = row_mask[:, None] & column_mask[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)
