"""Inputs, sizes, cost and baseline of swiglu_cast_backward."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from ... import reference
from ..costs import each_tensor_once
from ..random_inputs import values
from . import Sizes, cast_back, swiglu_cast
from .swiglu_cast import swiglu

BF16 = torch.bfloat16


def inputs(
    generator: Generator,
    M: int,
    I: int,
    dtype: torch.dtype = BF16,
    fp8: bool = False,
    weighted: bool = False,
    limit: float | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, float | None]:
    """`dtype` is that of the gradient, and of `gate_up` unless it is FP8.

    Three of four gradients have the sign of their y. Otherwise the terms of a weight's gradient
    would cancel, and the bound on the error is relative to their sum.
    """
    gate_up, weights, *_ = swiglu_cast.inputs(generator, M, I, dtype, weighted)
    grad = values(generator, M, I, dtype=dtype)
    same_sign = grad.abs() * (gate_up[:, :I] * gate_up[:, I:]).sign()
    grad = torch.where(torch.arange(I, device=grad.device) % 4 == 0, grad, same_sign)
    gate_up, scale = reference.cast_per_token(gate_up) if fp8 else (gate_up, None)
    return grad, gate_up, scale, weights, limit


SIZES = Sizes(
    small=[
        {"M": 9, "I": 300, "fp8": True, "weighted": True, "limit": 2.0},
        {"M": 11, "I": 256, "fp8": True},
        {"M": 3, "I": 129, "dtype": torch.float32, "weighted": True},
        {"M": 5, "I": 1, "dtype": torch.float16, "limit": 0.5},
        {"M": 0, "I": 128, "weighted": True},
        {"M": 3, "I": 0, "weighted": True},
    ],
    cpu=[{"M": 512, "I": 2048, "fp8": True}],
    gpu=[
        {"M": 4096, "I": 2048, "fp8": True, "weighted": True},
        {"M": 4096, "I": 18432, "fp8": True},
        {"M": 4096, "I": 2048},
    ],
    inspect=[
        {"M": 4096, "I": 2048, "fp8": True, "weighted": True, "limit": 7.0},
        {"M": 4096, "I": 18432, "fp8": True},
        {"M": 4096, "I": 2048},
        {"M": 4096, "I": 2048, "dtype": torch.float32, "weighted": True},
        {"M": 4096, "I": 300, "fp8": True, "weighted": True},
    ],
)
EXACT = False
cost = each_tensor_once


def baseline(
    grad, gate_up, gate_up_scale=None, weights=None, limit=None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Dequantize, autograd through F.silu."""
    gate_up = gate_up.float()
    if gate_up_scale is not None:
        gate_up = cast_back.baseline(gate_up, gate_up_scale, (1, 128), torch.float32)
    with torch.enable_grad():
        leaves = [gate_up.detach()] if weights is None else [gate_up.detach(), weights.detach()]
        leaves = [x.requires_grad_() for x in leaves]
        y = swiglu(*leaves, None, limit) if weights is None else swiglu(*leaves, limit)
        grads = torch.autograd.grad(y, leaves, grad.float())
    return grads[0].to(grad.dtype), y.detach().to(grad.dtype), *(grads[1:] or (None,))
