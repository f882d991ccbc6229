"""Inputs, sizes, cost and baseline of indexer_cache_append."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from ..caches import empty_indexer_cache, indexer_pages
from ..costs import Cost, row_bytes, tensor_bytes
from . import Sizes

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


def inputs(
    generator: Generator, T: int, D: int = 128, page: int = 64, dtype: torch.dtype = BF16
) -> tuple:
    device = generator.device
    scale = torch.exp2(torch.randn(T, 1, generator=generator, device=device).mul_(2))
    k = (torch.randn(T, D, generator=generator, device=device) * scale).to(dtype)
    blocks = -(-T // page) + 1
    slot = torch.randperm(blocks * page, generator=generator, device=device)[:T]
    slot[1::7] = -1
    return k, empty_indexer_cache(generator, blocks, page, D), slot


SIZES = Sizes(
    small=[
        {"T": 11},
        {"T": 5, "D": 130, "page": 3, "dtype": torch.float32},
        {"T": 6, "D": 7, "page": 1, "dtype": torch.float16},
        {"T": 0},
    ],
    cpu=[{"T": 4096}],
    gpu=[{"T": 128}, {"T": 8192}],
    inspect=[{"T": 8192}],
)
EXACT = True


def cost(k: Tensor, cache: Tensor, slot_mapping: Tensor, **rest) -> Cost:
    written = int((slot_mapping >= 0).sum()) * row_bytes(cache)
    return Cost(tensor_bytes(k, slot_mapping) + written)


def baseline(k, cache, slot_mapping, scale_format="fp32") -> None:
    """amax, divide, cast and index_put, op by op."""
    blocks, page, _, width = cache.shape
    valid = (slot_mapping >= 0) & (slot_mapping < blocks * page)
    k, slot = k[valid].float(), slot_mapping[valid]
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


def readable(output: Tensor, **rest) -> Tensor:
    """Every key of the cache in fp32: [blocks, page, D]."""
    if output.dtype != torch.uint8:
        return output
    keys, scales = indexer_pages(output)
    return keys.float() * scales[..., None]
