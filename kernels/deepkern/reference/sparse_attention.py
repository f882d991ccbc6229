"""Attention over the tokens that each query selects by index, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import attention

__all__ = ["mla_sparse_decode", "mla_sparse_prefill", "mla_sparse_prefill_backward"]


def mla_sparse_decode(
    q: Tensor,
    cache: Tensor,
    indices: Tensor,
    softmax_scale: float,
    topk_length: Tensor | None = None,
    attn_sink: Tensor | None = None,
    v_head_dim: int = 512,
) -> tuple[Tensor, Tensor]:
    B, Sq, H, _ = q.shape
    blocks, page = cache.shape[:2]
    out = q.new_zeros(B, Sq, H, v_head_dim)
    lse = q.new_full((B, H, Sq), -math.inf, dtype=torch.float32)
    for b in range(B):
        for s in range(Sq):
            slot = selected(indices[b, s], blocks * page, topk_length, b)
            if slot.numel() == 0:
                continue
            keys = attention.unpack(cache[slot // page, slot % page, 0], v_head_dim)  # [n, R + D]
            attn_mask = torch.ones(1, slot.numel(), dtype=torch.bool, device=q.device)
            out_s, lse_s = attention.attend(
                q[b, s, None].double(), keys, attn_mask, softmax_scale, v_head_dim
            )
            if attn_sink is not None:
                out_s *= torch.sigmoid(lse_s - attn_sink.double())[..., None]
            out[b, s], lse[b, :, s] = out_s[0], lse_s[0]
    return out, lse


def selected(indices: Tensor, slots: int, topk_length: Tensor | None, i: int) -> Tensor:
    """The valid indices of query i, as int64: those within its length and in [0, slots)."""
    if topk_length is not None:
        indices = indices[: max(int(topk_length[i]), 0)]
    return indices[(indices >= 0) & (indices < slots)].long()


def mla_sparse_prefill(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    softmax_scale: float,
    v_head_dim: int = 512,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    S, H, _ = q.shape
    out = q.new_zeros(S, H, v_head_dim)
    max_logits = q.new_full((S, H), -math.inf, dtype=torch.float32)
    lse = q.new_full((S, H), -math.inf, dtype=torch.float32)
    for s in range(S):
        row = selected(indices[s, 0], kv.shape[0], topk_length, s)
        if row.numel() == 0:
            continue
        keys = kv[row, 0].double()
        attn_mask = torch.ones(1, row.numel(), dtype=torch.bool, device=q.device)
        out_s, lse_s = attention.attend(
            q[s, None].double(), keys, attn_mask, softmax_scale, v_head_dim
        )
        if attn_sink is not None:
            out_s *= torch.sigmoid(lse_s - attn_sink.double())[..., None]
        out[s], lse[s] = out_s[0], lse_s[0]
        max_logits[s] = (q[s].double() @ keys.T * softmax_scale).amax(-1)
    return out, max_logits, lse


def mla_sparse_prefill_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    S, H, _ = q.shape
    grad_q = torch.zeros_like(q, dtype=torch.float64)
    grad_kv = torch.zeros_like(kv, dtype=torch.float64)
    grad_sink = torch.zeros(H, dtype=torch.float64, device=q.device)
    for s in range(S):
        row = selected(indices[s, 0], kv.shape[0], topk_length, s)
        if row.numel() == 0:
            continue
        q_s, keys, grad_s = q[s].double(), kv[row, 0].double(), grad_out[s].double()
        lse_s = lse[s].double()[:, None]
        no_sink = (q_s @ keys.T * softmax_scale - lse_s).exp()  # [H, n], weights without sinks
        weights, sink_weight = no_sink, torch.zeros_like(lse_s)
        if attn_sink is not None:
            sink = attn_sink.double()[:, None]
            weights = no_sink * torch.sigmoid(lse_s - sink)
            sink_weight = torch.sigmoid(sink - lse_s)
        delta = (grad_s * out[s].double()).sum(-1, keepdim=True)
        grad_scores = weights * (grad_s @ keys[:, : grad_s.shape[1]].T - delta)
        if grad_lse is not None:
            grad_scores += no_sink * grad_lse[s].double()[:, None]
        grad_q[s] = grad_scores @ keys * softmax_scale
        grad_keys = grad_scores.T @ q_s * softmax_scale
        grad_keys[:, : grad_s.shape[1]] += weights.T @ grad_s
        grad_kv[:, 0].index_add_(0, row, grad_keys)
        grad_sink -= (sink_weight * delta)[:, 0]
    grad_sink = None if attn_sink is None else grad_sink.float()
    return grad_q.to(q.dtype), grad_kv.to(q.dtype), grad_sink
