"""Plain PyTorch for routing, dispatch and combine."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .quant import FP8
from .registry import baseline


def scores(logits: Tensor, score: str) -> Tensor:
    logits = logits.float()
    if score == "softmax":
        return logits.softmax(-1)
    return logits.sigmoid() if score == "sigmoid" else F.softplus(logits).sqrt()


@baseline
def route_topk(
    logits, bias=None, topk=8, num_groups=1, topk_groups=1, score="sigmoid", group_score="top2",
    normalize=True, scale=1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scores, torch.topk of groups and of experts."""
    s = scores(logits, score)
    biased = s if bias is None else s + bias.float()
    if num_groups > 1:
        groups = biased.unflatten(1, (num_groups, -1))  # [T, G, E/G]
        best = 1 if group_score == "max" else min(2, groups.shape[2])
        kept = groups.topk(best, -1).values.sum(-1).topk(topk_groups).indices
        masked = torch.ones(groups.shape[:2], dtype=torch.bool, device=s.device)
        masked.scatter_(1, kept, False)
        biased = groups.masked_fill(masked[..., None], -torch.inf).flatten(1)
    idx = biased.topk(topk).indices
    return _weights(s.gather(1, idx), normalize, scale), idx


def _weights(chosen: Tensor, normalize: bool, scale: float) -> Tensor:
    return scale * (chosen / (chosen.sum(-1, keepdim=True) + 1e-20) if normalize else chosen)


@baseline
def route_topk_backward(grad_weights, logits, idx, score="sigmoid", normalize=True, scale=1.0):
    """Autograd through scores and gather."""
    valid = (idx >= 0) & (idx < logits.shape[1])
    with torch.enable_grad():
        logits = logits.detach().requires_grad_()
        chosen = scores(logits, score).gather(1, idx.where(valid, 0)) * valid
        weights = _weights(chosen, normalize, scale)
        return torch.autograd.grad(weights, logits, grad_weights * valid)[0]


@baseline
def expert_dispatch(x, topk_idx, num_experts, x_scale=None, alignment=1) -> tuple:
    """Stable argsort, index_select."""
    (T, topk), E = topk_idx.shape, num_experts
    flat = topk_idx.flatten().long()
    expert = torch.where((flat >= 0) & (flat < E), flat, E)
    counts = torch.bincount(expert, minlength=E + 1)[:E]
    order = expert.argsort(stable=True)[: int(counts.sum())]
    rows = (T * topk + min(E, T * topk) * (alignment - 1)) // alignment * alignment
    row = torch.arange(len(order), device=x.device)
    if alignment > 1:
        padding = -counts % alignment
        row = row + (padding.cumsum(0) - padding)[expert[order]]

    def sort(source: Tensor) -> Tensor:
        source = source.view(torch.uint8) if source.dtype == FP8 else source  # not every op has FP8
        picked = source.index_select(0, order // max(topk, 1))
        if len(order) < rows:
            picked = source.new_zeros(rows, source.shape[1]).index_copy_(0, row, picked)
        return picked

    group_index = row.new_full((rows,), -1, dtype=torch.int32)
    group_index[row] = expert[order].int()
    handle = row.new_full((T * topk,), -1, dtype=torch.int32)
    handle[order] = row.int()
    scale = None if x_scale is None else sort(x_scale)
    return sort(x).view(x.dtype), scale, group_index, counts.int(), handle.view(T, topk)


@baseline
def expert_combine(y: Tensor, topk_weights: Tensor, handle: Tensor) -> Tensor:
    """index_select, multiply, index_add in fp32."""
    return _combine(y, topk_weights, handle).to(y.dtype)


def _combine(y: Tensor, topk_weights: Tensor | None, handle: Tensor) -> Tensor:
    T, topk = handle.shape
    valid = ((handle >= 0) & (handle < y.shape[0])).flatten()
    token = torch.arange(T, device=y.device).repeat_interleave(topk)[valid]
    picked = y.index_select(0, handle.flatten()[valid]).float()
    if topk_weights is not None:
        picked = picked * topk_weights.flatten()[valid, None].float()
    return torch.zeros(T, y.shape[1], device=y.device).index_add(0, token, picked)


@baseline
def expert_combine_backward(grad, y, topk_weights, handle) -> tuple[Tensor, Tensor]:
    """Autograd through index_select and index_add."""
    with torch.enable_grad():
        y, weights = y.detach().requires_grad_(), topk_weights.detach().requires_grad_()
        grads = torch.autograd.grad(_combine(y, weights, handle), (y, weights), grad.float())
    return grads[0], grads[1].float()


@baseline
def expert_dispatch_backward(grad: Tensor, handle: Tensor) -> Tensor:
    """index_select, index_add in fp32."""
    return _combine(grad, None, handle).to(grad.dtype)
