"""Grouped FP8 GEMM, contiguous layout: the rows of all groups in one matrix, sorted by group.

    d[m] = a[m] · b[group_index[m]]ᵀ  with block scales, and 0 where group_index[m] is not a group

Parallelization: a small kernel finds the row range of each group and zeros the skipped rows. Then
the persistent kernel of `m_grouped.py` loops over the tiles of all groups. Padding rows inside a
group cost arithmetic only in tiles that also have valid rows.

Limit: as in `m_grouped.py`.

Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.2; DeepGEMM's contiguous
layout, here without its alignment of groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.contract import check_choice
from ..runtime.op import op
from ..runtime.tiles import GemmTile
from .block_scaled_gemm import check_b_scale
from .fp8_gemm_nt import REAL
from .m_grouped import (
    check_group_index,
    choose_m_grouped_tile,
    find_group_bounds,
    launch_m_grouped_gemm,
)


@op(
    a="fp8 [M, K] strided",
    a_scale="fp32 [M, K/128] strided",
    b="fp8 [G, N, K] strided",
    b_scale="fp32 [G, _, K/128] strided",
    group_index="int32 [M] strided",
)
def m_grouped_fp8_gemm_nt_contiguous(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    group_index: Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Multiplies each row by the matrix of its group: `a[m] @ b[group_index[m]].T`.

    Args:
        a: float8_e4m3fn [M, K], as for `fp8_gemm_nt`.
        a_scale: fp32 [M, ceil(K / 128)], one per 1x128 of `a`, any strides.
        b: float8_e4m3fn [G, N, K].
        b_scale: fp32 [G, ceil(N / 128), ceil(K / 128)], one per 128x128, or
            [G, N, ceil(K / 128)], one per 1x128; any strides.
        group_index: int32 [M] on the device: the group of each row, ascending. Rows whose value is
            outside [0, G) are skipped (use -1), anywhere in the order. Groups may be empty and need
            no alignment. An unsorted order gives the same result, slowly.
        out_dtype: bfloat16, float16 or float32.

    Returns:
        [M, N] of `out_dtype`; zeros in skipped rows.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Example:
        >>> a, a_scale = deepkern.cast_per_token(torch.randn(5, 256))
        >>> b, b_scale = deepkern.cast_per_block(torch.randn(2, 512, 256))
        >>> group_index = torch.tensor([0, 0, 1, 1, -1], dtype=torch.int32)
        >>> deepkern.m_grouped_fp8_gemm_nt_contiguous(a, a_scale, b, b_scale, group_index).shape
        torch.Size([5, 512])
    """
    name = "m_grouped_fp8_gemm_nt_contiguous"
    check_choice(name, "out_dtype", out_dtype, REAL)
    check_b_scale(name, b, b_scale)
    # Fake kernel: allocates the output; the launcher of a backend computes it.
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)


@m_grouped_fp8_gemm_nt_contiguous.op.register_debug_check
def check_contents(a, a_scale, b, b_scale, group_index, out_dtype) -> None:
    """For DEEPKERN_DEBUG=1: the values of group_index ascend and are in [-1, G)."""
    check_group_index("m_grouped_fp8_gemm_nt_contiguous", group_index, b.shape[0])


@m_grouped_fp8_gemm_nt_contiguous.op.register_launcher("triton")
def _launch_triton(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, group_index: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    args = (a, a_scale, b, b_scale, group_index, out_dtype)
    out = m_grouped_fp8_gemm_nt_contiguous.op.allocate(*args)
    if out.numel() == 0:
        return out
    if b.numel() == 0:
        return out.zero_()
    group_index = group_index.contiguous()
    bounds = find_group_bounds(group_index, b.shape[0], out)
    launch_m_grouped_gemm(a, a_scale, b, b_scale, out, choose_tile(*args), group_index, bounds)
    return out


@m_grouped_fp8_gemm_nt_contiguous.op.register_tile
def choose_tile(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *_) -> GemmTile:
    """The tile that the launcher uses for these arguments: that of groups of equal size."""
    return choose_m_grouped_tile(a, b, b_scale, -(-a.shape[0] // max(b.shape[0], 1)))
