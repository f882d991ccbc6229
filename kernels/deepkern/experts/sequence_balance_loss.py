"""The loss that keeps the experts of each sequence balanced.

    f[b, e] = E / (topk · S) · #{(t, j): topk_idx[b, t, j] = e}
    P[b, e] = 1 / S · Σ_t s[b, t, e] / Σ_i s[b, t, i]               s = score(logits)
    loss    = alpha / B · Σ_b Σ_e f[b, e] · P[b, e]

Cut: a program takes TOKENS tokens of a sequence, a few at a time with all experts in registers, and
writes its sums of s / Σ s and its counts; another kernel adds them up for each sequence, in order,
so that the result is always the same. The backward pass adds up counts alone, then goes through the
tokens again: one row of gradients for one of logits. What is read is 4 bytes a logit, the time goes
into the scores.

Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 2.1.2, equations 17 to 20.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv, next_power_of_2
from ..runtime.contract import check_choice
from ..runtime.op import op
from .route_topk import SCORES, TILE
from .score import scores, sigmoid, softmax_sums

TOKENS = 32  # that one program adds up


@op(logits="real [B, S, E]", topk_idx="int64|int32 [B, S, topk]")
def sequence_balance_loss(
    logits: Tensor, topk_idx: Tensor, score: str = "sigmoid", alpha: float = 1e-4
) -> Tensor:
    """The sequence-wise balance loss of DeepSeek-V3, mean over the sequences.

    Args:
        logits: bf16, fp16 or fp32 [B, S, E], the router's, of B sequences.
        topk_idx: int64 or int32 [B, S, topk], the experts that each token goes to, as `route_topk`
            chose them; whatever is not in [0, E) is no expert.
        score: "sigmoid", "softmax" or "sqrtsoftplus", as for `route_topk`.
        alpha: the weight of the loss.

    Returns:
        fp32, a scalar: alpha if the experts are evenly loaded, more if those with many tokens are
        those with high scores. 0 if there are no tokens.

    The gradient goes to `logits`, through the scores; the choice has none.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    check_choice("sequence_balance_loss", "score", score, SCORES)
    return logits.new_empty((), dtype=torch.float32)


@sequence_balance_loss.op.register_launcher("triton")
def _launch_triton(logits: Tensor, topk_idx: Tensor, score: str, alpha: float) -> Tensor:
    loss = sequence_balance_loss.op.allocate(logits, topk_idx, score, alpha)
    if logits.numel() == 0 or topk_idx.numel() == 0:
        return loss.zero_()
    of_sequence = logits.new_empty(len(logits), dtype=torch.float32)
    sum_up(logits, topk_idx, score, factor(logits, topk_idx, alpha), of_sequence, None)
    return loss.copy_(of_sequence.sum())


def factor(logits: Tensor, topk_idx: Tensor, alpha: float) -> float:
    """What a count times a sum of s / Σ s counts for in the loss."""
    (B, S, E), topk = logits.shape, topk_idx.shape[2]
    return alpha * E / (B * topk * S * S)


