"""Attention over ragged sequences, forward and backward, head by head in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["mla_prefill", "mla_prefill_backward"]


def mla_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    softmax_scale: float,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    T, H, _ = q.shape
    out = q.new_zeros(T, H, v.shape[2])
    lse = q.new_full((H, T), -math.inf, dtype=torch.float32)
    for rows, keys in sequences(q, k, cu_seqlens_q, cu_seqlens_k):
        for h in range(H):
            shared = h * k.shape[1] // H
            scores = visible_scores(q[rows, h], k[keys, shared], softmax_scale, causal)
            weights = scores.softmax(-1)
            weights[(scores == -math.inf).all(-1)] = 0.0  # nothing to attend to
            out[rows, h] = (weights @ v[keys, shared].double()).to(q.dtype)
            # A score of +inf is NaN in lse as in out, where torch's logsumexp has +inf.
            spoiled = (scores == math.inf).any(-1)
            lse[h, rows] = scores.logsumexp(-1).masked_fill(spoiled, math.nan).float()
    return out, lse


def mla_prefill_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    softmax_scale: float,
    causal: bool = True,
    grad_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    H, Hk = q.shape[1], k.shape[1]
    grads = [torch.zeros(x.shape, dtype=torch.float64, device=x.device) for x in (q, k, v)]
    delta = (grad_out.double() * out.double()).sum(-1).T  # [H, T]
    if grad_lse is not None:
        delta = (delta - grad_lse.double()).masked_fill(lse == -math.inf, 0.0)
    for rows, keys in sequences(q, k, cu_seqlens_q, cu_seqlens_k):
        for h in range(H):
            shared = h * Hk // H
            query, key, value = (x.double() for x in (q[rows, h], k[keys, shared], v[keys, shared]))
            grad = grad_out[rows, h].double()
            log_total = lse[h, rows, None].double()
            log_total = log_total.masked_fill(log_total == -math.inf, math.inf)
            weights = (visible_scores(query, key, softmax_scale, causal) - log_total).exp()
            grad_scores = weights * (grad @ value.T - delta[h, rows, None]) * softmax_scale
            grads[0][rows, h] = grad_scores @ key
            grads[1][keys, shared] += grad_scores.T @ query
            grads[2][keys, shared] += weights.T @ grad
    return tuple(grad.to(q.dtype) for grad in grads)


def sequences(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> list[tuple[slice, slice]]:
    """The rows of q and of k of each sequence that has both."""
    slices = []
    for cu, x in ((cu_seqlens_q, q), (cu_seqlens_k, k)):
        edges = cu.clamp(0, x.shape[0]).cummax(0).values.tolist()
        slices.append([slice(*pair) for pair in zip(edges, edges[1:], strict=False)])
    return [(m, n) for m, n in zip(*slices, strict=True) if m.start < m.stop and n.start < n.stop]


def visible_scores(q: Tensor, k: Tensor, softmax_scale: float, causal: bool) -> Tensor:
    """One head of one sequence in float64, [Lq, Lk]; -inf where a query does not see a key."""
    scores = (q.double() @ k.double().T) * softmax_scale
    if causal:
        unseen = torch.ones_like(scores, dtype=torch.bool).triu(len(k) - len(q) + 1)
        scores = scores.masked_fill(unseen, -math.inf)
    return scores
