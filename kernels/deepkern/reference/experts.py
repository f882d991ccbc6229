"""Routing, dispatch, combine and the MoE layer in plain PyTorch; see placement.py for EPLB."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .exact import exp, sigmoid, sum_pairs
from .matmul import m_grouped_fp8_gemm_nt_contiguous
from .placement import rebalance_experts
from .quant import cast_back, cast_per_token, swiglu_cast, swiglu_cast_backward

__all__ = [
    "expert_combine",
    "expert_combine_backward",
    "expert_dispatch",
    "expert_dispatch_backward",
    "expert_load",
    "moe_forward",
    "moe_forward_backward",
    "rebalance_experts",
    "route_topk",
    "route_topk_backward",
    "sequence_balance_loss",
    "sequence_balance_loss_backward",
    "update_expert_bias",
]


# Scores: the formulas of experts/score.py, operation for operation, each rounded to float32.


def log1p(u: Tensor) -> Tensor:
    """ln(1 + u) for 0 <= u <= 1 in float32: 2 artanh(u / (2 + u))."""
    t = u / (u + 2.0)
    z = t * t
    p = z * 0.116121642 + 0.108532876
    p = p * z + 0.142961785
    p = p * z + 0.199998528
    p = p * z + 0.333333343
    t = t + t
    return p * z * t + t


def sqrtsoftplus(x: Tensor) -> Tensor:
    softplus = torch.where(x > 0, x, 0.0) + log1p(exp(-x.abs()))
    # torch.sqrt on a CPU does not always round to nearest in float32; through float64 it does.
    return softplus.double().sqrt().float()


def softmax(x: Tensor) -> Tensor:
    """Over the last dimension; the denominator is exact, in units of 2^-40."""
    e = exp(x - x.amax(-1, keepdim=True))
    units = (e.nan_to_num() * 2.0**40).to(torch.int64)
    row_sum = units.sum(-1, keepdim=True).float() * 2.0**-40
    return e / torch.where(e.isnan().any(-1, keepdim=True), torch.nan, row_sum)


SCORES = {"sigmoid": sigmoid, "softmax": softmax, "sqrtsoftplus": sqrtsoftplus}
EXACT_SCORES = {  # in float64
    "sigmoid": torch.sigmoid,
    "softmax": lambda x: x.softmax(-1),
    "sqrtsoftplus": lambda x: F.softplus(x).sqrt(),
}


def score_gradient(grad: Tensor, x: Tensor, s: Tensor, score: str) -> Tensor:
    """The gradient of logits `x` [..., E], given that of their scores `s`."""
    if score == "softmax":
        return s * (grad - (grad * s).sum(-1, keepdim=True))
    if score == "sigmoid":
        return grad * s * torch.sigmoid(-x)
    return torch.where(s > 0, grad * torch.sigmoid(x) / (2 * s), 0.0)


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
    s = SCORES[score](logits.float())  # [T, E]
    biased = s if bias is None else s + bias.float()
    is_nan = biased.isnan()
    choice = torch.where(is_nan, -torch.inf, biased)

    groups = choice.unflatten(1, (num_groups, -1))  # [T, G, E/G]
    best = 2 if group_score == "top2" and groups.shape[2] > 1 else 1
    group_scores = groups.topk(best, 2).values.sum(2)  # [T, G]
    group_scores = group_scores.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    masked = torch.ones_like(group_scores, dtype=torch.bool)  # [T, G]
    masked.scatter_(1, descending(group_scores)[:, :topk_groups], False)
    masked = masked.repeat_interleave(groups.shape[2], 1)  # [T, E]

    # Best first. Masked experts come last, also after experts with a score of -inf.
    order = descending(choice)
    last = masked.gather(1, order).int().sort(dim=1, stable=True).indices
    idx = order.gather(1, last)[:, :topk].contiguous()

    weights = s.gather(1, idx)
    if normalize:
        weights = weights / (sum_pairs(weights) + 1e-20)
    return torch.where(is_nan.any(1, keepdim=True), torch.nan, weights * scale), idx


def descending(x: Tensor) -> Tensor:
    """Indices that sort each row in descending order; equal values keep their order."""
    return x.sort(dim=1, descending=True, stable=True).indices


def route_topk_backward(
    grad_weights: Tensor,
    logits: Tensor,
    idx: Tensor,
    score: str = "sigmoid",
    normalize: bool = True,
    scale: float = 1.0,
) -> Tensor:
    x = logits.double()
    s = EXACT_SCORES[score](x)
    valid = (idx >= 0) & (idx < x.shape[1])
    expert = torch.where(valid, idx, 0)
    # w = scale * c / (Σ c + 1e-20) for the chosen scores c, or scale * c
    grad = torch.where(valid, grad_weights.double(), 0.0) * scale
    if normalize:
        chosen = torch.where(valid, s.gather(1, expert), 0.0)
        chosen_sum = chosen.sum(1, keepdim=True) + 1e-20
        mean = (grad * chosen).sum(1, keepdim=True) / chosen_sum
        grad = torch.where(valid, (grad - mean) / chosen_sum, 0.0)
    grad_s = torch.zeros_like(x).scatter_add_(1, expert, grad)  # [T, E]
    return score_gradient(grad_s, x, s, score).to(logits.dtype)


def expert_dispatch(
    x: Tensor,
    topk_idx: Tensor,
    num_experts: int,
    x_scale: Tensor | None = None,
    alignment: int = 1,
    cast: str | None = None,
    num_assigned: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    if cast is not None:
        x, x_scale = cast_per_token(x, cast)
    (T, topk), E = topk_idx.shape, num_experts
    flat = topk_idx.reshape(-1).long()
    expert = torch.where((flat >= 0) & (flat < E), flat, E)  # E means none
    counts = expert.bincount(minlength=E + 1)[:E]
    padded = -(-counts // alignment) * alignment
    start = padded.cumsum(0) - padded  # the first row of each expert
    N = T * topk if num_assigned is None else min(T * topk, num_assigned)
    rows = (N + min(E, N) * (alignment - 1)) // alignment * alignment

    order = expert.argsort(stable=True)[: int(counts.sum())]  # by expert, then token, then slot
    rank = torch.arange(len(order), device=x.device) - (counts.cumsum(0) - counts)[expert[order]]
    row = start[expert[order]] + rank
    order, row = order[row < rows], row[row < rows]
    group_index = torch.full((rows,), -1, dtype=torch.int32, device=x.device)
    group_index[row] = expert[order].int()
    handle = torch.full((T * topk,), -1, dtype=torch.int32, device=x.device)
    handle[order] = row.int()

    def sort(values: Tensor) -> Tensor:
        bits = values.view(torch.uint8) if values.element_size() == 1 else values
        out = bits.new_zeros((rows, values.shape[1]))
        out[row] = bits[order // max(topk, 1)]
        return out.view(values.dtype)

    scale = None if x_scale is None else sort(x_scale)
    return sort(x), scale, group_index, counts.int(), handle.view(T, topk)


def expert_dispatch_backward(grad: Tensor, handle: Tensor) -> Tensor:
    return expert_combine(grad, torch.ones_like(handle, dtype=torch.float32), handle)


def expert_combine(
    y: Tensor, topk_weights: Tensor, handle: Tensor, shared: Tensor | None = None
) -> Tensor:
    T, topk = handle.shape
    out = torch.zeros(T, y.shape[1], dtype=torch.float64, device=y.device)
    if shared is not None:
        out += shared
    for j in range(topk):
        valid, row = valid_rows(handle[:, j], y.shape[0])
        out[valid] += topk_weights[valid, j, None].double() * y[row].double()
    return out.to(y.dtype)


def expert_combine_backward(
    grad: Tensor, y: Tensor, topk_weights: Tensor, handle: Tensor
) -> tuple[Tensor, Tensor]:
    grad_y = torch.zeros(y.shape, dtype=torch.float64, device=y.device)
    grad_weights = torch.zeros(handle.shape, dtype=torch.float64, device=y.device)
    for j in range(handle.shape[1]):
        valid, row = valid_rows(handle[:, j], y.shape[0])
        grad_y.index_add_(0, row, topk_weights[valid, j, None].double() * grad[valid].double())
        grad_weights[valid, j] = (grad[valid].double() * y[row].double()).sum(1)
    return grad_y.to(y.dtype), grad_weights.float()


def valid_rows(row: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The mask of the entries of `row` in [0, rows), and these entries."""
    valid = (row >= 0) & (row < rows)
    return valid, row[valid].long()


