"""Routing: chooses each token's experts, and their weights.

    s[t, e] = sigmoid(logits[t, e]), or softmax over e, or sqrt(softplus(logits[t, e]))
    idx[t]  = the topk experts with the largest s + bias, among the topk_groups best groups
    weights[t, j] = scale · s[t, idx[t, j]] / Σ_i s[t, idx[t, i]]        (or without the quotient)

Parallelization: one program processes ROWS tokens, each with all experts in registers. The biased
score and the index of an expert are packed into one int64 key. Keys are distinct, a larger key is
better, equal scores go to the lower index, and a maximum needs no tie-break. topk maxima are taken
one after the other (fewer steps than a sort for E = 256 and topk = 8).

Limit: the arithmetic of scores and maxima. 4 bytes are read per logit.

`score.py` computes the scores, with the same bits on every machine.

Source: DeepSeek-V2 (arXiv 2405.04434), section 2.2.2; DeepSeek-V3 (arXiv 2412.19437), section
2.1.2, and the released inference code, which adds 1e-20 to the sum of the weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv, next_power_of_2, sum_pairwise
from ..runtime.contract import check_choice, check_that
from ..runtime.op import op
from .score import SCORES, TILE, pointwise_gradient, row_stats, scores

# The routing of the DeepSeek models: `route_topk(logits, bias, **ROUTING["deepseek-v3"])`.
ROUTING = {
    "deepseek-v2": {
        "score": "softmax", "topk": 6, "num_groups": 8, "topk_groups": 3, "group_score": "max",
        "normalize": False, "scale": 16.0,
    },
    "deepseek-v2-lite": {"score": "softmax", "topk": 6, "normalize": False},
    "deepseek-v3": {"topk": 8, "num_groups": 8, "topk_groups": 4, "scale": 2.5},  # and R1
    "deepseek-v4": {"score": "sqrtsoftplus", "topk": 6, "scale": 1.5},
}  # fmt: skip


@op(logits="real [T, E]", bias="real [E]")
def route_topk(
    logits: Tensor,
    bias: Tensor | None = None,
    topk: int = 8,
    num_groups: int = 1,
    topk_groups: int = 1,
    score: str = "sigmoid",
    group_score: str = "top2",
    normalize: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Chooses `topk` experts for each token from the router's logits.

        weights, idx = deepkern.route_topk(logits, bias, **deepkern.ROUTING["deepseek-v3"])

    Args:
        logits: bf16, fp16 or fp32 [T, E]; rows may be strided. Scores are computed in fp32.
        bias: real [E], added to the scores for the choice, not for the weights.
        topk: experts per token, at most the experts of `topk_groups` groups.
        num_groups: groups of E / num_groups consecutive experts; divides E.
        topk_groups: groups, the best ones, from which a token's experts are chosen.
        score: "sigmoid", "softmax" or "sqrtsoftplus".
        group_score: the rank of a group: "top2", the sum of its two best biased scores (of one
            score in groups of one expert), or "max", its best biased score.
        normalize: divide a token's weights by their sum (+ 1e-20).
        scale: multiplies the weights.

    Returns:
        weights: fp32 [T, topk].
        idx: int64 [T, topk], distinct, in descending order of the biased score. Equal scores are
            in ascending order of the index, and so are equal groups.

    `deepkern.ROUTING` has the arguments of the DeepSeek models by name.

    A NaN biased score ranks as -inf, and the token's weights are NaN. DEEPKERN_DEBUG=1 raises.
    The gradient goes through the weights; the choice and `bias` have no gradient.

    Raises:
        TypeError, ValueError: an argument violates the rules above.
    """
    E, name = logits.shape[1], "route_topk"
    check_choice(name, "score", score, SCORES)
    check_choice(name, "group_score", group_score, ("top2", "max"))
    divides = num_groups >= 1 and E % num_groups == 0
    check_that(name, "num_groups", divides, f"a divisor of E = {E}", num_groups)
    expected = f"1 to num_groups = {num_groups}"
    check_that(name, "topk_groups", 1 <= topk_groups <= num_groups, expected, topk_groups)
    available = topk_groups * (E // num_groups)
    expected = f"1 to {available}, the experts in {topk_groups} of {num_groups} groups"
    check_that(name, "topk", 1 <= topk <= available, expected, topk)
    shape = (logits.shape[0], topk)
    # Fake kernel: allocates the outputs; the launcher of a backend computes them.
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int64)


