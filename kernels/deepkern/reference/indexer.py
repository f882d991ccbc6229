"""The lightning indexer of DeepSeek-V3.2, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .quant import block_scale, cast_per_token, to_e4m3

__all__ = [
    "hadamard_cast",
    "hadamard_transform",
    "indexer_cache_append",
    "mqa_logits",
    "paged_mqa_logits",
    "topk_indices",
]


def mqa_logits(
    q: Tensor, kv: Tensor, kv_scale: Tensor, weights: Tensor, starts: Tensor, ends: Tensor
) -> Tensor:
    key = torch.arange(kv.shape[0], device=q.device)
    attn_mask = (key >= starts[:, None]) & (key < ends[:, None])
    products = torch.einsum("shd,nd->shn", q.double(), kv.double()).relu()
    logits = torch.einsum("sh,shn->sn", weights.double(), products) * kv_scale.double()
    return logits.masked_fill(~attn_mask, -math.inf).float()


def indexer_cache_append(
    k: Tensor, cache: Tensor, slot_mapping: Tensor, scale_format: str = "fp32"
) -> None:
    num_pages, page_size = cache.shape[:2]
    D = k.shape[1]
    valid = (slot_mapping >= 0) & (slot_mapping < num_pages * page_size)
    x, slot = k[valid].float(), slot_mapping[valid]
    amax = x.abs().amax(1) if D else x.new_zeros(len(x))
    scale = block_scale(amax, scale_format)
    q = to_e4m3(x * (1.0 / scale)[:, None])
    page, offset = slot // page_size, slot % page_size
    values, scales = pages(cache, D)
    values[page, offset] = q.view(torch.uint8)
    scales[page, offset] = scale[:, None].view(torch.uint8)


def pages(cache: Tensor, D: int) -> tuple[Tensor, Tensor]:
    """Views of an indexer's cache, as bytes: values and scales, see attention/indexer_cache.py.

    Shapes: [num_pages, page_size, D] and [num_pages, page_size, 4].
    """
    num_pages, page_size = cache.shape[:2]
    page_bytes = cache.as_strided((num_pages, page_size * (D + 4)), (cache.stride(0), 1))
    values, scales = page_bytes.tensor_split((page_size * D,), 1)
    return values.unflatten(1, (page_size, D)), scales.unflatten(1, (page_size, 4))


def paged_mqa_logits(
    q: Tensor,
    cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    max_context_len: int,
) -> Tensor:
    B, next_n, _, D = q.shape
    num_pages, page_size = cache.shape[:2]
    values, scales = pages(cache, D)
    out = q.new_full((B * next_n, max_context_len), -math.inf, dtype=torch.float32)
    lengths = context_lens.clamp(0, block_table.shape[1] * page_size)
    if lengths.dim() == 1:
        lengths = lengths[:, None] - next_n + 1 + torch.arange(next_n, device=q.device)
    lengths = lengths.clamp(0, max_context_len).int()  # [B, next_n]
    for b in range(B if next_n else 0):
        key = torch.arange(int(lengths[b].max()), device=q.device)
        page = block_table[b, key // page_size].long()
        valid = (page >= 0) & (page < num_pages)
        key, page = key[valid], page[valid]
        kv = values[page, key % page_size].view(torch.float8_e4m3fn)
        scale = scales[page, key % page_size].contiguous().view(torch.float32)[:, 0]
        rows = slice(b * next_n, (b + 1) * next_n)
        # kv has the valid keys only, in order: the number of them below each query's length.
        ends = (key < lengths[b][:, None]).sum(1)
        out[rows, key] = mqa_logits(q[b], kv, scale, weights[rows], torch.zeros_like(ends), ends)
    return out


def topk_indices(logits: Tensor, k: int, lengths: Tensor | None = None) -> Tensor:
    S, N = logits.shape
    values = logits.float().nan_to_num(-math.inf, math.inf, -math.inf)
    row_lengths = N if lengths is None else lengths[:, None]
    padding = (torch.arange(N, device=logits.device) >= row_lengths).expand(S, N)
    # Two stable sorts: by value, then the padding after all values.
    order = values.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, padding.gather(1, order).int().argsort(dim=1, stable=True))[:, :k]
    selected = order.masked_fill(padding.gather(1, order), N).sort(1).values  # -1 would sort first
    out = logits.new_full((S, k), -1, dtype=torch.int32)
    out[:, : selected.shape[1]] = selected.masked_fill(selected == N, -1)
    return out


def hadamard_transform(x: Tensor, scale: float = 1.0) -> Tensor:
    """Butterflies in fp32, lowest bit of the index first."""
    y = x.float()
    half = 1
    while half < x.shape[-1]:
        a, b = y.unflatten(-1, (-1, 2, half)).unbind(-2)
        y = torch.stack((a + b, a - b), -2).flatten(-3)
        half *= 2
    return (y * torch.tensor(scale, dtype=torch.float32)).to(x.dtype).contiguous()


def hadamard_cast(
    x: Tensor, scale: float = 1.0, scale_format: str = "fp32"
) -> tuple[Tensor, Tensor]:
    return cast_per_token(hadamard_transform(x.float(), scale), scale_format)