GRAD_SCALE = 2.0**48  # factor of gradients before a cast, so that scales do not underflow


def moe_forward(
    x: Tensor,
    topk_weights: Tensor,
    topk_idx: Tensor,
    w13: Tensor,
    w13_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
) -> Tensor:
    # Rounds where the op rounds: the outputs of both GEMMs to the dtype of x.
    multiply = m_grouped_fp8_gemm_nt_contiguous
    q, scale, group_index, _, handle = expert_dispatch(x, topk_idx, len(w13), cast="fp32")
    gate_up = multiply(q, scale, w13, w13_scale, group_index, x.dtype)
    y = multiply(*swiglu_cast(gate_up), w2, w2_scale, group_index, x.dtype)
    return expert_combine(y, topk_weights, handle)


def moe_forward_backward(
    grad: Tensor,
    topk_weights: Tensor,
    topk_idx: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    w13: Tensor,
    w13_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
) -> tuple[Tensor, Tensor]:
    multiply, wide = m_grouped_fp8_gemm_nt_contiguous, torch.float32
    if grad.dtype != torch.float32:
        wide = torch.bfloat16
    q, scale, group_index, _, handle = expert_dispatch(
        grad.float() * GRAD_SCALE, topk_idx, len(w13), cast="fp32"
    )
    grad_h = multiply(q, scale, w2.mT, w2_scale.mT, group_index, wide)  # without the weight
    valid, row = valid_rows(handle, len(q))
    weights = torch.zeros(len(q), device=q.device)
    weights[row] = topk_weights[valid].float()
    _, _, grad_row_weights = swiglu_cast_backward(grad_h, gate_up, gate_up_scale, weights)
    grad_weights = torch.zeros(handle.shape, device=q.device)
    grad_weights[valid] = grad_row_weights[row] / GRAD_SCALE
    grad_gate_up = swiglu_gradient(grad_h, gate_up, gate_up_scale, weights).to(wide)
    q, scale = cast_per_token(grad_gate_up)
    y = multiply(q, scale / GRAD_SCALE, w13.mT, w13_scale.mT, group_index, wide)
    return expert_dispatch_backward(y.double(), handle).to(grad.dtype), grad_weights


