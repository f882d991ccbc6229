"""The reference of the GEMMs: float64 on the same inputs, FP8 ones summed per block of K."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .quant import BLOCK

__all__ = [
    "fp8_gemm_nt",
    "gemm_nt",
    "k_grouped_fp8_gemm_nt",
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_masked",
    "m_grouped_gemm_nt_contiguous",
]


def gemm_nt(a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    return (a.double() @ b.double().T).to(out_dtype or a.dtype)


def m_grouped_gemm_nt_contiguous(
    a: Tensor, b: Tensor, group_index: Tensor, out_dtype: torch.dtype | None = None
) -> Tensor:
    out = a.new_zeros((a.shape[0], b.shape[1]), dtype=out_dtype or a.dtype)
    for g in range(b.shape[0]):
        row = (group_index == g).nonzero()[:, 0]
        out[row] = gemm_nt(a[row], b[g], out_dtype)
    return out


def fp8_gemm_nt(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
    c: Tensor | None = None,
) -> Tensor:
    rows_per_scale = 1 if b_scale.shape[0] == b.shape[0] else BLOCK
    scale_row = torch.arange(b.shape[0], device=b.device) // rows_per_scale  # [N]
    out = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float64, device=a.device)
    for j in range(a_scale.shape[1]):
        block = slice(BLOCK * j, BLOCK * (j + 1))
        product = a[:, block].double() @ b[:, block].double().T
        out += product * a_scale[:, j, None].double() * b_scale[scale_row, j].double()
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
        out[row] = fp8_gemm_nt(select_rows(a, row), a_scale[row], b[g], b_scale[g], out_dtype)
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
    for g, valid in enumerate(masked_m.clamp(0, M).tolist()):
        out[g, :valid] = fp8_gemm_nt(a[g, :valid], a_scale[g, :valid], b[g], b_scale[g], out_dtype)
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
    outputs, block = [], 0
    for first, end in itertools.pairwise(offsets):
        blocks = slice(block, block + -(-(end - first) // BLOCK))
        block = blocks.stop
        end = min(end, first + BLOCK * a_scale[:, blocks].shape[1])  # columns that have scales
        operands = a[:, first:end], a_scale[:, blocks], b[:, first:end], b_scale[:, blocks]
        addend = None if c is None else c[len(outputs)]
        outputs.append(fp8_gemm_nt(*operands, torch.float32, addend))
    if not outputs:
        return a.new_empty((0, a.shape[0], b.shape[0]), dtype=torch.float32)
    return torch.stack(outputs)


def select_rows(x: Tensor, row: Tensor) -> Tensor:
    """x[row] for FP8, as bytes: not every device supports indexing of FP8."""
    return x.view(torch.uint8)[row].view(x.dtype)
