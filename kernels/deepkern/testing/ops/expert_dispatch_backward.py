"""Inputs, sizes, cost and baseline of expert_dispatch_backward."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from ..costs import each_tensor_once
from ..routing import rows_and_handle
from . import Sizes
from .expert_combine import weighted_sum

BF16 = torch.bfloat16


def inputs(
    generator: Generator, T: int, topk: int, K: int, dtype: torch.dtype = BF16, none: float = 0.1
) -> tuple[Tensor, Tensor]:
    return rows_and_handle(generator, T, topk, K, dtype, none)


SIZES = Sizes(
    small=[
        {"T": 11, "topk": 3, "K": 300},
        {"T": 5, "topk": 9, "K": 1030, "dtype": torch.float32},
        {"T": 0, "topk": 2, "K": 16},
        {"T": 2, "topk": 0, "K": 16},
    ],
    cpu=[{"T": 256, "topk": 8, "K": 7168, "none": 0.0}],
    gpu=[{"T": 4096, "topk": 8, "K": 7168, "none": 0.0}],
    inspect=[{"T": 4096, "topk": 8, "K": 7168}],
)
EXACT = False
cost = each_tensor_once


def baseline(grad: Tensor, handle: Tensor) -> Tensor:
    """index_select, index_add in fp32."""
    return weighted_sum(grad, None, handle).to(grad.dtype)
