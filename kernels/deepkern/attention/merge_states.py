"""Two attentions of the same queries, over keys of which no key is in both, as one over all keys.

    lse = log(exp(lse_a) + exp(lse_b))
    out = exp(lse_a - lse) * out_a + exp(lse_b - lse) * out_b

so a prompt may be attended to in chunks, and a context that lies on several GPUs where it lies.

Cut: a program takes ROWS rows, a row being one head of one query, whose D values it goes through
BLOCK_D at a time. Every value is read once and written once: the speed is that of memory.

Going back, with w = exp(lse_a - lse) and grad the gradient of out:

    grad_out_a = w * grad        grad_lse_a = w * (grad_lse + (1 - w) * <grad, out_a - out_b>)

and the other way round for b. The sum over D has a fixed order.

Source: FlashAttention (arXiv 2205.14135), section 3.1: softmax of a concatenation from its parts.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

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

    Args:
        out_a, out_b: bf16, fp16 or fp32 [..., S, H, D], the results: [B, Sq, H, R] of `mla_decode`,
            [T, H, D] of `mla_prefill`. Any strides but a contiguous last dimension.
        lse_a, lse_b: fp32 [..., H, S], their logarithms of the sum of exponentials, heads before
            queries: [B, H, Sq] and [H, T] of the same ops. Any strides. Where one is -inf its
            query saw no key, and `out` there is not read. (FlashMLA has +inf for that; here
            +inf, like NaN, makes the whole row NaN, and its lse.)

    Returns:
        out: [..., S, H, D] in the dtype of `out_a`, contiguous; computed in fp32, rounded once.
            Exactly the other result where one lse is -inf, and 0 where both are.
        lse: fp32 [..., H, S], natural log; -inf where both are.

    The gradient goes to all four. Merging is associative up to rounding: more parts by turns.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    check_rows("merge_states", lse_a)
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


def check_rows(op: str, lse: Tensor) -> None:
    """Raises ValueError unless rows can be numbered in 32 bits, up to the end of the last tile."""
    check_that(op, "lse_a", lse.numel() <= 2**31 - TILE,
               "at most 2**31 - 2048 queries times heads", f"shape {tuple(lse.shape)}")  # fmt: skip


def flat(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """[B, S, H, D] and [B, H, S]: views, unless the leading dimensions cannot be merged."""
    B = math.prod(out.shape[:-3])
    return out.reshape(B, *out.shape[-3:]), lse.reshape(B, *lse.shape[-2:])


@merge_states.op.register_launcher("triton")
def _launch_triton(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    out, lse = merge_states.op.allocate(out_a, lse_a, out_b, lse_b)
    if lse.numel() == 0:
        return out, lse
    S, H, D = out.shape[-3:]
    (out_a, lse_a), (out_b, lse_b) = flat(out_a, lse_a), flat(out_b, lse_b)
    ROWS, BLOCK_D = choose_tile(D)
    merge_states_kernel[(cdiv(lse.numel(), ROWS),)](
        out_a, lse_a, out_b, lse_b, out, lse, lse.numel(), S, H, D,
        *out_a.stride()[:3], *lse_a.stride(), *out_b.stride()[:3], *lse_b.stride(),
        ROWS=ROWS, BLOCK_D=BLOCK_D, num_warps=4,
    )  # fmt: skip
    return out, lse


def choose_tile(D: int) -> tuple[int, int]:
    """ROWS and BLOCK_D, by D alone."""
    BLOCK_D = min(max(next_power_of_2(D), 16), 512)
    return TILE // BLOCK_D, BLOCK_D


@triton.jit
def shares(a, b):
    """The shares of two sums of exponentials, given by their logs, and the log of the whole."""
    top = tl.maximum(a, b)
    zero = tl.where(top == float("-inf"), 0.0, top)  # no keys at all: both shares are 0
    of_a, of_b = tl.exp(a - zero), tl.exp(b - zero)
    total = of_a + of_b
    whole = tl.where(total == 0.0, 1.0, total)
    lse = tl.where(total == 0.0, float("-inf"), zero + tl.log(whole))
    return of_a / whole, of_b / whole, lse


@triton.jit
def place(row, S, H):
    """Sequence, query and head of a row, in int64."""
    return (row // (S * H)).to(tl.int64), (row // H % S).to(tl.int64), (row % H).to(tl.int64)


# What follows from the number of queries compiles nothing anew.
VARYING = ["rows", "S", *(f"lse_{x}_{of}" for x in "ab" for of in ("batch", "head", "query"))]


@triton.jit(do_not_specialize=VARYING)
def merge_states_kernel(
    out_a_ptr, lse_a_ptr, out_b_ptr, lse_b_ptr, out_ptr, lse_ptr, rows, S, H, D,
    out_a_batch, out_a_query, out_a_head, lse_a_batch, lse_a_head, lse_a_query,
    out_b_batch, out_b_query, out_b_head, lse_b_batch, lse_b_head, lse_b_query,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    known = row < rows
    batch, query, head = place(row, S, H)  # [ROWS]
    at_a = batch * lse_a_batch + head * lse_a_head + query * lse_a_query
    at_b = batch * lse_b_batch + head * lse_b_head + query * lse_b_query
    lse_a = tl.load(lse_a_ptr + at_a, mask=known, other=float("-inf"))
    lse_b = tl.load(lse_b_ptr + at_b, mask=known, other=float("-inf"))
    share_a, share_b, lse = shares(lse_a, lse_b)
    tl.store(lse_ptr + (batch * H + head) * S + query, lse, mask=known)

    row_a = out_a_ptr + (batch * out_a_batch + query * out_a_query + head * out_a_head)[:, None]
    row_b = out_b_ptr + (batch * out_b_batch + query * out_b_query + head * out_b_head)[:, None]
    used_a, used_b = (lse_a != float("-inf"))[:, None], (lse_b != float("-inf"))[:, None]
    for start in range(0, D, BLOCK_D):
        column = (start + tl.arange(0, BLOCK_D))[None, :]
        inside = column < D
        a = tl.load(row_a + column, mask=inside & used_a, other=0.0).to(tl.float32)
        b = tl.load(row_b + column, mask=inside & used_b, other=0.0).to(tl.float32)
        out = share_a[:, None] * a + share_b[:, None] * b  # [ROWS, BLOCK_D]
        out_tile = out_ptr + row.to(tl.int64)[:, None] * D + column
        tl.store(out_tile, out.to(out_ptr.dtype.element_ty), mask=inside & known[:, None])


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

    Args:
        grad_out, grad_lse: of the two results; contiguous.
        out_a, lse_a, out_b, lse_b: as in the forward pass.

    Returns:
        grad_out_a, grad_lse_a, grad_out_b, grad_lse_b: 0 where the lse is -inf.
    """
    check_rows("merge_states_backward", lse_a)
    return tuple(x.new_empty(x.shape) for x in (out_a, lse_a, out_b, lse_b))


