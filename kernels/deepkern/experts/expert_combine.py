"""Combine: gathers each token's rows from its experts and sums them with weights.

    out[t] = Σ_j topk_weights[t, j] · y[handle[t, j]]  (+ shared[t])

The sum is in fp32, in the order of the slots, with the shared expert last and one rounding at the
end. A token's bits depend on its own rows only.

Parallelization: one program sums TOKENS tokens x BLOCK_K columns. It loads up to SLOTS rows of a
token before it uses the first.

Limit: memory bandwidth, (topk + 1) rows per token.

Backward: one program processes one slot of TOKENS tokens. It writes w · grad to the slot's rows of
grad_y and reduces <grad, y>. Further programs clear the rows that no slot names.

Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 2.1.2, defines the layer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv
from ..runtime.contract import check_that
from ..runtime.op import op
from .checks import check_assignments, check_indices
from .rows import BLOCK_K, TOKENS, ZERO_ROWS, slots_in_flight, zero_rows


@op(
    y="real [rows, K]",
    topk_weights="real [T, topk]",
    handle="int32 [T, topk]",
    shared="real [T, K]",
)
def expert_combine(
    y: Tensor, topk_weights: Tensor, handle: Tensor, shared: Tensor | None = None
) -> Tensor:
    """Sums the rows of `y` that belong to each token, with its weights.

        out = deepkern.expert_combine(y, topk_weights, handle)

    Args:
        y: bf16, fp16 or fp32 [rows, K], the experts' outputs for the rows of `expert_dispatch`.
        topk_weights: real [T, topk]; rows may be strided.
        handle: int32 [T, topk] from `expert_dispatch`. Rows outside [0, rows) (use -1) are
            ignored, whatever their weights are.
        shared: real [T, K], the output of the shared expert, added in fp32 before the rounding;
            rows may be strided.

    Returns:
        [T, K] in the dtype of `y`; 0, or `shared`, for a token without rows.

    The gradient goes to `y`, `topk_weights` and `shared`. That of `y` requires that each row is
    named at most once, as in the handles of `expert_dispatch`: if several slots name one row, the
    last slot counts. DEEPKERN_DEBUG=1 raises for a row outside [-1, rows) and, in the backward
    pass, for a row named twice.

    Raises:
        TypeError, ValueError: an argument violates the rules above.
    """
    check_assignments("expert_combine", "handle", handle)
    # Fake kernel: allocates the outputs; the launcher of a backend computes them.
    return y.new_empty((handle.shape[0], y.shape[1]))


@expert_combine.op.register_launcher("triton")
def _launch_triton(
    y: Tensor, topk_weights: Tensor, handle: Tensor, shared: Tensor | None
) -> Tensor:
    out = expert_combine.op.allocate(y, topk_weights, handle, shared)
    return sum_rows(y, topk_weights, handle, out, shared)


def sum_rows(
    y: Tensor, weights: Tensor | None, handle: Tensor, out: Tensor, shared: Tensor | None = None
) -> Tensor:
    """Writes Σ_j weights[t, j] · y[handle[t, j]] + shared[t] to `out` and returns it.

    All weights are 1 if `weights` is None.
    """
    (T, topk), (rows, K) = handle.shape, y.shape
    if out.numel() == 0:
        return out
    expert_combine_kernel[(cdiv(T, TOKENS), cdiv(K, BLOCK_K))](
        y, weights, handle, shared, out, T, topk, rows, K, y.stride(0),
        0 if weights is None else weights.stride(0), handle.stride(0),
        0 if shared is None else shared.stride(0),
        TOKENS=TOKENS, BLOCK_K=BLOCK_K, SLOTS=slots_in_flight(topk), num_warps=8,
    )  # fmt: skip
    return out


@expert_combine.op.register_debug_check
def check_contents(y: Tensor, topk_weights: Tensor, handle: Tensor, *_) -> None:
    """For DEEPKERN_DEBUG=1: every entry of the handle is a row or -1."""
    check_indices("expert_combine", "handle", handle, y.shape[0])


@triton.jit(do_not_specialize=["T", "rows"])
def expert_combine_kernel(
    y_ptr,  # real [rows, K]
    weights_ptr,  # real [T, topk], or None for weights of 1
    handle_ptr,  # int32 [T, topk], the row of each slot
    shared_ptr,  # real [T, K], or None
    out_ptr,  # real [T, K], contiguous
    T,  # tokens
    topk,
    rows,  # of y; other values in the handle are ignored
    K,  # columns
    y_stride,  # elements between rows of y, as the strides below
    weights_stride,
    handle_stride,
    shared_stride,
    TOKENS: tl.constexpr,  # tokens per program
    BLOCK_K: tl.constexpr,  # columns per program
    SLOTS: tl.constexpr,  # slots unrolled
):
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    out_mask = (token < T) & (column < K)
    sum = tl.zeros((TOKENS, BLOCK_K), tl.float32)
    for first in range(0, topk, SLOTS):
        for j in tl.static_range(SLOTS):
            slot = first + j
            slot_mask = (token < T) & (slot < topk)
            row = tl.load(handle_ptr + token * handle_stride + slot, mask=slot_mask, other=-1)
            row_mask = (row >= 0) & (row < rows)  # [TOKENS, 1]
            y_tile = y_ptr + row.to(tl.int64) * y_stride + column
            y = tl.load(y_tile, mask=out_mask & row_mask, other=0.0).to(tl.float32)
            if weights_ptr is None:
                sum += y
            else:
                w = tl.load(weights_ptr + token * weights_stride + slot, mask=row_mask, other=0.0)
                w = tl.broadcast_to(w.to(tl.float32), (TOKENS, BLOCK_K))
                sum = tl.fma(w, y, sum)
    if shared_ptr is not None:
        shared = tl.load(shared_ptr + token * shared_stride + column, mask=out_mask, other=0.0)
        sum += shared.to(tl.float32)
    tl.store(out_ptr + token * K + column, sum.to(out_ptr.dtype.element_ty), mask=out_mask)


@op(
    grad="real [T, K]",
    y="real [rows, K]",
    topk_weights="real [T, topk]",
    handle="int32 [T, topk]",
)
def expert_combine_backward(
    grad: Tensor, y: Tensor, topk_weights: Tensor, handle: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of `expert_combine` with respect to `y` and `topk_weights`.

        grad_y, grad_weights = deepkern.expert_combine_backward(grad, y, topk_weights, handle)

    Args:
        grad: real [T, K], of the output.
        y, topk_weights, handle: as in the forward pass; each row named at most once.

    Returns:
        grad_y: [rows, K] in the dtype of `y`: topk_weights[t, j] · grad[t] in row handle[t, j],
            0 in the rows that no slot names.
        grad_weights: fp32 [T, topk]: <grad[t], y[handle[t, j]]>, 0 for slots without a row.

    Raises:
        TypeError, ValueError: an argument violates the rules above.
    """
    check_assignments("expert_combine_backward", "handle", handle)
    # Fake kernel: allocates the outputs; the launcher of a backend computes them.
    return y.new_empty(y.shape), y.new_empty(handle.shape, dtype=torch.float32)


