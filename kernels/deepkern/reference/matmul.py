"""FP8 matrix products, in float64 on the same quantised inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from .quant import BLOCK, spread

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
    exact_a = a.double() * spread(a_scale.double(), (1, BLOCK), *a.shape)
    exact_b = b.double() * spread(b_scale.double(), (b_rows, BLOCK), *b.shape)
    out = exact_a @ exact_b.T
    return (out if c is None else out + c.double()).to(out_dtype)
