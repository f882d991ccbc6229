"""Combine: a token's rows back from its experts, weighted and summed.

    out[t] = Σ_j topk_weights[t, j] · y[handle[t, j]]  (+ shared[t])

in fp32, slot after slot and the shared expert last, with one rounding at the end, so that a token's
bits depend on nothing but its own rows. Cut: a program takes TOKENS tokens by BLOCK_K columns, and
loads up to SLOTS rows of each before it waits for one. (topk + 1) rows are moved for a token, at
the speed of memory.

The backward pass goes the other way: a program takes one slot of TOKENS tokens, writes w · grad to
the slot's rows of y's gradient and sums <grad, y>. The other programs clear the rows of no slot.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv
from ..runtime.contract import check_that
from ..runtime.op import op
from .rows import BLOCK_K, TOKENS, ZERO_ROWS, check_assignments, slots_in_flight, zero_rows


@op(
    y="real [rows, K]",
    topk_weights="real [T, topk]",
    handle="int32 [T, topk]",
    shared="real [T, K]",
)
def expert_combine(
    y: Tensor, topk_weights: Tensor, handle: Tensor, shared: Tensor | None = None
) -> Tensor:
    """Sums each token's rows of `y` with its weights.

    Args:
        y: bf16, fp16 or fp32 [rows, K], what the experts made of `expert_dispatch`'s rows.
        topk_weights: real [T, topk]; rows may be strided.
        handle: int32 [T, topk] from `expert_dispatch`. A row outside [0, rows) (-1 by convention)
            contributes nothing, whatever its weight is.
        shared: real [T, K], what the shared expert made of the tokens, added in fp32 before the
            one rounding; rows may be strided.

    Returns:
        [T, K] in the dtype of `y`; 0, or `shared`, for a token without rows.

    The gradient goes to `y`, `topk_weights` and `shared`. That of `y` takes each row to be named at
    most once, as in `expert_dispatch`'s handles: of several slots that name a row one counts, the
    last. DEEPKERN_DEBUG=1 raises for a row outside [-1, rows) and, going back, for one named twice.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    check_assignments("expert_combine", "handle", handle)
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
    """Writes Σ_j weights[t, j] · y[handle[t, j]] + shared[t]; without weights they are 1."""
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
    _check_rows("expert_combine", handle, y.shape[0])


def _check_rows(name: str, handle: Tensor, rows: int) -> None:
    wrong = ((handle < -1) | (handle >= rows)).nonzero().tolist()
    got = f"{handle[tuple(wrong[0])].item()} at {tuple(wrong[0])}" if wrong else None
    check_that(name, "handle", not wrong, f"values in [-1, {rows})", got)


