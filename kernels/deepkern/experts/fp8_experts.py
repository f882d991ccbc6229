"""The expert layer with weights that are trained: forward and all gradients in FP8.

    out        = moe_forward(x, ..., cast(w13), cast(w2))
    grad_x     as moe_forward's                              1x128 · 128x128
    grad_w13   = cast(grad_gate_up)ᵀ · cast(x)               128x1 · 128x1, along an expert's rows
    grad_w2    = cast(grad)ᵀ · cast(weight · h)              128x1 · 128x1, along an expert's rows

Not an op but a composition of the public ones, as `fp8_linear` is for one matrix; gradients are
cast 2^48 times as large, as there. Of what the layer computes, gate_up is kept in FP8 and SwiGLU
recomputed; x, which is kept as it came, is dispatched again.

Cut: the products over an expert's rows read whole blocks where these begin at a multiple of 16, so
rows are dispatched with that alignment: at most 15 rows of zeros for an expert.

Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..matmul.fp8_linear import GRAD_SCALE as LIFT
from ..matmul.k_grouped_fp8_gemm_nt import k_grouped_fp8_gemm_nt
from ..matmul.m_grouped_fp8_gemm_nt_contiguous import m_grouped_fp8_gemm_nt_contiguous
from ..quant.cast_per_block import cast_per_block
from ..quant.cast_per_channel import cast_per_channel
from ..quant.cast_per_token import cast_per_token
from ..quant.swiglu_cast import swiglu_cast_backward
from ..runtime.contract import Contract, check_that
from .expert_combine import expert_combine
from .expert_dispatch import expert_dispatch, expert_dispatch_backward
from .moe_forward import moe_forward, step_by_step

ALIGNMENT = 16
CONTRACT = Contract(
    "fp8_experts",
    x="real [T, K]",
    topk_weights="real [T, topk]",
    topk_idx="int64|int32 [T, topk]",
    w13="real [E, J, K]",
    w2="real [E, K, I]",
)


def fp8_experts(
    x: Tensor, topk_weights: Tensor, topk_idx: Tensor, w13: Tensor, w2: Tensor
) -> Tensor:
    """`moe_forward` with real weights, cast in every call, which get gradients.

    Args:
        x: bf16, fp16 or fp32 [T, K]; rows may be strided.
        topk_weights: real [T, topk]; rows may be strided.
        topk_idx: int64 or int32 [T, topk]; whatever is not in [0, E) is no expert.
        w13: real [E, 2I, K], the gates' rows, then those of the values they let through.
        w2: real [E, K, I].

    Returns:
        [T, K] in the dtype of `x`, the bits of `moe_forward` on `cast_per_block` of the weights.

    Gradients go to `x`, `topk_weights`, `w13` and `w2`, each in its dtype; those of the weights are
    summed in fp32. `x` is kept for them, and gate_up in FP8. There is no second derivative.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    given = {"x": x, "topk_weights": topk_weights, "topk_idx": topk_idx, "w13": w13, "w2": w2}
    for name, tensor in given.items():  # the contract takes None for left out
        if tensor is None:
            raise TypeError(f"fp8_experts: {name}: expected a Tensor, got None")
    CONTRACT.check(given)
    expected = f"2I = {2 * w2.shape[2]} rows, [gate, up] for w2's I = {w2.shape[2]}"
    check_that("fp8_experts", "w13", w13.shape[1] == 2 * w2.shape[2], expected, tuple(w13.shape))
    if torch.is_grad_enabled():
        return FP8ExpertsFunction.apply(x, topk_weights, topk_idx, w13, w2)
    return moe_forward(x, topk_weights, topk_idx, *cast_per_block(w13), *cast_per_block(w2))


class FP8ExpertsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, topk_weights, topk_idx, w13, w2):
        w = *cast_per_block(w13), *cast_per_block(w2)
        out, *gate_up = step_by_step(x, topk_weights, topk_idx, *w, ALIGNMENT)
        ctx.save_for_backward(x, topk_weights, topk_idx, *gate_up, *w)
        ctx.dtypes = w13.dtype, w2.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, topk_weights, topk_idx, gate_up, gate_up_scale, *w = ctx.saved_tensors
        w13, w13_scale, w2, w2_scale = w
        wide = torch.bfloat16 if grad.dtype == torch.bfloat16 else torch.float32
        multiply = m_grouped_fp8_gemm_nt_contiguous

        lifted = (grad.to(wide) * LIFT).contiguous()
        grad, _, group_index, counts, handle = to_experts(lifted, topk_idx, w13)
        weights = of_slots(topk_weights, topk_idx, w13)
        grad_h = multiply(*cast_per_token(grad), w2.mT, w2_scale.mT, group_index, wide)
        grad_gate_up, h, of_row = swiglu_cast_backward(grad_h, gate_up, gate_up_scale, weights)

        grad_x = grad_weights = grad_w13 = grad_w2 = None
        if ctx.needs_input_grad[0]:
            q, scale = cast_per_token(grad_gate_up)
            y = multiply(q, scale / LIFT, w13.mT, w13_scale.mT, group_index, wide)
            grad_x = expert_dispatch_backward(y, handle).to(x.dtype)
        if ctx.needs_input_grad[1]:
            slots = handle.view(-1, 1)
            ones = torch.ones_like(slots, dtype=torch.float32)
            grad_weights = (expert_combine(of_row[:, None], ones, slots) / LIFT).view(handle.shape)
            grad_weights = grad_weights.to(topk_weights.dtype)
        padded = (counts + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
        offsets = F.pad(padded.cumsum(0, dtype=torch.int32), (1, 0))  # [E + 1]
        if ctx.needs_input_grad[3]:
            x_rows = to_experts(x, topk_idx, w13)[0]
            grad_w13 = outer(grad_gate_up, x_rows, offsets).to(ctx.dtypes[0])
        if ctx.needs_input_grad[4]:
            grad_w2 = outer(grad, h, offsets).to(ctx.dtypes[1])
        return grad_x, grad_weights, None, grad_w13, grad_w2


def to_experts(x: Tensor, topk_idx: Tensor, w13: Tensor) -> tuple:
    return expert_dispatch(x, topk_idx, len(w13), None, ALIGNMENT)


def of_slots(values: Tensor, topk_idx: Tensor, w13: Tensor) -> Tensor:
    """values [T, topk] in the rows of their assignments, fp32 [rows]: each slot is a token here."""
    return to_experts(values.float().reshape(-1, 1), topk_idx.reshape(-1, 1), w13)[0][:, 0]


def outer(lifted: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """liftedᵀ · x / LIFT over the rows of each expert: fp32 [E, columns of lifted, of x]."""
    a, a_scale = cast_per_channel(lifted, "fp32", offsets, True)
    b, b_scale = cast_per_channel(x, "fp32", offsets, True)
    return k_grouped_fp8_gemm_nt(a, a_scale / LIFT, b, b_scale, offsets)