def sum_up(
    logits: Tensor, topk_idx: Tensor, score: str, weight: float, loss: Tensor | None,
    counts: Tensor | None,
) -> None:  # fmt: skip
    """Writes the loss of each sequence, fp32 [B], or how often each expert is chosen, [B, E]."""
    (B, S, E), topk = logits.shape, topk_idx.shape[2]
    chunks, EXPERTS = cdiv(S, TOKENS), next_power_of_2(E)
    some_counts = logits.new_empty((B, chunks, E), dtype=torch.int32)
    some_sums = None if loss is None else logits.new_empty((B, chunks, E), dtype=torch.float32)
    part_kernel[(B * chunks,)](
        logits, topk_idx, some_sums, some_counts, S, E, topk, chunks,
        *logits.stride()[:2], *topk_idx.stride()[:2],
        SCORE=score, TOKENS=TOKENS, ROWS=min(TOKENS, max(1, TILE // EXPERTS)), EXPERTS=EXPERTS,
        SLOTS=next_power_of_2(topk),
    )  # fmt: skip
    sum_kernel[(B,)](some_sums, some_counts, loss, counts, E, chunks, weight, EXPERTS=EXPERTS)


@triton.jit(do_not_specialize=["S", "chunks"])
def part_kernel(
    logits_ptr, idx_ptr, sums_ptr, counts_ptr, S, E, topk, chunks,
    logits_sequence, logits_row, idx_sequence, idx_row,
    SCORE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    sequence, first = (part // chunks).to(tl.int64), part % chunks * TOKENS
    expert = tl.arange(0, EXPERTS)
    out = part.to(tl.int64) * E + expert

    token, slot = first + tl.arange(0, TOKENS), tl.arange(0, SLOTS)
    chosen = (token < S)[:, None] & (slot < topk)[None, :]
    idx_tile = idx_ptr + sequence * idx_sequence + token.to(tl.int64)[:, None] * idx_row + slot
    idx = tl.load(idx_tile, mask=chosen, other=-1)  # [TOKENS, SLOTS]
    idx = tl.where((idx >= 0) & (idx < E), idx, -1).to(tl.int32)
    idx = tl.reshape(idx, (TOKENS * SLOTS,))
    tl.store(counts_ptr + out, tl.histogram(idx, EXPERTS, mask=idx >= 0), mask=expert < E)

    if sums_ptr is not None:
        sums = tl.zeros((EXPERTS,), tl.float32)
        for start in range(0, TOKENS, ROWS):
            row = first + start + tl.arange(0, ROWS)
            inside = (row < S)[:, None] & (expert < E)[None, :]
            x = load_rows(logits_ptr + sequence * logits_sequence, logits_row, row, expert, inside)
            s = score_of(x, SCORE)  # [ROWS, EXPERTS]
            share = s / tl.sum(tl.where(inside, s, 0.0), 1, keep_dims=True)
            sums += tl.sum(tl.where(inside, share, 0.0), 0)
        tl.store(sums_ptr + out, sums, mask=expert < E)


@triton.jit(do_not_specialize=["chunks"])
def sum_kernel(sums_ptr, counts_ptr, loss_ptr, out_ptr, E, chunks, weight, EXPERTS: tl.constexpr):
    sequence = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    sum, count = tl.zeros((EXPERTS,), tl.float32), tl.zeros((EXPERTS,), tl.int32)
    for chunk in range(0, chunks):
        at = (sequence * chunks + chunk) * E + expert
        count += tl.load(counts_ptr + at, mask=expert < E, other=0)
        if loss_ptr is not None:
            sum += tl.load(sums_ptr + at, mask=expert < E, other=0.0)
    if loss_ptr is not None:
        tl.store(loss_ptr + sequence, tl.sum(sum * count.to(tl.float32), 0) * weight)
    else:
        tl.store(out_ptr + sequence * E + expert, count, mask=expert < E)


@triton.jit
def load_rows(logits_ptr, logits_row, row, expert, inside):
    tile = logits_ptr + row.to(tl.int64)[:, None] * logits_row + expert[None, :]
    return tl.load(tile, mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit
def score_of(x, SCORE: tl.constexpr):
    largest, total = 0.0, 0.0
    if SCORE == "softmax":
        largest, total = softmax_sums(x)
    return scores(x, largest, total, SCORE)


@op(grad="fp32 [1] strided", logits="real [B, S, E]", topk_idx="int64|int32 [B, S, topk]")
def sequence_balance_loss_backward(
    grad: Tensor, logits: Tensor, topk_idx: Tensor, score: str = "sigmoid", alpha: float = 1e-4
) -> Tensor:
    """The gradient of `sequence_balance_loss` with respect to its logits, in their dtype.

    Args:
        grad: fp32 [1], of the loss.
        logits, topk_idx, score, alpha: as in the forward pass.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    check_choice("sequence_balance_loss_backward", "score", score, SCORES)
    return logits.new_empty(logits.shape)


@sequence_balance_loss_backward.op.register_launcher("triton")
def _launch_backward_triton(
    grad: Tensor, logits: Tensor, topk_idx: Tensor, score: str, alpha: float
) -> Tensor:
    grad_logits = sequence_balance_loss_backward.op.allocate(grad, logits, topk_idx, score, alpha)
    if logits.numel() == 0 or topk_idx.numel() == 0:
        return grad_logits.zero_()
    B, S, E = logits.shape
    counts = logits.new_empty((B, E), dtype=torch.int32)
    sum_up(logits, topk_idx, score, 0.0, None, counts)
    EXPERTS = next_power_of_2(E)
    ROWS = max(1, TILE // EXPERTS)
    sequence_balance_loss_backward_kernel[(B * cdiv(S, ROWS),)](
        grad, logits, counts, grad_logits, S, E, factor(logits, topk_idx, alpha),
        *logits.stride()[:2], SCORE=score, ROWS=ROWS, EXPERTS=EXPERTS,
    )  # fmt: skip
    return grad_logits


@triton.jit(do_not_specialize=["S"])
def sequence_balance_loss_backward_kernel(
    grad_ptr, logits_ptr, counts_ptr, out_ptr, S, E, weight, logits_sequence, logits_row,
    SCORE: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(S, ROWS)
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, EXPERTS)
    inside = (row < S)[:, None] & (expert < E)[None, :]
    x = load_rows(logits_ptr + sequence * logits_sequence, logits_row, row, expert, inside)
    s = score_of(x, SCORE)  # [ROWS, EXPERTS]
    count = tl.load(counts_ptr + sequence * E + expert, mask=expert < E, other=0)
    grad = tl.load(grad_ptr) * weight * count.to(tl.float32)[None, :]

    # Of s / Σ s, then of s. Softmax's sum is 1 whatever its logits are: it has no part in this.
    if SCORE == "softmax":
        grad = s * (grad - tl.sum(tl.where(inside, grad * s, 0.0), 1, keep_dims=True))
    else:
        total = tl.sum(tl.where(inside, s, 0.0), 1, keep_dims=True)
        mean = tl.sum(tl.where(inside, grad * s, 0.0), 1, keep_dims=True) / total
        grad = (grad - mean) / total
        if SCORE == "sigmoid":
            grad *= s * sigmoid(-x)
        else:
            grad = tl.where(s > 0.0, grad * sigmoid(x) / (2.0 * s), 0.0)
    out = out_ptr + (sequence * S + row)[:, None] * E + expert[None, :]
    tl.store(out, grad.to(out_ptr.dtype.element_ty), mask=inside)


@sequence_balance_loss.op.register_autograd
class SequenceBalanceLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, topk_idx, score, alpha):
        ctx.save_for_backward(logits, topk_idx)
        ctx.rule = score, alpha
        return sequence_balance_loss.op.overload(logits, topk_idx, score, alpha)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grad_logits = sequence_balance_loss_backward.op.overload(
            grad.view(1), *ctx.saved_tensors, *ctx.rule
        )
        return grad_logits, None, None, None
