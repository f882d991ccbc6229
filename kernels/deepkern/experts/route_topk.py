"""Routing: which experts a token goes to, and with what weight.

    s[t, e] = sigmoid(logits[t, e]), or softmax over e, or sqrt(softplus(logits[t, e]))
    idx[t]  = the topk experts with the largest s + bias, among the topk_groups best groups
    weights[t, j] = scale · s[t, idx[t, j]] / Σ_i s[t, idx[t, i]]        (or without the quotient)

Cut: a program takes ROWS tokens, each with all experts in registers. An expert's biased score and
its index are packed into one int64 key, so that keys are distinct, the larger is the better, equal
scores go to the lower index, and a maximum needs no tie-break; topk maxima are taken one after
the other (for E = 256 and topk = 8 fewer steps than sorting). What is read is 4 bytes a logit; the
time goes into the scores and the maxima.

Scores are computed by experts/score.py, whose bits are the same everywhere.

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
from .score import scores, sigmoid, softmax_sums

SCORES = ("sigmoid", "softmax", "sqrtsoftplus")
TILE = 1024  # logits a program holds
# How the DeepSeek models route: `route_topk(logits, bias, **ROUTING["deepseek-v3"])`.
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

    Args:
        logits: bf16, fp16 or fp32 [T, E]; rows may be strided. Scores are computed in fp32.
        bias: real [E], added to the scores for the choice only, not in the weights.
        topk: experts per token, at most those in `topk_groups` groups.
        num_groups: into how many runs of neighbours the experts are divided; divides E.
        topk_groups: from how many groups, the best ones, a token's experts come.
        score: "sigmoid", "softmax" or "sqrtsoftplus".
        group_score: what ranks a group: "top2", the sum of its two best biased scores (of its one
            if it has but one), or "max", its best.
        normalize: whether a token's weights are divided by their sum (+ 1e-20).
        scale: multiplies the weights.

    Returns:
        weights: fp32 [T, topk].
        idx: int64 [T, topk], distinct, the largest biased score first; equal scores in the order of
            their indices, groups likewise.

    `deepkern.ROUTING` has the arguments of the DeepSeek models by name.

    A NaN biased score ranks as -inf does, and the token's weights are NaN. DEEPKERN_DEBUG=1 raises.
    The gradient goes through the weights; the choice and `bias` have none.

    Raises:
        TypeError, ValueError: an argument is not as above.
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
    if topk_groups == num_groups:  # every group is kept
        num_groups = topk_groups = 1
    GROUPS, SIZE = next_power_of_2(num_groups), next_power_of_2(E // num_groups)
    ROWS = max(1, TILE // (GROUPS * SIZE))
    route_topk_kernel[(cdiv(T, ROWS),)](
        logits, bias, weights, idx, T, E, logits.stride(0), scale, topk_groups, topk,
        SCORE=score, TOP2=group_score == "top2" and num_groups < E, NORMALIZE=normalize,
        NUM_GROUPS=num_groups, GROUPS=GROUPS, SIZE=SIZE, SLOT_LEVELS=(topk - 1).bit_length(),
        ROWS=ROWS, num_warps=warps(ROWS * GROUPS * SIZE), enable_fp_fusion=False,
    )  # fmt: skip
    return weights, idx


def warps(values: int) -> int:
    """Warps for a program that holds this many logits: 8 to 32 for each thread."""
    return min(16, max(4, values // 1024))


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
    logits_ptr, bias_ptr, weights_ptr, idx_ptr, T, E, logits_row, scale, topk_groups, topk,
    SCORE: tl.constexpr, TOP2: tl.constexpr, NORMALIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
    SLOT_LEVELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    SLOTS: tl.constexpr = 1 << SLOT_LEVELS
    LOWEST: tl.constexpr = -0x7FFFFFFFFFFFFFFF  # below every score's key
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    logits_tile = logits_ptr + row[:, None] * logits_row
    # A group takes SIZE columns, of which the first E / NUM_GROUPS are experts.
    column = tl.arange(0, GROUPS * SIZE)
    size = E // NUM_GROUPS
    expert = column // SIZE * size + column % SIZE
    is_expert = (column % SIZE < size) & (column // SIZE < NUM_GROUPS)
    inside = (row < T)[:, None] & is_expert[None, :]

    x = tl.load(logits_tile + expert[None, :], mask=inside, other=float("-inf")).to(tl.float32)
    largest, total = 0.0, 0.0
    if SCORE == "softmax":
        largest, total = softmax_sums(x)  # [ROWS, 1]
    biased = scores(x, largest, total, SCORE)  # [ROWS, GROUPS * SIZE]
    if bias_ptr is not None:
        biased += tl.load(bias_ptr + expert, mask=is_expert, other=0.0).to(tl.float32)[None, :]
    has_nan = tl.max(((biased != biased) & inside).to(tl.int32), 1, keep_dims=True) != 0
    key = tl.where(is_expert[None, :], pack(biased, expert[None, :]), LOWEST)

    if NUM_GROUPS > 1:
        key = tl.reshape(key, (ROWS, GROUPS, SIZE))
        first = tl.max(key, 2)  # [ROWS, GROUPS]
        of_group = unpack_score(first)
        if TOP2:
            others = tl.where(key == first[:, :, None], LOWEST, key)
            of_group += unpack_score(tl.max(others, 2))
        group = tl.arange(0, GROUPS)[None, :]
        group_key = tl.where(group < NUM_GROUPS, pack(of_group, group), LOWEST)
        kept = tl.zeros((ROWS, GROUPS), tl.int1)
        for _ in range(topk_groups):
            hit = group_key == tl.max(group_key, 1, keep_dims=True)
            kept |= hit
            group_key = tl.where(hit, LOWEST, group_key)
        key = tl.where(kept[:, :, None], key, LOWEST)
        key = tl.reshape(key, (ROWS, GROUPS * SIZE))

    slot = tl.arange(0, SLOTS)[None, :]
    chosen = tl.zeros((ROWS, SLOTS), tl.int32)
    for j in range(topk):
        best = tl.max(key, 1, keep_dims=True)
        chosen = tl.where(slot == j, unpack_index(best), chosen)
        key = tl.where(key == best, LOWEST, key)

    # The chosen scores again, without the bias: cheaper than to look for them in the tile.
    inside = (row < T)[:, None] & (slot < topk)
    x = tl.load(logits_tile + chosen, mask=inside, other=0.0).to(tl.float32)
    weight = scores(x, largest, total, SCORE)  # [ROWS, SLOTS]
    if NORMALIZE:
        sum = sum_pairwise(tl.where(slot < topk, weight, 0.0))  # [ROWS]
        weight = tl.div_rn(weight, (sum + 1e-20)[:, None])
    weight = tl.where(has_nan, float("nan"), weight * scale)
    out = row[:, None] * topk + slot
    tl.store(weights_ptr + out, weight, mask=inside)
    tl.store(idx_ptr + out, chosen.to(tl.int64), mask=inside)


@triton.jit
def pack(score, index):
    """An int64 that orders as the scores do, NaN as -inf, and the lower index before the higher."""
    score = tl.where(score == score, score, float("-inf"))  # never -0, as scores are not
    return (in_order(score.to(tl.int32, bitcast=True)).to(tl.int64) << 32) | (0x7FFFFFFF - index)


@triton.jit
def unpack_score(key):
    return in_order((key >> 32).to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def unpack_index(key):
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def in_order(bits):
    """The bits of floats to integers that order as they do; its own inverse."""
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
    """The gradient of `route_topk`'s weights with respect to its logits, [T, E] in their dtype.

    Args:
        grad_weights: real [T, topk].
        logits, score, normalize, scale: as in the forward pass.
        idx: int64 [T, topk] from the forward pass; an index outside [0, E) counts as none.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    check_choice("route_topk_backward", "score", score, SCORES)
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
        num_warps=warps(ROWS * EXPERTS),
    )  # fmt: skip
    return grad_logits


