"""Inputs of the casts."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from . import Sizes

BF16 = torch.bfloat16


def values(generator: Generator, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Normal values whose magnitude varies from row to row by a factor of up to 2^12."""
    device = generator.device
    x = torch.randn(shape, generator=generator, device=device)
    row = torch.randn((*shape[:-1], 1), generator=generator, device=device)
    return (x * torch.exp2(3 * row.clamp(-2, 2))).to(dtype)


def cast_per_token(
    generator: Generator, M: int, K: int, dtype: torch.dtype = BF16, scale_format: str = "fp32"
) -> tuple[Tensor, str]:
    return values(generator, M, K, dtype=dtype), scale_format


SIZES = {
    "cast_per_token": Sizes(
        small=[
            {"M": 33, "K": 300},
            {"M": 1, "K": 128, "dtype": torch.float32, "scale_format": "ue8m0"},
            {"M": 70, "K": 129, "dtype": torch.float16},
            {"M": 0, "K": 128},
            {"M": 3, "K": 0},
        ],
        cpu=[{"M": 512, "K": 7168}],
        gpu=[{"M": 4096, "K": 7168}, {"M": 64, "K": 7168}, {"M": 8192, "K": 2048}],
        inspect=[{"M": 4096, "K": 7168}],
    ),
}
