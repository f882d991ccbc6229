"""Inputs, sizes, cost and baseline of rmsnorm_cast."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..costs import each_tensor_once
from ..random_inputs import values
from . import Sizes, cast_per_token

BF16 = torch.bfloat16


def inputs(
    generator: Generator,
    M: int,
    K: int,
    dtype: torch.dtype = BF16,
    weight_dtype: torch.dtype | None = None,
    eps: float = 1e-6,
    residual: bool = False,
    scale_format: str = "fp32",
    scale_layout: str = "row",
) -> tuple[Tensor, Tensor, float, Tensor | None, str, str]:
    x = values(generator, M, K, dtype=dtype)
    weight = torch.rand(K, generator=generator, device=generator.device) + 0.5
    added = values(generator, M, K, dtype=dtype) if residual else None
    return x, weight.to(weight_dtype or dtype), eps, added, scale_format, scale_layout


SIZES = Sizes(
    small=[
        {"M": 5, "K": 300, "residual": True},
        {"M": 1, "K": 128, "dtype": torch.float32, "scale_format": "ue8m0"},
        {"M": 9, "K": 129, "dtype": torch.float16, "scale_layout": "column", "residual": True},
        {"M": 2, "K": 1536, "weight_dtype": torch.float32},
        {"M": 0, "K": 128, "residual": True},
        {"M": 3, "K": 0, "scale_layout": "column"},
    ],
    cpu=[{"M": 512, "K": 7168, "residual": True}],
    gpu=[
        {"M": 4096, "K": 7168, "residual": True},
        {"M": 4096, "K": 1536},
        {"M": 4096, "K": 512},
        {"M": 64, "K": 7168, "residual": True},
        {"M": 256, "K": 20000},
    ],
    inspect=[
        {"M": 4096, "K": 7168, "residual": True},
        {"M": 4096, "K": 7168, "residual": True, "dtype": torch.float32},
        {"M": 4096, "K": 4096, "scale_layout": "column"},
        {"M": 4096, "K": 1536, "scale_format": "ue8m0"},
        {"M": 4096, "K": 512},
        {"M": 4096, "K": 16384, "residual": True, "dtype": torch.float32},
        {"M": 4096, "K": 20000, "residual": True, "dtype": torch.float32},
        {"M": 4096, "K": 16383, "residual": True, "dtype": torch.float32},
        {"M": 4096, "K": 100, "residual": True},
    ],
)
EXACT = True
cost = each_tensor_once


def baseline(
    x, weight, eps=1e-6, residual=None, scale_format="fp32", scale_layout="row"
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Add, F.rms_norm, cast op by op."""
    h = x if residual is None else x + residual
    normed = F.rms_norm(h.float(), h.shape[-1:], weight.float(), eps).to(x.dtype)
    return *cast_per_token.baseline(normed, scale_format), normed, None if residual is None else h
