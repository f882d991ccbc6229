"""FP8 matrix products in float64 on the same quantised inputs: a block of K, then its scales."""

from __future__ import annotations

import torch
from torch import Tensor

from .quant import BLOCK

__all__ = [
    "fp8_gemm_nt",
    "k_grouped_fp8_gemm_nt",
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_masked",
]


def fp8_gemm_nt(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
    c: Tensor | None = None,
) -> Tensor:
    b_rows = 1 if b_scale.shape[0] == b.shape[0] else BLOCK
    out = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float64, device=a.device)
    for j in range(a_scale.shape[1]):
        block = slice(BLOCK * j, BLOCK * (j + 1))
        b_factor = b_scale[torch.arange(b.shape[0], device=b.device) // b_rows, j]  # [N]
        product = a[:, block].double() @ b[:, block].double().T
        out += product * a_scale[:, j, None].double() * b_factor.double()
    return (out if c is None else out + c.double()).to(out_dtype)


def m_grouped_fp8_gemm_nt_contiguous(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    group_index: Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    out = a.new_zeros((a.shape[0], b.shape[1]), dtype=out_dtype)
    for g in range(b.shape[0]):
        row = (group_index == g).nonzero()[:, 0]
        out[row] = fp8_gemm_nt(rows(a, row), a_scale[row], b[g], b_scale[g], out_dtype)
    return out


def m_grouped_fp8_gemm_nt_masked(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    masked_m: Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
    expected_m: int | None = None,
) -> Tensor:
    G, M, _ = a.shape
    out = a.new_zeros((G, M, b.shape[1]), dtype=out_dtype)
    for g, used in enumerate(masked_m.clamp(0, M).tolist()):
        out[g, :used] = fp8_gemm_nt(a[g, :used], a_scale[g, :used], b[g], b_scale[g], out_dtype)
    return out


def k_grouped_fp8_gemm_nt(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    group_offsets: Tensor,
    c: Tensor | None = None,
) -> Tensor:
    offsets = group_offsets.clamp(0, a.shape[1]).cummax(0).values.tolist()
    products, block = [], 0
    for first, last in zip(offsets, offsets[1:], strict=False):
        scales = slice(block, block + -(-(last - first) // BLOCK))
        block = scales.stop
        last = min(last, first + BLOCK * a_scale[:, scales].shape[1])  # what has scales
        a_group, b_group = a[:, first:last], b[:, first:last]
        b_factors = b_scale[:, scales]
        addend = None if c is None else c[len(products)]
        products.append(
            fp8_gemm_nt(a_group, a_scale[:, scales], b_group, b_factors, torch.float32, addend)
        )
    if not products:
        return a.new_empty((0, a.shape[0], b.shape[0]), dtype=torch.float32)
    return torch.stack(products)


def rows(x: Tensor, row: Tensor) -> Tensor:
    """x[row] of FP8, for which not every device has indexing."""
    return x.view(torch.uint8)[row].view(x.dtype)