def swiglu_gradient(
    grad: Tensor, gate_up: Tensor, gate_up_scale: Tensor, weights: Tensor
) -> Tensor:
    """The gradient of `swiglu_cast_backward` in fp32, operation for operation as in the kernel.

    It is cast to FP8 next, and a value in float64 could round to another code.
    """
    gate, up = cast_back(gate_up, gate_up_scale, (1, 128), torch.float32).chunk(2, 1)
    grad, s = grad.float() * weights[:, None], sigmoid(gate)
    return torch.cat((grad * up * (s * (gate * (1.0 - s) + 1.0)), grad * (gate * s)), 1)


def expert_load(topk_idx: Tensor, num_experts: int) -> Tensor:
    valid = (topk_idx >= 0) & (topk_idx < num_experts)
    return topk_idx[valid].long().bincount(minlength=num_experts).int()


def update_expert_bias(bias: Tensor, load: Tensor, rate: float = 0.001) -> Tensor:
    load = load.long()
    return bias + torch.sign(load.sum() - load * len(load)) * bias.new_tensor(rate)


def sequence_balance_loss(
    logits: Tensor, topk_idx: Tensor, score: str = "sigmoid", alpha: float = 1e-4
) -> Tensor:
    if logits.numel() == 0 or topk_idx.numel() == 0:
        return logits.new_zeros((), dtype=torch.float32)
    s = EXACT_SCORES[score](logits.double())
    P = (s / s.sum(2, keepdim=True)).mean(1)
    return (alpha * (expert_fraction(topk_idx, logits.shape[2]) * P).sum(1).mean()).float()


def expert_fraction(topk_idx: Tensor, E: int) -> Tensor:
    """f [B, E]: the assignments of a sequence to each expert, times E / (topk · S)."""
    _, S, topk = topk_idx.shape
    valid = (topk_idx >= 0) & (topk_idx < E)
    chosen = F.one_hot(topk_idx.where(valid, E).long(), E + 1)[..., :E]  # [B, S, topk, E]
    return chosen.sum((1, 2)).double() * (E / (topk * S))


def sequence_balance_loss_backward(
    grad: Tensor, logits: Tensor, topk_idx: Tensor, score: str = "sigmoid", alpha: float = 1e-4
) -> Tensor:
    if logits.numel() == 0 or topk_idx.numel() == 0:
        return torch.zeros_like(logits)
    B, S, E = logits.shape
    x = logits.double()
    s = EXACT_SCORES[score](x)
    s_sum = s.sum(2, keepdim=True)
    fraction = expert_fraction(topk_idx, E)[:, None]  # [B, 1, E]
    grad_normalized = grad.double() * alpha / (B * S) * fraction
    grad_s = (grad_normalized - (grad_normalized * s).sum(2, keepdim=True) / s_sum) / s_sum
    return score_gradient(grad_s, x, s, score).to(logits.dtype)
