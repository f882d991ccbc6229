"""Plain PyTorch for the indexer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .quant import FP8, cast_per_token
from .registry import baseline


def _scores(q: Tensor, kv: Tensor, weights: Tensor) -> Tensor:
    """[S, N] from q [S, H, D], kv [N, D] and weights [S, H]; bf16 holds e4m3 exactly."""
    fast = torch.bfloat16 if q.is_cuda else torch.float32
    products = torch.einsum("shd,nd->shn", q.to(fast), kv.to(fast))
    return torch.einsum("shn,sh->sn", products.relu().float(), weights)


@baseline
def mqa_logits(q, kv, kv_scale, weights, starts, ends) -> Tensor:
    """Two einsums of what is dequantised, a mask; 128 queries at a time."""
    key = torch.arange(len(kv), device=q.device)
    logits = q.new_empty(len(q), len(kv), dtype=torch.float32)
    for s in range(0, len(q), 128):  # the products of all queries would not fit
        part = slice(s, s + 128)
        logits[part] = _scores(q[part], kv, weights[part]) * kv_scale
    unseen = (key < starts[:, None]) | (key >= ends[:, None])
    return logits.masked_fill_(unseen, -math.inf)


def _pages(cache: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [blocks, page, D] in fp32 and their scales [blocks, page]."""
    blocks, page, _, width = cache.shape
    whole = cache.reshape(blocks, page * width)
    values, scales = whole[:, : page * (width - 4)], whole[:, page * (width - 4) :]
    values = values.contiguous().view(FP8).view(blocks, page, width - 4)
    return values, scales.contiguous().view(torch.float32)


@baseline
def paged_mqa_logits(q, cache, weights, context_lens, block_table, max_context_len) -> Tensor:
    """Gather the pages, two einsums, a mask; a sequence at a time."""
    B, next_n = q.shape[:2]
    values, scales = _pages(cache)
    present = (block_table >= 0) & (block_table < len(values))
    table = block_table.clamp(0, max(len(values) - 1, 0))
    lengths = context_lens
    if lengths.dim() == 1:
        lengths = lengths[:, None] - next_n + 1 + torch.arange(next_n, device=q.device)
    capacity = table.shape[1] * cache.shape[1]
    key = torch.arange(max_context_len, device=q.device)
    out = q.new_full((B, next_n, max_context_len), -math.inf, dtype=torch.float32)
    n = min(capacity, max_context_len)
    for b in range(B):
        kv = values[table[b]].flatten(0, 1)[:n]
        logits = _scores(q[b], kv, weights[b * next_n : (b + 1) * next_n])
        logits = logits * scales[table[b]].flatten()[:n]
        seen = (key[:n] < lengths[b][:, None]) & present[b].repeat_interleave(cache.shape[1])[:n]
        out[b, :, :n] = logits.masked_fill(~seen, -math.inf)
    return out.flatten(0, 1)


@baseline
def indexer_cache_append(k, cache, slot_mapping, scale_format="fp32") -> None:
    """amax, divide, cast and index_put, op by op."""
    blocks, page, _, width = cache.shape
    kept = (slot_mapping >= 0) & (slot_mapping < blocks * page)
    k, slot = k[kept].float(), slot_mapping[kept]
    scale = k.abs().amax(1, keepdim=True).clamp(min=1e-4) / 448 if len(k) else k[:, :1]
    if scale_format == "ue8m0":
        scale = torch.exp2(scale.log2().ceil())
    q = (k * (1 / scale)).clamp(-448, 448).to(FP8)
    whole = cache.view(blocks, page * width) if cache.is_contiguous() else cache.as_strided(
        (blocks, page * width), (cache.stride(0), 1))  # fmt: skip
    first, D = slot % page, width - 4
    at = (first * D)[:, None] + torch.arange(D, device=k.device)
    whole[(slot // page)[:, None], at] = q.view(torch.uint8)
    at = (page * D + first * 4)[:, None] + torch.arange(4, device=k.device)
    whole[(slot // page)[:, None], at] = scale.view(torch.uint8)


def unpack(cache: Tensor) -> Tensor:
    """Every key of an indexer's cache in fp32: [blocks, page, D]."""
    values, scales = _pages(cache)
    return values.float() * scales[..., None]


@baseline
def topk_indices(logits, k, lengths=None) -> Tensor:
    """torch.topk of masked logits."""
    N = logits.shape[1]
    if lengths is not None:
        absent = torch.arange(N, device=logits.device) >= lengths[:, None]
        logits = logits.masked_fill(absent, -math.inf)
    values, places = logits.topk(min(k, N), sorted=False)
    if lengths is not None:
        places = places.masked_fill(values == -math.inf, -1)
    return torch.nn.functional.pad(places.int(), (0, k - min(k, N)), value=-1)


@baseline
def hadamard_transform(x, scale=1.0) -> Tensor:
    """A product with the Hadamard matrix, kept beside."""
    N = x.shape[-1]
    return (x.float() @ matrix(N, x.device) * scale).to(x.dtype)


@baseline
def hadamard_cast(x, scale=1.0, scale_format="fp32") -> tuple[Tensor, Tensor]:
    """A product with the Hadamard matrix, amax, divide and cast."""
    rotated = x.float() @ matrix(x.shape[-1], x.device) * scale
    return cast_per_token(rotated, scale_format)


_MATRICES: dict[tuple, Tensor] = {}


def matrix(N: int, device: torch.device) -> Tensor:
    """The Hadamard matrix of this size."""
    if (N, device) not in _MATRICES:
        rows = torch.ones(min(N, 1), min(N, 1), device=device)
        while len(rows) < N:
            rows = torch.cat((torch.cat((rows, rows), 1), torch.cat((rows, -rows), 1)))
        _MATRICES[N, device] = rows
    return _MATRICES[N, device]
