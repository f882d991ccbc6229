"""Random values that more than one op's inputs are built from."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def values(generator: Generator, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal values whose magnitude varies from row to row by a factor of up to 2^12."""
    device = generator.device
    x = torch.randn(shape, generator=generator, device=device)
    row = torch.randn((*shape[:-1], 1), generator=generator, device=device)
    return (x * torch.exp2(3 * row.clamp(-2, 2))).to(dtype)


def small_integers(generator: Generator, M: int, K: int) -> Tensor:
    """fp32 [M, K] of integers from -7 to 7, with a 7 in each block: its FP8 scale is 2^-6."""
    x = torch.randint(-7, 8, (M, K), generator=generator, device=generator.device).float()
    x[:, ::128] = 7.0
    return x
