"""Latent attention and its cache, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import indexer, prefill, sparse_attention
from .exact import inverse_rms, sum_pairs
from .indexer import *  # noqa: F403
from .prefill import *  # noqa: F403
from .quant import BLOCK, cast_per_token
from .sparse_attention import *  # noqa: F403

__all__ = [
    "merge_states",
    "merge_states_backward",
    "mla_cache_append",
    "mla_cache_gather",
    "mla_decode",
    *indexer.__all__,
    *prefill.__all__,
    *sparse_attention.__all__,
]


def mla_cache_append(
    latent: Tensor,
    k_rope: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
    norm_weight: Tensor | None = None,
    positions: Tensor | None = None,
    cos_sin: Tensor | None = None,
    eps: float = 1e-6,
) -> None:
    blocks, page = cache.shape[:2]
    valid = (slot_mapping >= 0) & (slot_mapping < blocks * page)
    if positions is not None:
        valid &= (positions >= 0) & (positions < cos_sin.shape[0])
    latent, k_rope, slot = latent[valid].float(), k_rope[valid].float(), slot_mapping[valid]
    if norm_weight is not None:
        latent = rms_norm(latent, norm_weight.float(), eps)
    if positions is not None:
        k_rope = rotate(k_rope, cos_sin[positions[valid]])
    cache[slot // page, slot % page, 0] = pack(latent, k_rope, cache.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm in fp32, each step rounded; squares are summed pairwise, neighbours first."""
    return (x * inverse_rms(sum_pairs(x * x), x.shape[-1], eps)) * weight


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotates the pairs (2i, 2i + 1) of fp32 `x` by the angles of `cos_sin` = [cos | sin]."""
    cos, sin = cos_sin.chunk(2, dim=-1)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def pack(latent: Tensor, k_rope: Tensor, dtype: torch.dtype) -> Tensor:
    """Cache entries of fp32 [n, R] and [n, D]: [n, R + D], or bytes for the FP8 format."""
    if dtype != torch.uint8:
        return torch.cat((latent.to(dtype), k_rope.to(dtype)), dim=-1)
    q, scale = cast_per_token(latent)
    columns = q, scale, k_rope.bfloat16()
    return torch.cat([c.contiguous().view(torch.uint8) for c in columns], dim=-1)


def unpack(entries: Tensor, R: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Cache entries [n, width] as values [n, R + D], computed in `dtype`."""
    if entries.dtype != torch.uint8:
        return entries.to(dtype)
    q, scale, k_rope = entries.split(
        (R, 4 * -(-R // BLOCK), entries.shape[1] - R - 4 * -(-R // BLOCK)), 1
    )
    scale = reinterpret(scale, torch.float32).to(dtype)
    latent = reinterpret(q, torch.float8_e4m3fn).to(dtype)
    latent = latent * scale.repeat_interleave(BLOCK, dim=1)[:, :R]
    return torch.cat((latent, reinterpret(k_rope, torch.bfloat16).to(dtype)), dim=1)


def reinterpret(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes [n, width] as values [n, width / itemsize] for any strides and offset."""
    values = rows.flatten().clone().view(dtype)
    return values.view(len(rows), rows.shape[1] // dtype.itemsize)


def mla_cache_gather(
    cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    total_tokens: int,
    v_head_dim: int = 512,
    starts: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    (blocks, page), (B, P) = cache.shape[:2], block_table.shape
    row = torch.arange(total_tokens, device=cache.device)
    offsets = cu_seqlens.long()
    # The last sequence that starts at or before the row; it may end before the row.
    sequence = (offsets <= row[:, None]).sum(1) - 1
    valid = (sequence >= 0) & (sequence < B)
    row, sequence = row[valid], sequence[valid]
    position = row - offsets[sequence]
    valid = (position >= 0) & (row < offsets[sequence + 1])
    if starts is not None:
        position = position + starts[sequence]
    valid &= (position >= 0) & (position < P * page)
    row, sequence, position = row[valid], sequence[valid], position[valid]
    block = block_table[sequence, position // page].long()
    valid = (block >= 0) & (block < blocks)
    entries = cache[block[valid], position[valid] % page, 0]
    keys = unpack(entries, v_head_dim, torch.float32)
    out = torch.zeros(total_tokens, keys.shape[1], dtype=out_dtype, device=cache.device)
    out[row[valid]] = keys.to(out_dtype)
    return out


def mla_decode(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    softmax_scale: float,
    causal: bool = True,
    v_head_dim: int = 512,
) -> tuple[Tensor, Tensor]:
    B, Sq, H, _ = q.shape
    blocks, page = cache.shape[:2]
    capacity = block_table.shape[1] * page
    out = q.new_zeros(B, Sq, H, v_head_dim)
    lse = q.new_full((B, H, Sq), -math.inf, dtype=torch.float32)
    for b, length in enumerate(cache_seqlens.clamp(0, capacity).tolist()):
        key = torch.arange(length, device=q.device)
        block = block_table[b, key // page].long()
        key_mask = (block >= 0) & (block < blocks)
        key, block = key[key_mask], block[key_mask]
        if key.numel() == 0:
            continue
        keys = unpack(cache[block, key % page, 0], v_head_dim)  # [n, R + D]
        limit = torch.full((Sq,), length, device=q.device)
        if causal:
            limit -= Sq - 1 - torch.arange(Sq, device=q.device)
        attn_mask = key < limit[:, None]
        out_b, lse_b = attend(q[b].double(), keys, attn_mask, softmax_scale, v_head_dim)
        out[b], lse[b] = out_b, lse_b.T
    return out, lse


def attend(
    q: Tensor, keys: Tensor, attn_mask: Tensor, softmax_scale: float, v_head_dim: int
) -> tuple[Tensor, Tensor]:
    """One sequence in float64: q [Sq, H, R + D], keys [n, R + D], attn_mask [Sq, n].

    Returns out [Sq, H, R] and lse [Sq, H].
    """
    scores = (q @ keys.T).mul_(softmax_scale)  # [Sq, H, n]
    scores.masked_fill_(~attn_mask[:, None], -math.inf)
    row_max = scores.amax(-1, keepdim=True)
    row_max = row_max.masked_fill(row_max == -math.inf, 0.0)  # no keys: all weights are 0
    weights = scores.sub_(row_max).exp_()
    row_sum = weights.sum(-1, keepdim=True)
    out = (weights @ keys[:, :v_head_dim]) / row_sum.masked_fill(row_sum == 0, 1.0)
    return out, (row_max + row_sum.log())[..., 0]


def merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    weight_a, weight_b, lse = merge_weights(lse_a.double(), lse_b.double())
    out = weight_a * mask_out(out_a, lse_a) + weight_b * mask_out(out_b, lse_b)
    return out.to(out_a.dtype).contiguous(), lse.float().contiguous()


def merge_states_backward(
    grad_out: Tensor, grad_lse: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight_a, weight_b, _ = merge_weights(lse_a.double(), lse_b.double())
    grad, grad_lse = grad_out.double(), grad_lse.double().mT[..., None]
    dot = (grad * (mask_out(out_a, lse_a) - mask_out(out_b, lse_b))).sum(-1, keepdim=True)
    grads = (
        (weight_a * grad).to(out_a.dtype),
        (weight_a * (grad_lse + weight_b * dot))[..., 0].mT.float(),
        (weight_b * grad).to(out_b.dtype),
        (weight_b * (grad_lse - weight_a * dot))[..., 0].mT.float(),
    )
    return tuple(x.contiguous() for x in grads)


def merge_weights(lse_a: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(lse_a - lse) and exp(lse_b - lse), [..., S, H, 1], and the merged lse [..., H, S]."""
    row_max = torch.maximum(lse_a, lse_b)
    row_max = row_max.masked_fill(row_max == -math.inf, 0.0)  # no keys: both weights are 0
    exp_a, exp_b = (lse_a - row_max).exp(), (lse_b - row_max).exp()
    row_sum = exp_a + exp_b
    norm = row_sum.masked_fill(row_sum == 0, 1.0)
    weight_a, weight_b = ((x / norm).mT[..., None] for x in (exp_a, exp_b))
    return weight_a, weight_b, row_max + row_sum.log()


def mask_out(out: Tensor, lse: Tensor) -> Tensor:
    """out [..., S, H, D] in float64; 0 where lse is -inf, even if out is NaN there."""
    return out.double().masked_fill((lse == -math.inf).mT[..., None], 0.0)
