"""Merges two attentions of the same queries over disjoint keys into the attention over all keys.

    lse = log(exp(lse_a) + exp(lse_b))
    out = exp(lse_a - lse) * out_a + exp(lse_b - lse) * out_b

This allows prefill in chunks, and a context that is distributed over several GPUs.

Parallelization: one program takes ROWS rows; a row is one head of one query, and its D values are
processed BLOCK_D at a time. Every value is read once and written once; the speed is limited by
memory bandwidth.

Backward, with w = exp(lse_a - lse) and grad the gradient of out:

    grad_out_a = w * grad        grad_lse_a = w * (grad_lse + (1 - w) * <grad, out_a - out_b>)

and the same with a and b exchanged. The sum over D has a fixed order.

Source: FlashAttention (arXiv 2205.14135), section 3.1: softmax of a concatenation from its parts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import KernelInterface

from ..arithmetic import cdiv, next_power_of_2
from ..runtime.contract import check_that
from ..runtime.op import op

TILE = 2048  # values of each input that a program of 4 warps holds at a time: two loads a thread


@op(
    out_a="real [..., S, H, D]",
    lse_a="fp32 [..., H, S] strided",
    out_b="real [..., S, H, D]",
    lse_b="fp32 [..., H, S] strided",
)
def merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Merges two attentions of the same queries over disjoint sets of keys.

        out, lse = deepkern.merge_states(*deepkern.mla_decode(...), *deepkern.mla_decode(...))

    Args:
        out_a, out_b: bf16, fp16 or fp32 [..., S, H, D], the results: [B, Sq, H, R] of `mla_decode`,
            [T, H, D] of `mla_prefill`. Any strides, except that the last dimension is contiguous.
        lse_a, lse_b: fp32 [..., H, S], natural logs of the sums of exponentials, heads before
            queries: [B, H, Sq] and [H, T] of the same ops. Any strides. -inf means that the query
            had no key; `out` is not read there. (FlashMLA uses +inf for that; here +inf, like NaN,
            makes the whole row and its lse NaN.)

    Returns:
        out: [..., S, H, D] in the dtype of `out_a`, contiguous; computed in fp32, rounded once.
            Exactly the other result where one lse is -inf, and 0 where both are.
        lse: fp32 [..., H, S], natural log; -inf where both are.

    All four arguments receive gradients. Merging is associative up to rounding: merge more than two
    results one after the other.

    Raises:
        TypeError, ValueError: an argument does not match the above.
    """
    check_rows("merge_states", lse_a)
    # Fake kernel: allocates the outputs; the launcher of a backend computes them.
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