@expert_combine_backward.op.register_debug_check
def check_contents_backward(grad: Tensor, y: Tensor, topk_weights: Tensor, handle: Tensor) -> None:
    """For DEEPKERN_DEBUG=1: every entry of the handle is a row or -1, and no row is named twice."""
    check_indices("expert_combine_backward", "handle", handle, y.shape[0])
    rows, counts = handle[handle >= 0].unique(return_counts=True)
    repeated = rows[counts > 1].tolist()
    check_that("expert_combine_backward", "handle", not repeated, "each row named at most once",
               f"rows {repeated[:8]} again")  # fmt: skip


@expert_combine_backward.op.register_launcher("triton")
def _launch_backward_triton(
    grad: Tensor, y: Tensor, topk_weights: Tensor, handle: Tensor
) -> tuple[Tensor, Tensor]:
    grad_y, grad_weights = expert_combine_backward.op.allocate(grad, y, topk_weights, handle)
    (T, topk), (rows, K) = handle.shape, y.shape
    owner = torch.full((rows,), -1, dtype=torch.int32, device=y.device)
    if handle.numel() and rows:
        expert_combine_backward_owner_kernel[(cdiv(T * topk, 1024),)](
            handle, owner, T * topk, topk, rows, handle.stride(0), BLOCK=1024
        )
    slot_programs = cdiv(T, TOKENS) * topk
    programs = slot_programs + cdiv(rows, ZERO_ROWS)
    if programs:
        expert_combine_backward_kernel[(programs,)](
            grad, y, topk_weights, handle, owner, grad_y, grad_weights, T, topk, rows, K,
            slot_programs, grad.stride(0), y.stride(0), topk_weights.stride(0), handle.stride(0),
            TOKENS=TOKENS, BLOCK_K=BLOCK_K, ZERO_ROWS=ZERO_ROWS, num_warps=8,
        )  # fmt: skip
    return grad_y, grad_weights


