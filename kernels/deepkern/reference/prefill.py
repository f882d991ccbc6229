"""Attention over ragged sequences in plain PyTorch, forward and backward, one head at a time.

Computed in float64 and rounded once.
"""

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
            kv_head = h * k.shape[1] // H
            scores = masked_scores(q[rows, h], k[keys, kv_head], softmax_scale, causal)
            weights = scores.softmax(-1)
            weights[(scores == -math.inf).all(-1)] = 0.0  # no visible key
            out[rows, h] = (weights @ v[keys, kv_head].double()).to(q.dtype)
            # A score of +inf gives NaN in lse as in out; torch's logsumexp gives +inf.
            is_inf = (scores == math.inf).any(-1)
            lse[h, rows] = scores.logsumexp(-1).masked_fill(is_inf, math.nan).float()
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
    grad_q, grad_k, grad_v = (
        torch.zeros(x.shape, dtype=torch.float64, device=x.device) for x in (q, k, v)
    )
    delta = (grad_out.double() * out.double()).sum(-1).T  # [H, T]
    if grad_lse is not None:
        delta = (delta - grad_lse.double()).masked_fill(lse == -math.inf, 0.0)
    for rows, keys in sequences(q, k, cu_seqlens_q, cu_seqlens_k):
        for h in range(H):
            kv_head = h * Hk // H
            query = q[rows, h].double()
            key, value = k[keys, kv_head].double(), v[keys, kv_head].double()
            grad = grad_out[rows, h].double()
            row_lse = lse[h, rows, None].double()
            row_lse = row_lse.masked_fill(row_lse == -math.inf, math.inf)  # weights are 0
            weights = (masked_scores(query, key, softmax_scale, causal) - row_lse).exp()
            grad_scores = weights * (grad @ value.T - delta[h, rows, None]) * softmax_scale
            grad_q[rows, h] = grad_scores @ key
            grad_k[keys, kv_head] += grad_scores.T @ query
            grad_v[keys, kv_head] += weights.T @ grad
    return grad_q.to(q.dtype), grad_k.to(q.dtype), grad_v.to(q.dtype)


def sequences(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> list[tuple[slice, slice]]:
    """(rows of q, rows of k) of each sequence in which neither is empty."""
    slices = []
    for cu_seqlens, x in ((cu_seqlens_q, q), (cu_seqlens_k, k)):
        bounds = cu_seqlens.clamp(0, x.shape[0]).cummax(0).values.tolist()
        slices.append([slice(*pair) for pair in zip(bounds, bounds[1:], strict=False)])
    return [(m, n) for m, n in zip(*slices, strict=True) if m.start < m.stop and n.start < n.stop]


def masked_scores(q: Tensor, k: Tensor, softmax_scale: float, causal: bool) -> Tensor:
    """Scores of one head of one sequence: float64 [Lq, Lk], -inf where causally masked."""
    scores = (q.double() @ k.double().T) * softmax_scale
    if causal:
        is_future = torch.ones_like(scores, dtype=torch.bool).triu(len(k) - len(q) + 1)
        scores = scores.masked_fill(is_future, -math.inf)
    return scores
