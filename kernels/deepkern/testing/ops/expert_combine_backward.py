"""Inputs, sizes, cost and baseline of expert_combine_backward."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from ..costs import each_tensor_once
from ..random_inputs import values
from . import Sizes, expert_combine
from .expert_combine import weighted_sum

BF16 = torch.bfloat16


def inputs(
    generator: Generator, T: int, topk: int, K: int, dtype: torch.dtype = BF16, none: float = 0.1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad = values(generator, T, K, dtype=dtype)
    return grad, *expert_combine.inputs(generator, T, topk, K, dtype, none)[:3]


SIZES = Sizes(
    small=[
        {"T": 11, "topk": 3, "K": 300},
        {"T": 5, "topk": 9, "K": 1030, "dtype": torch.float32},
        {"T": 0, "topk": 2, "K": 16},
        {"T": 3, "topk": 2, "K": 0},
        {"T": 2, "topk": 0, "K": 16},
    ],
    cpu=[{"T": 256, "topk": 8, "K": 7168, "none": 0.0}],
    gpu=[{"T": 4096, "topk": 8, "K": 7168, "none": 0.0}],
    inspect=[{"T": 4096, "topk": 8, "K": 7168}],
)
EXACT = False
cost = each_tensor_once


def baseline(grad, y, topk_weights, handle) -> tuple[Tensor, Tensor]:
    """Autograd through index_select and index_add."""
    with torch.enable_grad():
        y, weights = y.detach().requires_grad_(), topk_weights.detach().requires_grad_()
        grads = torch.autograd.grad(weighted_sum(y, weights, handle), (y, weights), grad.float())
    return grads[0], grads[1].float()
