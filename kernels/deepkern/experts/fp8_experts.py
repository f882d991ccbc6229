"""The MoE layer with weights that are trained: forward and all gradients in FP8.

    out        = moe_forward(x, ..., cast(w13), cast(w2))
    grad_x     as moe_forward's                              1x128 · 128x128
    grad_w13   = cast(grad_gate_up)ᵀ · cast(x)               128x1 · 128x1, along an expert's rows
    grad_w2    = cast(grad)ᵀ · cast(weight · h)              128x1 · 128x1, along an expert's rows

A composition of public ops, as `fp8_linear` is for one matrix; gradients are scaled by 2^48 before
the cast, as there. Of the intermediate values only gate_up is saved, in FP8, and SwiGLU is
recomputed; x is saved as given and dispatched again.

Parallelization: that of the ops. The GEMMs along an expert's rows load whole blocks where the first
row is a multiple of 16, so rows are dispatched with that alignment: at most 15 rows of zeros per
expert.

Limit: the tensor cores, in the six GEMMs of a training step.

Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..matmul.fp8_linear import GRAD_SCALE
from ..matmul.k_grouped_fp8_gemm_nt import k_grouped_fp8_gemm_nt
from ..matmul.m_grouped_fp8_gemm_nt_contiguous import m_grouped_fp8_gemm_nt_contiguous
from ..quant.cast_per_block import cast_per_block
from ..quant.cast_per_channel import cast_per_channel
from ..quant.cast_per_token import cast_per_token
from ..quant.swiglu_cast import swiglu_cast_backward
from ..runtime.contract import Contract, check_no_transform, check_that
from .expert_combine import expert_combine
from .expert_dispatch import expert_dispatch, expert_dispatch_backward
from .moe_forward import forward_with_gate_up, moe_forward

ALIGNMENT = 16  # rows
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
    """Computes `moe_forward` with real weights, which are cast in every call and get gradients.

        out = deepkern.fp8_experts(x, topk_weights, topk_idx, w13, w2)
        out.sum().backward()                                        # fills w13.grad and w2.grad

    Args:
        x: bf16, fp16 or fp32 [T, K]; rows may be strided.
        topk_weights: real [T, topk]; rows may be strided.
        topk_idx: int64 or int32 [T, topk]; indices outside [0, E) are ignored.
        w13: real [E, 2I, K], the gate projection (I rows), then the up projection.
        w2: real [E, K, I], the down projection.

    Returns:
        [T, K] in the dtype of `x`, with the bits of `moe_forward` on `cast_per_block` of the
        weights.

    Gradients go to `x`, `topk_weights`, `w13` and `w2`, each in its dtype; those of the weights are
    summed in fp32. `x` is saved for them, and gate_up in FP8. There is no second derivative.

    Raises:
        TypeError, ValueError: an argument violates the rules above.
    """
    CONTRACT.check(
        {"x": x, "topk_weights": topk_weights, "topk_idx": topk_idx, "w13": w13, "w2": w2}
    )
    expected = f"2I = {2 * w2.shape[2]} rows, [gate, up] for w2's I = {w2.shape[2]}"
    check_that("fp8_experts", "w13", w13.shape[1] == 2 * w2.shape[2], expected, tuple(w13.shape))
    if torch.is_grad_enabled():
        check_no_transform("fp8_experts")
        return FP8ExpertsFunction.apply(x, topk_weights, topk_idx, w13, w2)
    return moe_forward(x, topk_weights, topk_idx, *cast_per_block(w13), *cast_per_block(w2))


class FP8ExpertsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, topk_weights, topk_idx, w13, w2):
        w = *cast_per_block(w13), *cast_per_block(w2)
        out, *gate_up = forward_with_gate_up(x, topk_weights, topk_idx, *w, ALIGNMENT)
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

        lifted = (grad.to(wide) * GRAD_SCALE).contiguous()
        grad, _, group_index, counts, handle = dispatch_aligned(lifted, topk_idx, w13)
        weights = scatter_to_rows(topk_weights, topk_idx, w13)
        grad_h = multiply(*cast_per_token(grad), w2.mT, w2_scale.mT, group_index, wide)
        grad_gate_up, h, grad_row_weights = swiglu_cast_backward(
            grad_h, gate_up, gate_up_scale, weights
        )

        grad_x = grad_weights = grad_w13 = grad_w2 = None
        if ctx.needs_input_grad[0]:
            q, scale = cast_per_token(grad_gate_up)
            y = multiply(q, scale / GRAD_SCALE, w13.mT, w13_scale.mT, group_index, wide)
            grad_x = expert_dispatch_backward(y, handle).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weights = gather_from_rows(grad_row_weights, handle) / GRAD_SCALE
            grad_weights = grad_weights.to(topk_weights.dtype)
        padded = (counts + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
        offsets = F.pad(padded.cumsum(0, dtype=torch.int32), (1, 0))  # [E + 1]
        if ctx.needs_input_grad[3]:
            x_rows = dispatch_aligned(x, topk_idx, w13)[0]
            grad_w13 = weight_gradient(grad_gate_up, x_rows, offsets).to(ctx.dtypes[0])
        if ctx.needs_input_grad[4]:
            grad_w2 = weight_gradient(grad, h, offsets).to(ctx.dtypes[1])
        return grad_x, grad_weights, None, grad_w13, grad_w2


def dispatch_aligned(x: Tensor, topk_idx: Tensor, w13: Tensor) -> tuple:
    return expert_dispatch(x, topk_idx, len(w13), None, ALIGNMENT)


def scatter_to_rows(values: Tensor, topk_idx: Tensor, w13: Tensor) -> Tensor:
    """values [T, topk] -> fp32 [rows], by a dispatch in which each slot is a token."""
    slots = values.float().reshape(-1, 1), topk_idx.reshape(-1, 1)
    return dispatch_aligned(*slots, w13)[0][:, 0]


def gather_from_rows(values: Tensor, handle: Tensor) -> Tensor:
    """values fp32 [rows] -> [T, topk], by a combine in which each slot is a token."""
    slots = handle.view(-1, 1)
    ones = torch.ones_like(slots, dtype=torch.float32)
    return expert_combine(values[:, None], ones, slots).view(handle.shape)


def weight_gradient(lifted: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """liftedᵀ · x / GRAD_SCALE over the rows of each expert, fp32 [E, N, K].

    lifted: [rows, N], gradients times GRAD_SCALE; x: [rows, K]; offsets: int32 [E + 1], first rows.
    """
    a, a_scale = cast_per_channel(lifted, "fp32", offsets, True)
    b, b_scale = cast_per_channel(x, "fp32", offsets, True)
    return k_grouped_fp8_gemm_nt(a, a_scale / GRAD_SCALE, b, b_scale, offsets)
