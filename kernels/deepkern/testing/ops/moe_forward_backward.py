"""Inputs, sizes, cost and baseline of moe_forward_backward."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from ... import reference
from ..random_inputs import small_integers
from . import Sizes, cast_per_token, expert_dispatch, moe_forward, swiglu_cast_backward
from .expert_combine import weighted_sum
from .moe_forward import grouped_linear

BF16 = torch.bfloat16


def inputs(
    generator: Generator, T: int, E: int, topk: int, K: int, I: int, dtype: torch.dtype = BF16,
    none: float = 0.1,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of 2^-24, as small as in training; 2^-12 in float16, which has no smaller ones."""
    _, weights, idx, *w = moe_forward.inputs(generator, T, E, topk, K, I, dtype, none)
    gate_up = torch.randn(T * topk, 2 * I, generator=generator, device=idx.device)
    grad = small_integers(generator, T, K) * 2.0 ** (-12 if dtype == torch.float16 else -24)
    return grad.to(dtype), weights, idx, *reference.cast_per_token(gate_up), *w


SIZES = Sizes(
    small=[
        {"T": 6, "E": 4, "topk": 3, "K": 256, "I": 128},
        {"T": 5, "E": 5, "topk": 2, "K": 200, "I": 72, "dtype": torch.float32},
        {"T": 3, "E": 9, "topk": 3, "K": 130, "I": 100, "dtype": torch.float16},
        {"T": 0, "E": 4, "topk": 2, "K": 128, "I": 128},
        {"T": 3, "E": 4, "topk": 2, "K": 128, "I": 0},
    ],
    cpu=[{"T": 64, "E": 16, "topk": 4, "K": 512, "I": 256, "none": 0.0}],
    gpu=[{"T": 4096, "E": 32, "topk": 8, "K": 7168, "I": 2048, "none": 0.0}],
    inspect=[{"T": 4096, "E": 32, "topk": 8, "K": 7168, "I": 2048}],
)
EXACT = False
FP8_PRODUCT = True
cost = moe_forward.cost


def baseline(
    grad, topk_weights, topk_idx, gate_up, gate_up_scale, w13, w13_scale, w2, w2_scale
) -> tuple[Tensor, Tensor]:
    """Expert by expert, as forward, with gradients cast to FP8; torch's gradient of SwiGLU."""
    wide, grad_scale = torch.float32 if grad.dtype == torch.float32 else torch.bfloat16, 2.0**48
    q, scale, group_index, _, handle = expert_dispatch.baseline(
        grad.float() * grad_scale, topk_idx, len(w13), cast="fp32"
    )
    grad_h = grouped_linear(q, scale, w2.mT, w2_scale.mT, group_index, wide)
    valid = handle >= 0
    weights = torch.zeros(len(q), device=q.device)
    weights[handle[valid]] = topk_weights[valid].float()
    grad_gate_up, _, row_grads = swiglu_cast_backward.baseline(
        grad_h, gate_up, gate_up_scale, weights
    )
    q, scale = cast_per_token.baseline(grad_gate_up)
    y = grouped_linear(q, scale / grad_scale, w13.mT, w13_scale.mT, group_index, wide)
    grad_weights = (
        torch.where(valid, row_grads[handle.clamp(min=0)] / grad_scale, 0.0)
        if len(q)
        else row_grads
    )
    return weighted_sum(y, None, handle).to(grad.dtype), grad_weights.view(handle.shape)