@triton.jit(do_not_specialize=["T"])
def route_topk_backward_kernel(
    grad_weights_ptr, logits_ptr, idx_ptr, grad_logits_ptr, T, E, topk,
    grad_row, logits_row, idx_row, scale,
    SCORE: tl.constexpr, NORMALIZE: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    expert = tl.arange(0, EXPERTS)[None, :]
    inside = (row < T)[:, None] & (expert < E)
    x = tl.load(logits_ptr + row[:, None] * logits_row + expert, mask=inside, other=float("-inf"))
    x = x.to(tl.float32)  # [ROWS, EXPERTS]

    # The gradient and the number of choices of each expert, dense.
    grad = tl.zeros((ROWS, EXPERTS), tl.float32)
    count = tl.zeros((ROWS, EXPERTS), tl.float32)
    for j in range(topk):
        chosen = tl.load(idx_ptr + row * idx_row + j, mask=row < T, other=-1)  # [ROWS]
        grad_j = tl.load(grad_weights_ptr + row * grad_row + j, mask=row < T, other=0.0)
        hit = inside & (chosen[:, None] == expert)
        grad += tl.where(hit, grad_j.to(tl.float32)[:, None], 0.0)
        count += hit.to(tl.float32)
    grad *= scale

    largest, total = 0.0, 0.0
    if SCORE == "softmax":
        largest, total = softmax_sums(x)
    s = scores(x, largest, total, SCORE)
    if NORMALIZE:  # w = scale · c / (Σ c + 1e-20) for the chosen scores c
        sum = tl.sum(tl.where(count > 0, count * s, 0.0), 1, keep_dims=True) + 1e-20
        mean = tl.sum(tl.where(count > 0, grad * s, 0.0), 1, keep_dims=True) / sum
        grad = tl.where(count > 0, (grad - count * mean) / sum, 0.0)
    if SCORE == "softmax":
        grad = s * (grad - tl.sum(tl.where(count > 0, grad * s, 0.0), 1, keep_dims=True))
    elif SCORE == "sigmoid":
        grad *= s * sigmoid(-x)
    else:
        grad = tl.where(s > 0.0, grad * sigmoid(x) / (2.0 * s), 0.0)
    out = grad_logits_ptr + row[:, None] * E + expert
    tl.store(out, grad.to(grad_logits_ptr.dtype.element_ty), mask=inside)


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