@op(
    grad_out="real [..., S, H, D] contiguous",
    grad_lse="fp32 [..., H, S] contiguous",
    out_a="real [..., S, H, D]",
    lse_a="fp32 [..., H, S] strided",
    out_b="real [..., S, H, D]",
    lse_b="fp32 [..., H, S] strided",
)
def merge_states_backward(
    grad_out: Tensor, grad_lse: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `merge_states` with respect to its four arguments, in their dtypes.

        grads = deepkern.merge_states_backward(grad_out, grad_lse, out_a, lse_a, out_b, lse_b)

    Args:
        grad_out, grad_lse: gradients of the two results; contiguous.
        out_a, lse_a, out_b, lse_b: as in the forward pass.

    Returns:
        grad_out_a, grad_lse_a, grad_out_b, grad_lse_b: 0 where the lse is -inf.

    Raises:
        TypeError, ValueError: an argument does not match the above.
    """
    check_rows("merge_states_backward", lse_a)
    # Fake kernel: allocates the outputs; the launcher of a backend computes them.
    return tuple(x.new_empty(x.shape) for x in (out_a, lse_a, out_b, lse_b))


def check_rows(op: str, lse: Tensor) -> None:
    """Raises ValueError unless the row numbers of all tiles fit into 32 bits."""
    check_that(op, "lse_a", lse.numel() <= 2**31 - TILE,
               "at most 2**31 - 2048 queries times heads", f"shape {tuple(lse.shape)}")  # fmt: skip


def choose_tile(D: int) -> tuple[int, int]:
    """ROWS and BLOCK_D, from D only."""
    BLOCK_D = min(max(next_power_of_2(D), 16), 512)
    return TILE // BLOCK_D, BLOCK_D


@merge_states.op.register_launcher("triton")
def _launch_triton(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    out, lse = merge_states.op.allocate(out_a, lse_a, out_b, lse_b)
    _launch(merge_states_kernel, out_a, lse_a, out_b, lse_b, out, lse)
    return out, lse


@merge_states_backward.op.register_launcher("triton")
def _launch_backward_triton(
    grad_out: Tensor, grad_lse: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = merge_states_backward.op.allocate(grad_out, grad_lse, out_a, lse_a, out_b, lse_b)
    kernel = merge_states_backward_kernel
    _launch(kernel, out_a, lse_a, out_b, lse_b, grad_out, grad_lse, *grads)
    return grads


class OutStrides(NamedTuple):
    """Strides of out [B, S, H, D], in elements, as one kernel argument."""

    batch_stride: int
    query_stride: int
    head_stride: int


def _launch(
    kernel: KernelInterface,
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor,
    lse_b: Tensor,
    *contiguous: Tensor,
) -> None:
    """Launches a kernel on both states and on its other tensors, which are contiguous."""
    if lse_a.numel() == 0:
        return
    S, H, D = out_a.shape[-3:]
    (out_a, lse_a), (out_b, lse_b) = _flatten(out_a, lse_a), _flatten(out_b, lse_b)
    ROWS, BLOCK_D = choose_tile(D)
    kernel[(cdiv(lse_a.numel(), ROWS),)](
        out_a, lse_a, out_b, lse_b, *contiguous, lse_a.numel(), S, H, D,
        OutStrides(*out_a.stride()[:3]), *lse_a.stride(),
        OutStrides(*out_b.stride()[:3]), *lse_b.stride(),
        ROWS=ROWS, BLOCK_D=BLOCK_D, num_warps=4,
    )  # fmt: skip


def _flatten(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """[B, S, H, D] and [B, H, S]: views, unless the leading dimensions cannot be merged."""
    B = math.prod(out.shape[:-3])
    return out.reshape(B, *out.shape[-3:]), lse.reshape(B, *lse.shape[-2:])


# These depend on the number of queries. Without specialization, a new number compiles nothing.
# (Triton specializes the members of a tuple in any case, so the strides of lse are not in one.)
NOT_SPECIALIZED = [
    "rows",
    "S",
    *(f"lse_{x}_{of}" for x in "ab" for of in ("batch", "head", "query")),
]


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def merge_states_kernel(
    out_a_ptr,  # [B, S, H, D]
    lse_a_ptr,  # fp32 [B, H, S], natural log
    out_b_ptr,
    lse_b_ptr,
    out_ptr,  # [B, S, H, D] contiguous
    lse_ptr,  # fp32 [B, H, S] contiguous
    rows,  # B * S * H
    S,
    H,
    D,
    out_a_strides,  # OutStrides
    lse_a_batch,  # strides, in elements
    lse_a_head,
    lse_a_query,
    out_b_strides,
    lse_b_batch,
    lse_b_head,
    lse_b_query,
    ROWS: tl.constexpr,  # rows of a program
    BLOCK_D: tl.constexpr,  # columns per step
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = row < rows
    batch, query, head = split_row(row, S, H)  # [ROWS]
    lse_a_index = batch * lse_a_batch + head * lse_a_head + query * lse_a_query
    lse_b_index = batch * lse_b_batch + head * lse_b_head + query * lse_b_query
    a_row, b_row, a_mask, b_mask, weight_a, weight_b, lse = load_states(
        out_a_ptr, out_a_strides, lse_a_ptr + lse_a_index,
        out_b_ptr, out_b_strides, lse_b_ptr + lse_b_index, batch, query, head, row_mask,
    )  # fmt: skip
    tl.store(lse_ptr + (batch * H + head) * S + query, lse, mask=row_mask)
    for start in range(0, D, BLOCK_D):
        column = (start + tl.arange(0, BLOCK_D))[None, :]
        mask = column < D
        a = tl.load(a_row + column, mask=mask & a_mask, other=0.0).to(tl.float32)
        b = tl.load(b_row + column, mask=mask & b_mask, other=0.0).to(tl.float32)
        out = weight_a[:, None] * a + weight_b[:, None] * b  # [ROWS, BLOCK_D]
        out_tile = out_ptr + row.to(tl.int64)[:, None] * D + column
        tl.store(out_tile, out.to(out_ptr.dtype.element_ty), mask=mask & row_mask[:, None])


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def merge_states_backward_kernel(
    out_a_ptr,  # [B, S, H, D]
    lse_a_ptr,  # fp32 [B, H, S], natural log
    out_b_ptr,
    lse_b_ptr,
    grad_out_ptr,  # [B, S, H, D] contiguous
    grad_lse_ptr,  # fp32 [B, H, S] contiguous
    grad_out_a_ptr,  # [B, S, H, D] contiguous
    grad_lse_a_ptr,  # fp32 [B, H, S] contiguous
    grad_out_b_ptr,
    grad_lse_b_ptr,
    rows,  # B * S * H
    S,
    H,
    D,
    out_a_strides,  # OutStrides
    lse_a_batch,  # strides, in elements
    lse_a_head,
    lse_a_query,
    out_b_strides,
    lse_b_batch,
    lse_b_head,
    lse_b_query,
    ROWS: tl.constexpr,  # rows of a program
    BLOCK_D: tl.constexpr,  # columns per step
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = row < rows
    batch, query, head = split_row(row, S, H)  # [ROWS]
    lse_a_index = batch * lse_a_batch + head * lse_a_head + query * lse_a_query
    lse_b_index = batch * lse_b_batch + head * lse_b_head + query * lse_b_query
    a_row, b_row, a_mask, b_mask, weight_a, weight_b, _ = load_states(
        out_a_ptr, out_a_strides, lse_a_ptr + lse_a_index,
        out_b_ptr, out_b_strides, lse_b_ptr + lse_b_index, batch, query, head, row_mask,
    )  # fmt: skip
    product = tl.zeros((ROWS, BLOCK_D), tl.float32)  # of grad_out and out_a - out_b
    for start in range(0, D, BLOCK_D):
        column = (start + tl.arange(0, BLOCK_D))[None, :]
        mask = (column < D) & row_mask[:, None]
        at = row.to(tl.int64)[:, None] * D + column
        grad = tl.load(grad_out_ptr + at, mask=mask, other=0.0).to(tl.float32)
        a = tl.load(a_row + column, mask=mask & a_mask, other=0.0).to(tl.float32)
        b = tl.load(b_row + column, mask=mask & b_mask, other=0.0).to(tl.float32)
        product += grad * (a - b)
        grad_a, grad_b = weight_a[:, None] * grad, weight_b[:, None] * grad
        tl.store(grad_out_a_ptr + at, grad_a.to(grad_out_a_ptr.dtype.element_ty), mask=mask)
        tl.store(grad_out_b_ptr + at, grad_b.to(grad_out_b_ptr.dtype.element_ty), mask=mask)
    dot = tl.sum(product, 1)  # [ROWS]
    lse_index = (batch * H + head) * S + query
    grad_lse = tl.load(grad_lse_ptr + lse_index, mask=row_mask, other=0.0)
    tl.store(grad_lse_a_ptr + lse_index, weight_a * (grad_lse + weight_b * dot), mask=row_mask)
    tl.store(grad_lse_b_ptr + lse_index, weight_b * (grad_lse - weight_a * dot), mask=row_mask)


@triton.jit
def split_row(row, S, H):
    """Batch index, query and head of a row, in int64."""
    return (row // (S * H)).to(tl.int64), (row // H % S).to(tl.int64), (row % H).to(tl.int64)


@triton.jit
def load_states(
    out_a_ptr,
    out_a_strides,  # OutStrides
    lse_a_row,  # [ROWS] pointers
    out_b_ptr,
    out_b_strides,
    lse_b_row,
    batch,  # [ROWS], as query and head
    query,
    head,
    row_mask,  # [ROWS]
):
    """Pointers to the rows of a and b, masks of those with keys, their weights and the merged lse.

    Pointers and masks are [ROWS, 1], weights and lse [ROWS]. weight_a + weight_b is 1, or 0 in rows
    without keys.
    """
    lse_a = tl.load(lse_a_row, mask=row_mask, other=float("-inf"))
    lse_b = tl.load(lse_b_row, mask=row_mask, other=float("-inf"))
    row_max = tl.maximum(lse_a, lse_b)
    finite_max = tl.where(row_max == float("-inf"), 0.0, row_max)
    exp_a, exp_b = tl.exp(lse_a - finite_max), tl.exp(lse_b - finite_max)
    row_sum = exp_a + exp_b
    norm = tl.where(row_sum == 0.0, 1.0, row_sum)
    lse = tl.where(row_sum == 0.0, float("-inf"), finite_max + tl.log(norm))

    a, b = out_a_strides, out_b_strides
    a_index = batch * a.batch_stride + query * a.query_stride + head * a.head_stride
    b_index = batch * b.batch_stride + query * b.query_stride + head * b.head_stride
    a_row, b_row = out_a_ptr + a_index[:, None], out_b_ptr + b_index[:, None]
    a_mask, b_mask = (lse_a != float("-inf"))[:, None], (lse_b != float("-inf"))[:, None]
    return a_row, b_row, a_mask, b_mask, exp_a / norm, exp_b / norm, lse


@merge_states.op.register_autograd
class MergeStates(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out_a, lse_a, out_b, lse_b):
        ctx.save_for_backward(out_a, lse_a, out_b, lse_b)
        return merge_states.op.overload(out_a, lse_a, out_b, lse_b)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, grad_lse):
        grads = grad_out.contiguous(), grad_lse.contiguous()
        return merge_states_backward.op.overload(*grads, *ctx.saved_tensors)
