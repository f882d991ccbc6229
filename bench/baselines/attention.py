"""Plain PyTorch for latent attention and its cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .quant import FP8, cast_per_token
from .registry import baseline


@baseline
def mla_cache_append(
    latent, k_rope, cache, slot_mapping, norm_weight=None, positions=None, cos_sin=None, eps=1e-6
) -> None:
    """RMS norm, RoPE and index_put, op by op."""
    slots = cache.shape[0] * cache.shape[1]
    kept = (slot_mapping >= 0) & (slot_mapping < slots)
    if positions is not None:
        kept &= (positions >= 0) & (positions < cos_sin.shape[0])
    latent, k_rope, slot_mapping = latent[kept].float(), k_rope[kept].float(), slot_mapping[kept]
    if norm_weight is not None:
        latent = F.rms_norm(latent, latent.shape[-1:], norm_weight.float(), eps)
    if positions is not None:
        cos, sin = cos_sin[positions[kept]].chunk(2, -1)
        even, odd = k_rope[..., 0::2], k_rope[..., 1::2]
        k_rope = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
    if cache.dtype == torch.uint8:
        parts = (*cast_per_token(latent), k_rope.bfloat16())
        entry = torch.cat([part.contiguous().view(torch.uint8) for part in parts], -1)
    else:
        entry = torch.cat([latent, k_rope], -1).to(cache.dtype)
    page = cache.shape[1]
    cache[slot_mapping // page, slot_mapping % page, 0] = entry


def gather(cache: Tensor, block_table: Tensor, v_head_dim: int, dtype: torch.dtype) -> Tensor:
    """The cache of every sequence, one after the other: [B, P * page, R + D] in `dtype`."""
    blocks, page = cache.shape[:2]
    B, P = block_table.shape
    block = block_table.long().clamp(0, max(blocks - 1, 0))
    entries = cache.flatten(2)[block].reshape(B, P * page, cache.shape[-1])
    if cache.dtype != torch.uint8:
        return entries.to(dtype)
    return unpack(entries, v_head_dim).to(dtype)


def unpack(entries: Tensor, R: int) -> Tensor:
    """FP8-format entries [..., bytes] -> fp32 [..., R + D]."""
    scales = R + 4 * -(-R // 128)
    latent = entries[..., :R].contiguous().view(FP8).float()
    scale = entries[..., R:scales].contiguous().view(torch.float32).repeat_interleave(128, -1)
    rope = entries[..., scales:].contiguous().view(torch.bfloat16).float()
    return torch.cat([latent * scale[..., :R], rope], -1)


@baseline
def mla_decode(
    q, cache, block_table, cache_seqlens, softmax_scale, causal=True, v_head_dim=512
) -> tuple[Tensor, None]:
    """Gather the cache, SDPA with the heads as rows."""
    B, Sq, H = q.shape[:3]
    blocks, page = cache.shape[:2]
    keys = gather(cache, block_table, v_head_dim, q.dtype)  # [B, S, R + D]
    position = torch.arange(keys.shape[1], device=q.device)
    limit = cache_seqlens.clamp(0, keys.shape[1]).long()[:, None, None]  # [B, 1, 1]
    if causal:
        limit = limit - (Sq - 1 - torch.arange(Sq, device=q.device)[:, None])
    seen = position < limit  # [B, Sq or 1, S]
    present = ((block_table >= 0) & (block_table < blocks)).repeat_interleave(page, 1)
    seen = (seen & present[:, None]).expand(B, Sq, -1)  # [B, Sq, S]
    # A key that is not seen may be NaN, and 0 * NaN would be NaN.
    keys = keys.masked_fill(~seen.any(1)[..., None], 0)[:, None]  # [B, 1, S, R + D]
    # All heads share the keys, so they are rows of one head: no copy of the keys for each.
    rows = seen.repeat_interleave(H, 1)[:, None]  # [B, 1, Sq * H, S]
    out = F.scaled_dot_product_attention(
        q.flatten(1, 2)[:, None], keys, keys[..., :v_head_dim], rows, scale=softmax_scale
    )
    out = out.masked_fill(~rows.any(-1, keepdim=True), 0)  # nothing to attend to
    return out.view(B, Sq, H, v_head_dim), None