@triton.jit(do_not_specialize=["T", "rows"])
def expert_combine_kernel(
    y_ptr, weights_ptr, handle_ptr, shared_ptr, out_ptr, T, topk, rows, K,
    y_row, weights_row, handle_row, shared_row,
    TOKENS: tl.constexpr, BLOCK_K: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    inside = (token < T) & (column < K)
    sum = tl.zeros((TOKENS, BLOCK_K), tl.float32)
    for first in range(0, topk, SLOTS):
        for j in tl.static_range(SLOTS):
            slot = first + j
            has_slot = (token < T) & (slot < topk)
            row = tl.load(handle_ptr + token * handle_row + slot, mask=has_slot, other=-1)
            there = (row >= 0) & (row < rows)  # [TOKENS, 1]
            y_tile = y_ptr + row.to(tl.int64) * y_row + column
            y = tl.load(y_tile, mask=inside & there, other=0.0).to(tl.float32)
            if weights_ptr is None:
                sum += y
            else:
                w = tl.load(weights_ptr + token * weights_row + slot, mask=there, other=0.0)
                w = tl.broadcast_to(w.to(tl.float32), (TOKENS, BLOCK_K))
                sum = tl.fma(w, y, sum)
    if shared_ptr is not None:
        shared = tl.load(shared_ptr + token * shared_row + column, mask=inside, other=0.0)
        sum += shared.to(tl.float32)
    tl.store(out_ptr + token * K + column, sum.to(out_ptr.dtype.element_ty), mask=inside)


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

    Args:
        grad: real [T, K], of the output.
        y, topk_weights, handle: as in the forward pass; each row named at most once.

    Returns:
        grad_y: [rows, K] in the dtype of `y`: topk_weights[t, j] · grad[t] in the row that
            handle[t, j] names, 0 in rows that none does.
        grad_weights: fp32 [T, topk]: <grad[t], y[handle[t, j]]>, 0 where there is no row.
    """
    check_assignments("expert_combine_backward", "handle", handle)
    return y.new_empty(y.shape), y.new_empty(handle.shape, dtype=torch.float32)


@expert_combine_backward.op.register_debug_check
def check_contents_backward(grad: Tensor, y: Tensor, topk_weights: Tensor, handle: Tensor) -> None:
    """For DEEPKERN_DEBUG=1: so, and no row is named twice."""
    _check_rows("expert_combine_backward", handle, y.shape[0])
    named, times = handle[handle >= 0].unique(return_counts=True)
    twice = named[times > 1].tolist()
    expected = "each row named at most once"
    check_that("expert_combine_backward", "handle", not twice, expected, f"rows {twice[:8]} again")


@expert_combine_backward.op.register_launcher("triton")
def _launch_backward_triton(
    grad: Tensor, y: Tensor, topk_weights: Tensor, handle: Tensor
) -> tuple[Tensor, Tensor]:
    grad_y, grad_weights = expert_combine_backward.op.allocate(grad, y, topk_weights, handle)
    (T, topk), (rows, K) = handle.shape, y.shape
    owner = torch.full((rows,), -1, dtype=torch.int32, device=y.device)  # the slot that names a row
    if handle.numel() and rows:
        own_kernel[(cdiv(T * topk, 1024),)](
            handle, owner, T * topk, topk, rows, handle.stride(0), BLOCK=1024
        )  # fmt: skip
    slots = cdiv(T, TOKENS) * topk
    programs = slots + cdiv(rows, ZERO_ROWS)
    if programs:
        expert_combine_backward_kernel[(programs,)](
            grad, y, topk_weights, handle, owner, grad_y, grad_weights, T, topk, rows, K, slots,
            grad.stride(0), y.stride(0), topk_weights.stride(0), handle.stride(0),
            TOKENS=TOKENS, BLOCK_K=BLOCK_K, ZERO_ROWS=ZERO_ROWS, num_warps=8,
        )  # fmt: skip
    return grad_y, grad_weights


@triton.jit(do_not_specialize=["count", "rows"])
def own_kernel(handle_ptr, owner_ptr, count, topk, rows, handle_row, BLOCK: tl.constexpr):
    """owner[row] = the last of the slots that name it; a maximum does not ask in which order."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    handle_tile = handle_ptr + (i // topk).to(tl.int64) * handle_row + i % topk
    row = tl.load(handle_tile, mask=i < count, other=-1)
    there = (row >= 0) & (row < rows)
    tl.atomic_max(owner_ptr + row, i, mask=there, sem="relaxed")


@triton.jit(do_not_specialize=["T", "rows", "slots"])
def expert_combine_backward_kernel(
    grad_ptr, y_ptr, weights_ptr, handle_ptr, owner_ptr, grad_y_ptr, grad_weights_ptr,
    T, topk, rows, K, slots, grad_row, y_row, weights_row, handle_row,
    TOKENS: tl.constexpr, BLOCK_K: tl.constexpr, ZERO_ROWS: tl.constexpr,
):  # fmt: skip
    """The first `slots` programs take one slot of TOKENS tokens each, the others clear rows."""
    column = tl.arange(0, BLOCK_K)
    if tl.program_id(0) >= slots:
        first = (tl.program_id(0) - slots) * ZERO_ROWS
        for start in range(0, K, BLOCK_K):
            zero_rows(grad_y_ptr, owner_ptr, rows, K, first, start + column, ZERO_ROWS, BLOCK_K)
    else:
        # The slots of a token run side by side, so that its gradient is read from memory once.
        slot = tl.program_id(0) % topk
        token = (tl.program_id(0) // topk * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
        row = tl.load(handle_ptr + token * handle_row + slot, mask=token < T, other=-1)
        there = (row >= 0) & (row < rows)  # [TOKENS, 1]
        owner = tl.load(owner_ptr + row, mask=there, other=-1)
        owns = there & (owner == token * topk + slot)
        w = tl.load(weights_ptr + token * weights_row + slot, mask=there, other=0.0).to(tl.float32)
        row = row.to(tl.int64)
        dot = tl.zeros((TOKENS, BLOCK_K), tl.float32)
        for start in range(0, K, BLOCK_K):
            k = (start + column)[None, :]
            inside = there & (k < K)
            grad = tl.load(grad_ptr + token * grad_row + k, mask=inside, other=0.0).to(tl.float32)
            y = tl.load(y_ptr + row * y_row + k, mask=inside, other=0.0).to(tl.float32)
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