@merge_states_backward.op.register_launcher("triton")
def _launch_backward_triton(
    grad_out: Tensor, grad_lse: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = merge_states_backward.op.allocate(grad_out, grad_lse, out_a, lse_a, out_b, lse_b)
    if lse_a.numel() == 0:
        return grads
    S, H, D = out_a.shape[-3:]
    (out_a, lse_a), (out_b, lse_b) = flat(out_a, lse_a), flat(out_b, lse_b)
    ROWS, BLOCK_D = choose_tile(D)
    merge_states_backward_kernel[(cdiv(lse_a.numel(), ROWS),)](
        grad_out, grad_lse, out_a, lse_a, out_b, lse_b, *grads, lse_a.numel(), S, H, D,
        *out_a.stride()[:3], *lse_a.stride(), *out_b.stride()[:3], *lse_b.stride(),
        ROWS=ROWS, BLOCK_D=BLOCK_D, num_warps=4,
    )  # fmt: skip
    return grads


@triton.jit(do_not_specialize=VARYING)
def merge_states_backward_kernel(
    grad_out_ptr, grad_lse_ptr, out_a_ptr, lse_a_ptr, out_b_ptr, lse_b_ptr,
    grad_out_a_ptr, grad_lse_a_ptr, grad_out_b_ptr, grad_lse_b_ptr, rows, S, H, D,
    out_a_batch, out_a_query, out_a_head, lse_a_batch, lse_a_head, lse_a_query,
    out_b_batch, out_b_query, out_b_head, lse_b_batch, lse_b_head, lse_b_query,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    known = row < rows
    batch, query, head = place(row, S, H)  # [ROWS]
    at_a = batch * lse_a_batch + head * lse_a_head + query * lse_a_query
    at_b = batch * lse_b_batch + head * lse_b_head + query * lse_b_query
    lse_a = tl.load(lse_a_ptr + at_a, mask=known, other=float("-inf"))
    lse_b = tl.load(lse_b_ptr + at_b, mask=known, other=float("-inf"))
    share_a, share_b, _ = shares(lse_a, lse_b)

    row_a = out_a_ptr + (batch * out_a_batch + query * out_a_query + head * out_a_head)[:, None]
    row_b = out_b_ptr + (batch * out_b_batch + query * out_b_query + head * out_b_head)[:, None]
    used_a, used_b = (lse_a != float("-inf"))[:, None], (lse_b != float("-inf"))[:, None]
    product = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        column = (start + tl.arange(0, BLOCK_D))[None, :]
        inside = (column < D) & known[:, None]
        at = row.to(tl.int64)[:, None] * D + column
        grad = tl.load(grad_out_ptr + at, mask=inside, other=0.0).to(tl.float32)
        a = tl.load(row_a + column, mask=inside & used_a, other=0.0).to(tl.float32)
        b = tl.load(row_b + column, mask=inside & used_b, other=0.0).to(tl.float32)
        product += grad * (a - b)
        grad_a, grad_b = share_a[:, None] * grad, share_b[:, None] * grad
        tl.store(grad_out_a_ptr + at, grad_a.to(grad_out_a_ptr.dtype.element_ty), mask=inside)
        tl.store(grad_out_b_ptr + at, grad_b.to(grad_out_b_ptr.dtype.element_ty), mask=inside)
    dot = tl.sum(product, 1)  # [ROWS], of grad and out_a - out_b
    at_lse = (batch * H + head) * S + query
    grad_lse = tl.load(grad_lse_ptr + at_lse, mask=known, other=0.0)
    tl.store(grad_lse_a_ptr + at_lse, share_a * (grad_lse + share_b * dot), mask=known)
    tl.store(grad_lse_b_ptr + at_lse, share_b * (grad_lse - share_a * dot), mask=known)


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
