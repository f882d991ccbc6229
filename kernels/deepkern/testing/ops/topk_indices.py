"""Inputs, sizes, cost and baseline of topk_indices."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..costs import each_tensor_once
from . import Sizes

BF16 = torch.bfloat16


def inputs(
    generator: Generator,
    S: int,
    N: int,
    k: int,
    dtype: torch.dtype = torch.float32,
    ragged: bool = False,
) -> tuple:
    """Logits with ties: a quarter of them is rounded to integers."""
    device = generator.device
    logits = torch.randn(S, N, generator=generator, device=device)
    logits[:, ::4] = logits[:, ::4].round()
    if not ragged:
        return logits.to(dtype), k, None
    lengths = torch.randint(0, N + 1, (S,), generator=generator, device=device).int()
    return logits.to(dtype), k, lengths


SIZES = Sizes(
    small=[
        {"S": 3, "N": 50, "k": 8, "ragged": True},
        {"S": 2, "N": 3000, "k": 700, "dtype": BF16},
        {"S": 3, "N": 9000, "k": 100, "dtype": BF16, "ragged": True},
        {"S": 1, "N": 40000, "k": 2048, "ragged": True},
        {"S": 2, "N": 5, "k": 9},
        {"S": 0, "N": 5, "k": 2},
        {"S": 2, "N": 0, "k": 3},
        {"S": 2, "N": 5, "k": 0},
    ],
    cpu=[{"S": S, "N": N, "k": 2048} for S in (1, 64) for N in (32768, 131072)],
    gpu=[{"S": S, "N": N, "k": 2048} for S in (1, 64, 4096) for N in (32768, 131072)],
    inspect=[
        {"S": 64, "N": 32768, "k": 2048},
        {"S": 64, "N": 131072, "k": 4096, "ragged": True},
        {"S": 64, "N": 32768, "k": 64, "dtype": BF16},
        {"S": 64, "N": 4096, "k": 512, "dtype": BF16},
        {"S": 64, "N": 1024, "k": 64, "ragged": True},
    ],
)
EXACT = False
cost = each_tensor_once


def baseline(logits, k, lengths=None) -> Tensor:
    """torch.topk of masked logits."""
    N = logits.shape[1]
    if lengths is not None:
        masked = torch.arange(N, device=logits.device) >= lengths[:, None]
        logits = logits.masked_fill(masked, -math.inf)
    values, columns = logits.topk(min(k, N), sorted=False)
    if lengths is not None:
        columns = columns.masked_fill(values == -math.inf, -1)
    return F.pad(columns.int(), (0, k - min(k, N)), value=-1)


def readable(output: Tensor, logits: Tensor, **rest) -> Tensor:
    """The chosen logits, sorted: torch.topk may choose either of two equal ones."""
    logits = F.pad(logits.float(), (0, 1), value=-torch.inf)  # for -1
    return logits.gather(1, output.long() % logits.shape[1]).sort(1).values
