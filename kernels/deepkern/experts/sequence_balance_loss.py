"""The loss that balances the experts of each sequence.

    f[b, e] = E / (topk · S) · #{(t, j): topk_idx[b, t, j] = e}
    P[b, e] = 1 / S · Σ_t s[b, t, e] / Σ_i s[b, t, i]               s = score(logits)
    loss    = alpha / B · Σ_b Σ_e f[b, e] · P[b, e]

Parallelization: one program processes TOKENS tokens of a sequence, a few at a time with all experts
in registers, and writes its partial sums of s / Σ s and its counts. A second kernel reduces the
partials of each sequence in order, so the result is the same in every run. The backward pass
reduces counts alone, then reads the logits again and writes one row of gradients per token.

Limit: the arithmetic of the scores. 4 bytes are read per logit.

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
from .score import SCORES, TILE, pointwise_gradient, row_stats, scores

TOKENS = 32  # tokens per program of the partial sums


@op(logits="real [B, S, E]", topk_idx="int64|int32 [B, S, topk]")
def sequence_balance_loss(
    logits: Tensor, topk_idx: Tensor, score: str = "sigmoid", alpha: float = 1e-4
) -> Tensor:
    """The sequence-wise balance loss of DeepSeek-V3, mean over the sequences.

        loss = deepkern.sequence_balance_loss(logits, topk_idx, score="sigmoid", alpha=1e-4)

    Args:
        logits: bf16, fp16 or fp32 [B, S, E], the router's logits of B sequences.
        topk_idx: int64 or int32 [B, S, topk], the experts of each token, as `route_topk` chose
            them; indices outside [0, E) are ignored.
        score: "sigmoid", "softmax" or "sqrtsoftplus", as for `route_topk`.
        alpha: the weight of the loss.

    Returns:
        fp32, a scalar: alpha if the experts are evenly loaded, more if experts with many tokens
        have high scores. 0 without tokens.

    The gradient goes to `logits`, through the scores; the choice has no gradient.

    Raises:
        TypeError, ValueError: an argument violates the rules above.
    """
    check_choice("sequence_balance_loss", "score", score, SCORES)
    # Fake kernel: allocates the outputs; the launcher of a backend computes them.
    return logits.new_empty((), dtype=torch.float32)


@sequence_balance_loss.op.register_launcher("triton")
def _launch_triton(logits: Tensor, topk_idx: Tensor, score: str, alpha: float) -> Tensor:
    loss = sequence_balance_loss.op.allocate(logits, topk_idx, score, alpha)
    if logits.numel() == 0 or topk_idx.numel() == 0:
        return loss.zero_()
    losses = logits.new_empty(len(logits), dtype=torch.float32)  # of each sequence
    _reduce_sequences(logits, topk_idx, score, loss_factor(logits, topk_idx, alpha), losses, None)
    return loss.copy_(losses.sum())


def loss_factor(logits: Tensor, topk_idx: Tensor, alpha: float) -> float:
    """The factor of count[b, e] · Σ_t s / Σ s in the loss."""
    (B, S, E), topk = logits.shape, topk_idx.shape[2]
    return alpha * E / (B * topk * S * S)


def _reduce_sequences(
    logits: Tensor,
    topk_idx: Tensor,
    score: str,
    factor: float,
    losses: Tensor | None,
    counts: Tensor | None,
) -> None:
    """Writes the loss of each sequence to `losses` fp32 [B], or its counts to `counts` [B, E]."""
    (B, S, E), topk = logits.shape, topk_idx.shape[2]
    chunks, EXPERTS = cdiv(S, TOKENS), next_power_of_2(E)
    partial_counts = logits.new_empty((B, chunks, E), dtype=torch.int32)
    partial_sums = None
    if losses is not None:
        partial_sums = logits.new_empty((B, chunks, E), dtype=torch.float32)
    sequence_balance_loss_partial_kernel[(B * chunks,)](
        logits, topk_idx, partial_sums, partial_counts, S, E, topk, chunks,
        *logits.stride()[:2], *topk_idx.stride()[:2],
        SCORE=score, TOKENS=TOKENS, ROWS=min(TOKENS, max(1, TILE // EXPERTS)), EXPERTS=EXPERTS,
        SLOTS=next_power_of_2(topk),
    )  # fmt: skip
    sequence_balance_loss_reduce_kernel[(B,)](
        partial_sums, partial_counts, losses, counts, E, chunks, factor, EXPERTS=EXPERTS
    )


@triton.jit(do_not_specialize=["S", "chunks"])
def sequence_balance_loss_partial_kernel(
    logits_ptr,  # real [B, S, E]
    idx_ptr,  # int64 or int32 [B, S, topk]
    sums_ptr,  # fp32 [B, chunks, E], written: Σ of s / Σ s over the tokens of a chunk; or None
    counts_ptr,  # int32 [B, chunks, E], written: assignments of a chunk to each expert
    S,  # tokens per sequence
    E,  # experts
    topk,
    chunks,  # per sequence, of TOKENS tokens
    logits_stride_sequence,  # elements, as the strides below
    logits_stride_token,
    idx_stride_sequence,
    idx_stride_token,
    SCORE: tl.constexpr,
    TOKENS: tl.constexpr,  # tokens per program
    ROWS: tl.constexpr,  # tokens per step of the sums
    EXPERTS: tl.constexpr,  # E, rounded up to a power of two
    SLOTS: tl.constexpr,  # topk, rounded up to a power of two
):
    program = tl.program_id(0)
    sequence, first = (program // chunks).to(tl.int64), program % chunks * TOKENS
    expert = tl.arange(0, EXPERTS)
    out = program.to(tl.int64) * E + expert

    token, slot = first + tl.arange(0, TOKENS), tl.arange(0, SLOTS)
    slot_mask = (token < S)[:, None] & (slot < topk)[None, :]
    idx_row = idx_ptr + sequence * idx_stride_sequence
    idx_tile = idx_row + token.to(tl.int64)[:, None] * idx_stride_token + slot
    idx = tl.load(idx_tile, mask=slot_mask, other=-1)  # [TOKENS, SLOTS]
    idx = tl.where((idx >= 0) & (idx < E), idx, -1).to(tl.int32)
    idx = tl.reshape(idx, (TOKENS * SLOTS,))
    tl.store(counts_ptr + out, tl.histogram(idx, EXPERTS, mask=idx >= 0), mask=expert < E)

    if sums_ptr is not None:
        sums = tl.zeros((EXPERTS,), tl.float32)
        logits_sequence = logits_ptr + sequence * logits_stride_sequence
        for start in range(0, TOKENS, ROWS):
            row = first + start + tl.arange(0, ROWS)
            mask = (row < S)[:, None] & (expert < E)[None, :]
            x = load_rows(logits_sequence, logits_stride_token, row, expert, mask)
            row_max, row_sum = row_stats(x, SCORE)
            s = scores(x, row_max, row_sum, SCORE)  # [ROWS, EXPERTS]
            normalized = s / tl.sum(tl.where(mask, s, 0.0), 1, keep_dims=True)
            sums += tl.sum(tl.where(mask, normalized, 0.0), 0)
        tl.store(sums_ptr + out, sums, mask=expert < E)


@triton.jit(do_not_specialize=["chunks"])
def sequence_balance_loss_reduce_kernel(
    sums_ptr,  # fp32 [B, chunks, E], or None
    counts_ptr,  # int32 [B, chunks, E]
    loss_ptr,  # fp32 [B], written: the loss of each sequence; or None
    out_ptr,  # int32 [B, E], written if loss_ptr is None: the counts of each sequence
    E,  # experts
    chunks,
    factor,  # fp32, of count · sum in the loss
    EXPERTS: tl.constexpr,  # E, rounded up to a power of two
):
    sequence = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    sum, count = tl.zeros((EXPERTS,), tl.float32), tl.zeros((EXPERTS,), tl.int32)
    for chunk in range(0, chunks):
        offset = (sequence * chunks + chunk) * E + expert
        count += tl.load(counts_ptr + offset, mask=expert < E, other=0)
        if loss_ptr is not None:
            sum += tl.load(sums_ptr + offset, mask=expert < E, other=0.0)
    if loss_ptr is not None:
        tl.store(loss_ptr + sequence, tl.sum(sum * count.to(tl.float32), 0) * factor)
    else:
        tl.store(out_ptr + sequence * E + expert, count, mask=expert < E)


@triton.jit
def load_rows(logits_ptr, stride, row, expert, mask):
    """Logits [ROWS, EXPERTS] in fp32, -inf where masked."""
    tile = logits_ptr + row.to(tl.int64)[:, None] * stride + expert[None, :]
    return tl.load(tile, mask=mask, other=float("-inf")).to(tl.float32)


@op(grad="fp32 [1] strided", logits="real [B, S, E]", topk_idx="int64|int32 [B, S, topk]")
def sequence_balance_loss_backward(
    grad: Tensor, logits: Tensor, topk_idx: Tensor, score: str = "sigmoid", alpha: float = 1e-4
) -> Tensor:
    """The gradient of `sequence_balance_loss` with respect to its logits.

        grad_logits = deepkern.sequence_balance_loss_backward(grad, logits, topk_idx)

    Args:
        grad: fp32 [1], of the loss.
        logits, topk_idx, score, alpha: as in the forward pass.

    Returns:
        [B, S, E] in the dtype of `logits`.

    Raises:
        TypeError, ValueError: an argument violates the rules above.
    """
    check_choice("sequence_balance_loss_backward", "score", score, SCORES)
    # Fake kernel: allocates the outputs; the launcher of a backend computes them.
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
    _reduce_sequences(logits, topk_idx, score, 0.0, None, counts)
    EXPERTS = next_power_of_2(E)
    ROWS = max(1, TILE // EXPERTS)
    sequence_balance_loss_backward_kernel[(B * cdiv(S, ROWS),)](
        grad, logits, counts, grad_logits, S, E, loss_factor(logits, topk_idx, alpha),
        *logits.stride()[:2], SCORE=score, ROWS=ROWS, EXPERTS=EXPERTS,
    )  # fmt: skip
    return grad_logits


@triton.jit(do_not_specialize=["S"])
def sequence_balance_loss_backward_kernel(
    grad_ptr,  # fp32 [1], of the loss
    logits_ptr,  # real [B, S, E]
    counts_ptr,  # int32 [B, E], assignments of each sequence to each expert
    out_ptr,  # real [B, S, E], contiguous, written
    S,  # tokens per sequence
    E,  # experts
    factor,  # fp32, of count · Σ s / Σ s in the loss
    logits_stride_sequence,  # elements
    logits_stride_token,
    SCORE: tl.constexpr,
    ROWS: tl.constexpr,  # tokens per program
    EXPERTS: tl.constexpr,  # E, rounded up to a power of two
):
    blocks = tl.cdiv(S, ROWS)
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, EXPERTS)
    mask = (row < S)[:, None] & (expert < E)[None, :]
    logits_sequence = logits_ptr + sequence * logits_stride_sequence
    x = load_rows(logits_sequence, logits_stride_token, row, expert, mask)
    row_max, row_sum = row_stats(x, SCORE)
    s = scores(x, row_max, row_sum, SCORE)  # [ROWS, EXPERTS]
    count = tl.load(counts_ptr + sequence * E + expert, mask=expert < E, other=0)
    grad = tl.load(grad_ptr) * factor * count.to(tl.float32)[None, :]

    # Through s / Σ s, then through s. The sum of a softmax is constant, so only the second counts.
    if SCORE == "softmax":
        grad = s * (grad - tl.sum(tl.where(mask, grad * s, 0.0), 1, keep_dims=True))
    else:
        sum = tl.sum(tl.where(mask, s, 0.0), 1, keep_dims=True)
        mean = tl.sum(tl.where(mask, grad * s, 0.0), 1, keep_dims=True) / sum
        grad = pointwise_gradient((grad - mean) / sum, x, s, SCORE)
    out = out_ptr + (sequence * S + row)[:, None] * E + expert[None, :]
    tl.store(out, grad.to(out_ptr.dtype.element_ty), mask=mask)


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