@route_topk.op.register_launcher("triton")
def _launch_triton(
    logits: Tensor,
    bias: Tensor | None,
    topk: int,
    num_groups: int,
    topk_groups: int,
    score: str,
    group_score: str,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    weights, idx = route_topk.op.allocate(
        logits, bias, topk, num_groups, topk_groups, score, group_score, normalize, scale
    )
    T, E = logits.shape
    if T == 0:
        return weights, idx
    if topk_groups == num_groups:  # no group is dropped
        num_groups = topk_groups = 1
    GROUPS, SIZE = next_power_of_2(num_groups), next_power_of_2(E // num_groups)
    ROWS = max(1, TILE // (GROUPS * SIZE))
    route_topk_kernel[(cdiv(T, ROWS),)](
        logits, bias, weights, idx, T, E, logits.stride(0), scale, topk_groups, topk,
        SCORE=score, TOP2=group_score == "top2" and num_groups < E, NORMALIZE=normalize,
        NUM_GROUPS=num_groups, GROUPS=GROUPS, SIZE=SIZE, SLOT_LEVELS=(topk - 1).bit_length(),
        ROWS=ROWS, num_warps=num_warps(ROWS * GROUPS * SIZE), enable_fp_fusion=False,
    )  # fmt: skip
    return weights, idx


def num_warps(logits: int) -> int:
    """Warps of a program with this many logits: 8 to 32 logits per thread."""
    return min(16, max(4, logits // 1024))


@route_topk.op.register_debug_check
def check_contents(logits: Tensor, bias: Tensor | None, *_) -> None:
    """For DEEPKERN_DEBUG=1: no logit and no bias is NaN."""
    rows = logits.isnan().any(1).nonzero().flatten().tolist()
    got = f"NaN in {len(rows)} rows, first in row {rows[0] if rows else None}"
    check_that("route_topk", "logits", not rows, "numbers", got)
    if bias is not None:
        experts = bias.isnan().nonzero().flatten().tolist()
        check_that("route_topk", "bias", not experts, "numbers", f"NaN for experts {experts[:8]}")


@triton.jit(do_not_specialize=["T"])
def route_topk_kernel(
    logits_ptr,  # real [T, E]
    bias_ptr,  # real [E], or None
    weights_ptr,  # fp32 [T, topk], written
    idx_ptr,  # int64 [T, topk], written
    T,  # tokens
    E,  # experts
    logits_stride,  # elements between rows of logits
    scale,  # fp32, multiplies the weights
    topk_groups,
    topk,
    SCORE: tl.constexpr,
    TOP2: tl.constexpr,  # rank groups by their two best scores, otherwise by the best
    NORMALIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUPS: tl.constexpr,  # NUM_GROUPS, rounded up to a power of two
    SIZE: tl.constexpr,  # experts per group, rounded up to a power of two
    SLOT_LEVELS: tl.constexpr,  # ceil(log2(topk))
    ROWS: tl.constexpr,  # tokens per program
):
    SLOTS: tl.constexpr = 1 << SLOT_LEVELS
    LOWEST: tl.constexpr = -0x7FFFFFFFFFFFFFFF  # less than every score's key
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    logits_tile = logits_ptr + row[:, None] * logits_stride
    # A group has SIZE columns, of which the first E / NUM_GROUPS are experts.
    column = tl.arange(0, GROUPS * SIZE)
    size = E // NUM_GROUPS
    expert = column // SIZE * size + column % SIZE
    is_expert = (column % SIZE < size) & (column // SIZE < NUM_GROUPS)
    mask = (row < T)[:, None] & is_expert[None, :]

    x = tl.load(logits_tile + expert[None, :], mask=mask, other=float("-inf")).to(tl.float32)
    row_max, row_sum = row_stats(x, SCORE)  # [ROWS, 1]
    biased = scores(x, row_max, row_sum, SCORE)  # [ROWS, GROUPS * SIZE]
    if bias_ptr is not None:
        biased += tl.load(bias_ptr + expert, mask=is_expert, other=0.0).to(tl.float32)[None, :]
    has_nan = tl.max(((biased != biased) & mask).to(tl.int32), 1, keep_dims=True) != 0
    key = tl.where(is_expert[None, :], pack(biased, expert[None, :]), LOWEST)

    if NUM_GROUPS > 1:
        key = tl.reshape(key, (ROWS, GROUPS, SIZE))
        best = tl.max(key, 2)  # [ROWS, GROUPS]
        group_score = unpack_score(best)
        if TOP2:
            others = tl.where(key == best[:, :, None], LOWEST, key)
            group_score += unpack_score(tl.max(others, 2))
        group = tl.arange(0, GROUPS)[None, :]
        group_key = tl.where(group < NUM_GROUPS, pack(group_score, group), LOWEST)
        is_kept = tl.zeros((ROWS, GROUPS), tl.int1)
        for _ in range(topk_groups):
            is_best = group_key == tl.max(group_key, 1, keep_dims=True)
            is_kept |= is_best
            group_key = tl.where(is_best, LOWEST, group_key)
        key = tl.where(is_kept[:, :, None], key, LOWEST)
        key = tl.reshape(key, (ROWS, GROUPS * SIZE))

    slot = tl.arange(0, SLOTS)[None, :]
    chosen = tl.zeros((ROWS, SLOTS), tl.int32)
    for j in range(topk):
        largest = tl.max(key, 1, keep_dims=True)
        chosen = tl.where(slot == j, unpack_index(largest), chosen)
        key = tl.where(key == largest, LOWEST, key)

    # Recompute the chosen scores without the bias: cheaper than to select them from the tile.
    mask = (row < T)[:, None] & (slot < topk)
    x = tl.load(logits_tile + chosen, mask=mask, other=0.0).to(tl.float32)
    weight = scores(x, row_max, row_sum, SCORE)  # [ROWS, SLOTS]
    if NORMALIZE:
        sum = sum_pairwise(tl.where(slot < topk, weight, 0.0))  # [ROWS]
        weight = tl.div_rn(weight, (sum + 1e-20)[:, None])
    weight = tl.where(has_nan, float("nan"), weight * scale)
    out = row[:, None] * topk + slot
    tl.store(weights_ptr + out, weight, mask=mask)
    tl.store(idx_ptr + out, chosen.to(tl.int64), mask=mask)


@triton.jit
def pack(score, index):
    """int64 keys in the order of the scores, NaN as -inf, and the lower index first."""
    score = tl.where(score == score, score, float("-inf"))  # never -0, as scores are not
    bits = flip_negative(score.to(tl.int32, bitcast=True))
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - index)


@triton.jit
def unpack_score(key):
    return flip_negative((key >> 32).to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def unpack_index(key):
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def flip_negative(bits):
    """Maps the bits of floats to int32 in the same order; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@op(grad_weights="real [T, topk]", logits="real [T, E]", idx="int64 [T, topk]")
def route_topk_backward(
    grad_weights: Tensor,
    logits: Tensor,
    idx: Tensor,
    score: str = "sigmoid",
    normalize: bool = True,
    scale: float = 1.0,
) -> Tensor:
    """The gradient of `route_topk`'s weights with respect to its logits.

        grad_logits = deepkern.route_topk_backward(grad_weights, logits, idx, "sigmoid", True, 2.5)

    Args:
        grad_weights: real [T, topk].
        logits, score, normalize, scale: as in the forward pass.
        idx: int64 [T, topk] from the forward pass; indices outside [0, E) are ignored.

    Returns:
        [T, E] in the dtype of `logits`.

    Raises:
        TypeError, ValueError: an argument violates the rules above.
    """
    check_choice("route_topk_backward", "score", score, SCORES)
    # Fake kernel: allocates the outputs; the launcher of a backend computes them.
    return logits.new_empty(logits.shape)


@route_topk_backward.op.register_launcher("triton")
def _launch_backward_triton(
    grad_weights: Tensor, logits: Tensor, idx: Tensor, score: str, normalize: bool, scale: float
) -> Tensor:
    grad_logits = route_topk_backward.op.allocate(
        grad_weights, logits, idx, score, normalize, scale
    )
    T, E = logits.shape
    if grad_logits.numel() == 0:
        return grad_logits
    EXPERTS = next_power_of_2(E)
    ROWS = max(1, TILE // EXPERTS)
    route_topk_backward_kernel[(cdiv(T, ROWS),)](
        grad_weights, logits, idx, grad_logits, T, E, idx.shape[1],
        grad_weights.stride(0), logits.stride(0), idx.stride(0), scale,
        SCORE=score, NORMALIZE=normalize, EXPERTS=EXPERTS, ROWS=ROWS,
        num_warps=num_warps(ROWS * EXPERTS),
    )  # fmt: skip
    return grad_logits


@triton.jit(do_not_specialize=["T"])
def route_topk_backward_kernel(
    grad_weights_ptr,  # real [T, topk]
    logits_ptr,  # real [T, E]
    idx_ptr,  # int64 [T, topk]
    grad_logits_ptr,  # real [T, E], contiguous, written
    T,  # tokens
    E,  # experts
    topk,
    grad_stride,  # elements between rows of grad_weights, as the strides below
    logits_stride,
    idx_stride,
    scale,  # fp32, multiplied the weights
    SCORE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EXPERTS: tl.constexpr,  # E, rounded up to a power of two
    ROWS: tl.constexpr,  # tokens per program
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    row_mask = row < T
    expert = tl.arange(0, EXPERTS)[None, :]
    mask = row_mask[:, None] & (expert < E)
    x_tile = logits_ptr + row[:, None] * logits_stride + expert
    x = tl.load(x_tile, mask=mask, other=float("-inf")).to(tl.float32)  # [ROWS, EXPERTS]

    # The gradient of each expert's weight, and the number of slots that chose it.
    grad = tl.zeros((ROWS, EXPERTS), tl.float32)
    count = tl.zeros((ROWS, EXPERTS), tl.float32)
    for j in range(topk):
        chosen = tl.load(idx_ptr + row * idx_stride + j, mask=row_mask, other=-1)  # [ROWS]
        grad_j = tl.load(grad_weights_ptr + row * grad_stride + j, mask=row_mask, other=0.0)
        is_chosen = mask & (chosen[:, None] == expert)
        grad += tl.where(is_chosen, grad_j.to(tl.float32)[:, None], 0.0)
        count += is_chosen.to(tl.float32)
    grad *= scale

    row_max, row_sum = row_stats(x, SCORE)
    s = scores(x, row_max, row_sum, SCORE)
    if NORMALIZE:  # w = scale · c / (Σ c + 1e-20) for the chosen scores c
        sum = tl.sum(tl.where(count > 0, count * s, 0.0), 1, keep_dims=True) + 1e-20
        mean = tl.sum(tl.where(count > 0, grad * s, 0.0), 1, keep_dims=True) / sum
        grad = tl.where(count > 0, (grad - count * mean) / sum, 0.0)
    if SCORE == "softmax":
        grad = s * (grad - tl.sum(tl.where(count > 0, grad * s, 0.0), 1, keep_dims=True))
    else:
        grad = pointwise_gradient(grad, x, s, SCORE)
    out = grad_logits_ptr + row[:, None] * E + expert
    tl.store(out, grad.to(grad_logits_ptr.dtype.element_ty), mask=mask)


@route_topk.op.register_autograd
class RouteTopk(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, logits, bias, topk, num_groups, topk_groups, score, group_score, normalize, scale
    ):
        weights, idx = route_topk.op.overload(
            logits, bias, topk, num_groups, topk_groups, score, group_score, normalize, scale
        )
        ctx.save_for_backward(logits, idx)
        ctx.rule = score, normalize, scale
        ctx.mark_non_differentiable(idx)
        return weights, idx

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_weights, _):
        logits, idx = ctx.saved_tensors
        grad_weights = grad_weights.contiguous()  # it may be expanded
        grad_logits = route_topk_backward.op.overload(grad_weights, logits, idx, *ctx.rule)
        return grad_logits, *[None] * 8
