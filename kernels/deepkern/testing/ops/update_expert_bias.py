"""Inputs, sizes, cost and baseline of update_expert_bias."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from ..costs import each_tensor_once
from . import Sizes


def inputs(generator: Generator, E: int, rate: float = 0.001) -> tuple:
    """Loads of 99 to 101, of which some equal the mean."""
    bias = torch.randn(E, generator=generator, device=generator.device)
    load = torch.randint(99, 102, (E,), generator=generator, device=generator.device)
    return bias, load, rate


SIZES = Sizes(
    small=[{"E": 10}, {"E": 1500, "rate": 0.1}, {"E": 1}, {"E": 0}],
    cpu=[{"E": 256}],
    gpu=[{"E": 256}],
    inspect=[{"E": 256}],
)
EXACT = True
cost = each_tensor_once


def baseline(bias: Tensor, load: Tensor, rate: float = 0.001) -> Tensor:
    """mean, subtract, sign, add."""
    load = load.double()
    return bias + rate * (load.mean() - load).sign().float()