@triton.jit(do_not_specialize=["count", "rows"])
def expert_combine_backward_owner_kernel(
    handle_ptr,  # int32 [T, topk], the row of each slot
    owner_ptr,  # int32 [rows], -1 at first: the last slot t * topk + j that names each row
    count,  # T * topk
    topk,
    rows,
    handle_stride,  # elements between rows of the handle
    BLOCK: tl.constexpr,  # slots per program
):
    # The atomic maximum gives the same result in any order of the programs.
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    handle_tile = handle_ptr + (i // topk).to(tl.int64) * handle_stride + i % topk
    row = tl.load(handle_tile, mask=i < count, other=-1)
    tl.atomic_max(owner_ptr + row, i, mask=(row >= 0) & (row < rows), sem="relaxed")


@triton.jit(do_not_specialize=["T", "rows", "slot_programs"])
def expert_combine_backward_kernel(
    grad_ptr,  # real [T, K], of the output
    y_ptr,  # real [rows, K]
    weights_ptr,  # real [T, topk]
    handle_ptr,  # int32 [T, topk], the row of each slot
    owner_ptr,  # int32 [rows], the slot t * topk + j that writes each row, -1 for none
    grad_y_ptr,  # real [rows, K], contiguous, written
    grad_weights_ptr,  # fp32 [T, topk], contiguous, written
    T,  # tokens
    topk,
    rows,
    K,  # columns
    slot_programs,  # programs that process one slot of TOKENS tokens; the others clear rows
    grad_stride,  # elements between rows of grad, as the strides below
    y_stride,
    weights_stride,
    handle_stride,
    TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,  # columns per step
    ZERO_ROWS: tl.constexpr,  # rows per clearing program
):
    column = tl.arange(0, BLOCK_K)
    if tl.program_id(0) >= slot_programs:
        first = (tl.program_id(0) - slot_programs) * ZERO_ROWS
        for start in range(0, K, BLOCK_K):
            zero_rows(grad_y_ptr, owner_ptr, rows, K, first, start + column, ZERO_ROWS, BLOCK_K)
    else:
        # Programs of the same tokens are adjacent: they read the gradient from memory once.
        slot = tl.program_id(0) % topk
        token = (tl.program_id(0) // topk * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
        row = tl.load(handle_ptr + token * handle_stride + slot, mask=token < T, other=-1)
        row_mask = (row >= 0) & (row < rows)  # [TOKENS, 1]
        owner = tl.load(owner_ptr + row, mask=row_mask, other=-1)
        owns = row_mask & (owner == token * topk + slot)
        w = tl.load(weights_ptr + token * weights_stride + slot, mask=row_mask, other=0.0)
        w = w.to(tl.float32)
        row = row.to(tl.int64)
        dot = tl.zeros((TOKENS, BLOCK_K), tl.float32)
        for start in range(0, K, BLOCK_K):
            k = (start + column)[None, :]
            mask = row_mask & (k < K)
            grad = tl.load(grad_ptr + token * grad_stride + k, mask=mask, other=0.0).to(tl.float32)
            y = tl.load(y_ptr + row * y_stride + k, mask=mask, other=0.0).to(tl.float32)
            dot = tl.fma(grad, y, dot)
            grad_y = (w * grad).to(grad_y_ptr.dtype.element_ty)
            tl.store(grad_y_ptr + row * K + k, grad_y, mask=owns & (k < K))
        out = grad_weights_ptr + token * topk + slot
        tl.store(out, tl.sum(dot, 1, keep_dims=True), mask=token < T)


@expert_combine.op.register_autograd
class ExpertCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, topk_weights, handle, shared):
        ctx.save_for_backward(y, topk_weights, handle)
        ctx.shared_dtype = None if shared is None else shared.dtype
        return expert_combine.op.overload(y, topk_weights, handle, shared)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        y, topk_weights, handle = ctx.saved_tensors
        grad_y, grad_weights = expert_combine_backward.op.overload(
            grad.contiguous(), y, topk_weights, handle
        )
        grad_shared = None if ctx.shared_dtype is None else grad.to(ctx.shared_dtype)
        return grad_y, grad_weights.to(topk_weights.dtype), None, grad_shared
