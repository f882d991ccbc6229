"""Inputs, sizes, cost and baseline of expert_combine."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from ..costs import each_tensor_once
from ..random_inputs import values
from ..routing import V3_TOKENS, rows_and_handle
from . import Sizes

BF16 = torch.bfloat16


def inputs(
    generator: Generator,
    T: int,
    topk: int,
    K: int,
    dtype: torch.dtype = BF16,
    none: float = 0.1,
    shared: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """`shared`: the dtype of the shared expert's output, if given."""
    y, handle = rows_and_handle(generator, T, topk, K, dtype, none)
    args = y, torch.rand(T, topk, generator=generator, device=y.device), handle
    return args if shared is None else (*args, values(generator, T, K, dtype=shared))


SIZES = Sizes(
    small=[
        {"T": 11, "topk": 3, "K": 300, "shared": BF16},
        {"T": 5, "topk": 9, "K": 1030, "dtype": torch.float32},
        {"T": 9, "topk": 1, "K": 7, "dtype": torch.float16, "none": 0.5},
        {"T": 0, "topk": 2, "K": 16},
        {"T": 3, "topk": 2, "K": 0},
        {"T": 2, "topk": 0, "K": 16, "shared": torch.float32},
    ],
    cpu=[{"T": 256, "topk": 8, "K": 7168, "none": 0.0}],
    gpu=[{"T": T, "topk": 8, "K": 7168, "none": 0.0} for T in V3_TOKENS]
    + [{"T": 4096, "topk": 8, "K": 7168, "none": 0.0, "shared": BF16}],
    inspect=[
        {"T": 4096, "topk": 8, "K": 7168},
        {"T": 4096, "topk": 6, "K": 2048, "shared": BF16},
    ],
)
EXACT = False
cost = each_tensor_once


def baseline(y, topk_weights, handle, shared=None) -> Tensor:
    """index_select, multiply, index_add in fp32."""
    out = weighted_sum(y, topk_weights, handle)
    return (out if shared is None else out + shared).to(y.dtype)


def weighted_sum(y: Tensor, topk_weights: Tensor | None, handle: Tensor) -> Tensor:
    """fp32 [T, K]: the rows of y that each token names, weighted if weights are given."""
    T, topk = handle.shape
    valid = ((handle >= 0) & (handle < y.shape[0])).flatten()
    token = torch.arange(T, device=y.device).repeat_interleave(topk)[valid]
    rows = y.index_select(0, handle.flatten()[valid]).float()
    if topk_weights is not None:
        rows = rows * topk_weights.flatten()[valid, None].float()
    return torch.zeros(T, y.shape[1], device=y.device).index_add(0, token, rows)
