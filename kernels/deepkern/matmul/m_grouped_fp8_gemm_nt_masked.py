"""FP8 products of the first rows of each group with the group's matrix.

    d[g, m] = a[g, m] · b[g]ᵀ  with block scales for m < masked_m[g], and 0 for the rest

Cut: the rows past masked_m are zeroed, and `m_grouped.py` goes through the tiles of those in use.
It is the form of decoding, where each expert has room for some rows and few are taken: the reading
of every b[g] in use is what limits the speed.

Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.2; DeepGEMM's masked layout.
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
        a: float8_e4m3fn [G, M, K], room for M rows in each group.
        a_scale: fp32 [G, M, ceil(K / 128)], one per 1x128 of `a`, any strides.
        b: float8_e4m3fn [G, N, K].
        b_scale: fp32 [G, ceil(N / 128), ceil(K / 128)], one per 128x128, or
            [G, N, ceil(K / 128)], one per 1x128; any strides.
        masked_m: int32 [G] on the device: rows in use; counts as clamped to [0, M].
        out_dtype: bfloat16, float16 or float32.
        expected_m: how many rows of a group will be in use on average, if the host can tell; it
            steers the choice of tile, never the result. All M of them, if not given.

    Returns:
        [G, M, N] of `out_dtype`; zeros in rows from masked_m[g] on, whatever `a` holds there.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    name = "m_grouped_fp8_gemm_nt_masked"
    check_choice(name, "out_dtype", out_dtype, REAL)
    check_b_scale(name, b, b_scale)
    check_that(name, "expected_m", (expected_m or 0) >= 0, "None or at least 0", expected_m)
    return a.new_empty((*a.shape[:2], b.shape[1]), dtype=out_dtype)


@m_grouped_fp8_gemm_nt_masked.op.register_debug_check
def check_contents(a, a_scale, b, b_scale, masked_m, out_dtype, expected_m) -> None:
    """For DEEPKERN_DEBUG=1: masked_m says rows that are there."""
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
    m_grouped.zero_unused(masked_m, out)
    m_grouped.multiply(a, a_scale, b, b_scale, out, choose_tile(*args), None, masked_m)
    return out


@m_grouped_fp8_gemm_nt_masked.op.register_tile
def choose_tile(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, masked_m: Tensor,
    out_dtype: torch.dtype, expected_m: int | None,
) -> GemmTile:  # fmt: skip
    """The tile that a launch with these arguments takes."""
    return m_grouped.choose_tile(a, b, b_scale, a.shape[1] if expected_m is None else expected_m)
