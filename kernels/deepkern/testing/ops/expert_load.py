"""Inputs, sizes, cost and baseline of expert_load."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from ..costs import each_tensor_once
from ..routing import indices
from . import Sizes


def inputs(
    generator: Generator, T: int, E: int, topk: int, none: float = 0.1
) -> tuple[Tensor, int]:
    return indices(generator, T, E, topk, none), E


SIZES = Sizes(
    small=[
        {"T": 200, "E": 20, "topk": 3},
        {"T": 3, "E": 1, "topk": 1},
        {"T": 0, "E": 8, "topk": 2},
        {"T": 3, "E": 8, "topk": 0},
    ],
    cpu=[{"T": 8192, "E": 256, "topk": 8}],
    gpu=[{"T": 8192, "E": 256, "topk": 8}],
    inspect=[{"T": 8192, "E": 256, "topk": 8}],
)
EXACT = False
cost = each_tensor_once


def baseline(topk_idx: Tensor, num_experts: int) -> Tensor:
    """torch.bincount."""
    flat = topk_idx.flatten().long()
    return torch.bincount(
        torch.where((flat >= 0) & (flat < num_experts), flat, num_experts), minlength=num_experts
    )[:num_experts].int()
