"""Inputs, sizes, cost and baseline of hadamard_transform."""

from __future__ import annotations

import functools

import torch
from torch import Generator, Tensor

from ..costs import each_tensor_once
from ..providers import Provider, library
from . import Sizes

BF16 = torch.bfloat16


def inputs(generator: Generator, M: int, N: int, dtype: torch.dtype = BF16) -> tuple:
    x = torch.randn(M, N, generator=generator, device=generator.device)
    return x.to(dtype), max(N, 1) ** -0.5


SIZES = Sizes(
    small=[
        {"M": 40, "N": 128},
        {"M": 3, "N": 1, "dtype": torch.float32},
        {"M": 5, "N": 16, "dtype": torch.float16},
        {"M": 2, "N": 8192},
        {"M": 0, "N": 128},
        {"M": 2, "N": 0},
    ],
    cpu=[{"M": 8192, "N": 128}],
    gpu=[{"M": 64 * 4096, "N": 128}, {"M": 4096, "N": 8192}],
    inspect=[{"M": 64 * 4096, "N": 128}, {"M": 4096, "N": 32768}],
)
EXACT = True
cost = each_tensor_once


def baseline(x, scale=1.0) -> Tensor:
    """A product with the Hadamard matrix, computed before."""
    N = x.shape[-1]
    return (x.float() @ hadamard_matrix(N, x.device) * scale).to(x.dtype)


@functools.cache
def hadamard_matrix(N: int, device: torch.device) -> Tensor:
    """fp32 [N, N]; computed once."""
    rows = torch.ones(min(N, 1), min(N, 1), device=device)
    while len(rows) < N:
        rows = torch.cat((torch.cat((rows, rows), 1), torch.cat((rows, -rows), 1)))
    return rows


def providers(x, scale, **rest) -> list[Provider]:
    if not x.is_cuda:
        return []
    return library(
        "fast_hadamard_transform", "Dao-AILab's fast_hadamard_transform",
        lambda module: lambda: module.hadamard_transform(x, scale),
    )  # fmt: skip
