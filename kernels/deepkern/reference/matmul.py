"""FP8 matrix products in float64 on the same quantised inputs: a block of K, then its scales."""

from __future__ import annotations

import torch
from torch import Tensor

from .quant import BLOCK

__all__ = ["fp8_gemm_nt"]


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
