"""Grouped FP8 GEMM, masked layout: fixed-size [M, K] per group, the first masked_m[g] rows valid.

    d[g, m] = a[g, m] · b[g]ᵀ  with block scales for m < masked_m[g], and 0 for the rest

Parallelization: a small kernel zeros the rows from masked_m[g] on. Then the persistent kernel of
`m_grouped.py` loops over the tiles of the valid rows.

Limit: the layout is for decoding, with few valid rows per expert. Reading b[g] of every group that
has rows bounds the speed.

Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.2; DeepGEMM's masked layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.contract import check_choice, check_that
from ..runtime.op import op
from ..runtime.tiles import GemmTile
from .block_scaled_gemm import check_b_scale
from .fp8_gemm_nt import REAL
from .m_grouped import choose_m_grouped_tile, launch_m_grouped_gemm, zero_masked_rows


@op(
    a="fp8 [G, M, K] strided",
    a_scale="fp32 [G, M, K/128] strided",
    b="fp8 [G, N, K] strided",
    b_scale="fp32 [G, _, K/128] strided",
    masked_m="int32 [G] strided",
)
def m_grouped_fp8_gemm_nt_masked(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    masked_m: Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
    expected_m: int | None = None,
) -> Tensor:
    """Multiplies the first masked_m[g] rows of each group: `a[g] @ b[g].T`.

    Args:
        a: float8_e4m3fn [G, M, K]: M rows per group, of which the first masked_m[g] are valid.
        a_scale: fp32 [G, M, ceil(K / 128)], one per 1x128 of `a`, any strides.
        b: float8_e4m3fn [G, N, K].
        b_scale: fp32 [G, ceil(N / 128), ceil(K / 128)], one per 128x128, or
            [G, N, ceil(K / 128)], one per 1x128; any strides.
        masked_m: int32 [G] on the device: valid rows of each group, clamped to [0, M].
        out_dtype: bfloat16, float16 or float32.
        expected_m: mean number of valid rows per group, if known on the host; default M. Only the
            choice of tile depends on it, not the result.

    Returns:
        [G, M, N] of `out_dtype`; zeros in rows from masked_m[g] on, also if `a` has NaN there.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Example:
        >>> a, a_scale = deepkern.cast_per_token(torch.randn(2 * 8, 256))
        >>> a, a_scale = a.view(2, 8, 256), a_scale.view(2, 8, 2)
        >>> b, b_scale = deepkern.cast_per_block(torch.randn(2, 512, 256))
        >>> masked_m = torch.tensor([3, 8], dtype=torch.int32)
        >>> deepkern.m_grouped_fp8_gemm_nt_masked(a, a_scale, b, b_scale, masked_m).shape
        torch.Size([2, 8, 512])
    """
    name = "m_grouped_fp8_gemm_nt_masked"
    check_choice(name, "out_dtype", out_dtype, REAL)
    check_b_scale(name, b, b_scale)
    check_that(name, "expected_m", (expected_m or 0) >= 0, "None or at least 0", expected_m)
    # Fake kernel: allocates the output; the launcher of a backend computes it.
    return a.new_empty((*a.shape[:2], b.shape[1]), dtype=out_dtype)


@m_grouped_fp8_gemm_nt_masked.op.register_debug_check
def check_contents(a, a_scale, b, b_scale, masked_m, out_dtype, expected_m) -> None:
    """For DEEPKERN_DEBUG=1: the values of masked_m are in [0, M]."""
    outside = masked_m[(masked_m < 0) | (masked_m > a.shape[1])]
    expected = f"values from 0 to {a.shape[1]}"
    name = "m_grouped_fp8_gemm_nt_masked"
    check_that(name, "masked_m", not len(outside), expected, outside[:1].tolist())


@m_grouped_fp8_gemm_nt_masked.op.register_launcher("triton")
def _launch_triton(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, masked_m: Tensor,
    out_dtype: torch.dtype, expected_m: int | None,
) -> Tensor:  # fmt: skip
    args = (a, a_scale, b, b_scale, masked_m, out_dtype, expected_m)
    out = m_grouped_fp8_gemm_nt_masked.op.allocate(*args)
    if out.numel() == 0:
        return out
    if a.shape[2] == 0:
        return out.zero_()
    masked_m = masked_m.contiguous()
    zero_masked_rows(masked_m, out)
    launch_m_grouped_gemm(a, a_scale, b, b_scale, out, choose_tile(*args), None, masked_m)
    return out


@m_grouped_fp8_gemm_nt_masked.op.register_tile
def choose_tile(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, masked_m: Tensor,
    out_dtype: torch.dtype, expected_m: int | None,
) -> GemmTile:  # fmt: skip
    """The tile that the launcher uses for these arguments."""
    rows = a.shape[1] if expected_m is None else expected_m
    return choose_m_grouped_tile(a, b, b_scale, rows)
