"""FP8 products with the bits that csrc/sm90 has on Hopper: the reference of its tests.

A sum of 128 products has the bits of the tensor core (csrc/ptx/tensor_core.cpp, which is compared
with MMA-Sim's model and float64 elsewhere). Sums of 14 bits may cancel, so no bound of an error
relative to the result holds for a few values. The order of promotions and splits is that of the
kernels, so every result has exactly one value.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.studies import accumulation


def product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, splits: int = 1) -> Tensor:
    """float32 [M, N]. K is divided into `splits` ranges of whole blocks, added in their order."""
    M, N, blocks = len(a), len(b), -(-a.shape[1] // 128)
    if not M or not N or not blocks:
        return torch.zeros(M, N)
    per_split = -(-blocks // splits)
    b_scale = b_scale if len(b_scale) == N else b_scale.repeat_interleave(128, 0)[:N]
    # WGMMA multiplies 64 rows by a multiple of 8.
    a, b = (pad(x.view(torch.uint8), splits * per_split * 128).view(x.dtype) for x in (a, b))
    a_scale, b_scale = (pad(x, splits * per_split) for x in (a_scale, b_scale))
    total = None
    for first in range(0, splits * per_split, per_split):
        columns = slice(first * 128, (first + per_split) * 128)
        scales = slice(first, first + per_split)
        part = accumulation.product(
            a[:, columns], a_scale[:, scales], b[:, columns], b_scale[:, scales], 128
        )
        total = part if total is None else total + part
    assert total is not None
    return total[:M, :N]


def pad(x: Tensor, columns: int) -> Tensor:
    """x with zeros up to `columns` and up to a multiple of 64 rows."""
    return F.pad(x, (0, columns - x.shape[1], 0, -len(x) % 64))


def dense(a, a_scale, b, b_scale, out_dtype=torch.bfloat16, c=None, splits=1) -> Tensor:
    out = product(a, a_scale, b, b_scale, splits)
    return (out if c is None else out + c.float()).to(out_dtype)


def contiguous(a, a_scale, b, b_scale, group_index, out_dtype=torch.bfloat16) -> Tensor:
    out = torch.zeros(len(a), b.shape[1])
    for g in range(len(b)):
        rows = group_index == g
        out[rows] = product(a[rows], a_scale[rows], b[g], b_scale[g])
    return out.to(out_dtype)


def masked(a, a_scale, b, b_scale, masked_m, out_dtype=torch.bfloat16, *_) -> Tensor:
    out = torch.zeros(len(a), a.shape[1], b.shape[1])
    for g, valid in enumerate(masked_m.clamp(0, a.shape[1]).tolist()):
        out[g, :valid] = product(a[g, :valid], a_scale[g, :valid], b[g], b_scale[g])
    return out.to(out_dtype)


def k_grouped(a, a_scale, b, b_scale, group_offsets, c=None) -> Tensor:
    ends = group_offsets.clamp(0, a.shape[1]).cummax(0).values.tolist()
    out = torch.zeros(len(ends) - 1, len(a), len(b))
    block = 0
    for g, (first, end) in enumerate(zip(ends, ends[1:], strict=False)):
        length = min(end - first, max(a_scale.shape[1] - block, 0) * 128)
        columns, scales = slice(first, first + length), slice(block, block - (-length // 128))
        out[g] = product(a[:, columns], a_scale[:, scales], b[:, columns], b_scale[:, scales])
        block -= -(end - first) // 128
    return out if c is None else out + c


PRODUCTS = {
    "fp8_gemm_nt": dense,
    "m_grouped_fp8_gemm_nt_contiguous": contiguous,
    "m_grouped_fp8_gemm_nt_masked": masked,
    "k_grouped_fp8_gemm_nt": k_grouped,
}
