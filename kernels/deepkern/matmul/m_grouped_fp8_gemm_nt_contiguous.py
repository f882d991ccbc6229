"""FP8 products of consecutive rows with their group's matrix; a row names its group.

    d[m] = a[m] · b[group_index[m]]ᵀ  with block scales, and 0 where group_index[m] is no group

Cut: one pass over group_index finds where each group lies and zeros the rows of none; then
`m_grouped.py` goes through the groups' tiles. Rows of padding inside a group cost arithmetic only
where they share a tile with others.

Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.2; DeepGEMM's contiguous
layout, here without its alignment of groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.contract import check_choice, check_that
from ..runtime.op import op
from ..runtime.tiles import GemmTile
from . import m_grouped
from .fp8_gemm_nt import REAL
from .products import check_b_scale


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
    """Multiplies each row with the matrix of its group: `a[m] @ b[group_index[m]].T`.

    Args:
        a: float8_e4m3fn [M, K], as for `fp8_gemm_nt`.
        a_scale: fp32 [M, ceil(K / 128)], one per 1x128 of `a`, any strides.
        b: float8_e4m3fn [G, N, K].
        b_scale: fp32 [G, ceil(N / 128), ceil(K / 128)], one per 128x128, or
            [G, N, ceil(K / 128)], one per 1x128; any strides.
        group_index: int32 [M] on the device: the group of each row, ascending. Rows with -1, or
            any other value that is no group, are skipped; they may lie anywhere. Groups may be
            empty and need no alignment. (In another order the result is right, but slow.)
        out_dtype: bfloat16, float16 or float32.

    Returns:
        [M, N] of `out_dtype`; zeros in skipped rows.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    name = "m_grouped_fp8_gemm_nt_contiguous"
    check_choice(name, "out_dtype", out_dtype, REAL)
    check_b_scale(name, b, b_scale)
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)


@m_grouped_fp8_gemm_nt_contiguous.op.register_debug_check
def check_contents(a, a_scale, b, b_scale, group_index, out_dtype) -> None:
    """For DEEPKERN_DEBUG=1: group_index ascends, and holds -1 or a group."""
    name, G = "m_grouped_fp8_gemm_nt_contiguous", b.shape[0]
    found = group_index[group_index != -1]
    outside = found[(found < 0) | (found >= G)]
    expected = f"values from -1 to {G - 1}"
    check_that(name, "group_index", not len(outside), expected, outside[:1].tolist())
    expected = "values that ascend but for -1"
    check_that(name, "group_index", bool((found.diff() >= 0).all()), expected, found.tolist())


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
    extent = m_grouped.survey(group_index, b.shape[0], out)
    m_grouped.multiply(a, a_scale, b, b_scale, out, choose_tile(*args), group_index, extent)
    return out


@m_grouped_fp8_gemm_nt_contiguous.op.register_tile
def choose_tile(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *_) -> GemmTile:
    """The tile that a launch with these arguments takes, as if all groups had as many rows."""
    return m_grouped.choose_tile(a, b, b_scale, -(-a.shape[0] // max(b.shape[0], 1)))
