"""Paged caches for tests and benchmarks: the latent cache of attention and the indexer's cache."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from .. import reference

BF16, FP8_BYTES = torch.bfloat16, torch.uint8
ABSENT = 2147480000  # the value of unused entries of a block table
FP32 = {"dtype": torch.float32, "cache_dtype": torch.float32}
FP8 = {"cache_dtype": FP8_BYTES}


def empty_cache(
    generator: Generator, blocks: int, page: int, R: int, D: int, dtype: torch.dtype = BF16
) -> Tensor:
    """A cache in which every token is NaN; its pages are one token apart in memory."""
    width = R + 4 * -(-R // 128) + 2 * D if dtype == FP8_BYTES else R + D
    fill = 0xFF if dtype == FP8_BYTES else torch.nan  # bytes of ones are NaN in each of its types
    cache = torch.full((blocks, page + 1, 1, width), fill, dtype=dtype, device=generator.device)
    return cache[:, :page]


def paged_cache(
    generator: Generator,
    lengths: Tensor,
    page: int,
    R: int,
    D: int,
    dtype: torch.dtype = BF16,
    width: int | None = None,
) -> tuple[Tensor, Tensor]:
    """A cache of `lengths` random tokens in shuffled pages, NaN elsewhere, and its block table.

    The table has at least `width` columns.
    """
    device = generator.device
    pages = (lengths.long() + page - 1) // page
    num_pages, P = int(pages.sum()), max(int(pages.max()) if len(pages) else 0, width or 1)
    cache = empty_cache(generator, num_pages + 1, page, R, D, dtype)
    order = torch.randperm(num_pages + 1, generator=generator, device=device).int()[:num_pages]
    table = torch.full((len(lengths), P), ABSENT, dtype=torch.int32, device=device)
    table[torch.arange(P, device=device) < pages[:, None]] = order
    token = torch.arange(P * page, device=device)
    slot = table.repeat_interleave(page, dim=1).long() * page + token % page
    slot = slot[token < lengths[:, None]]
    n = slot.numel()
    latent = torch.randn(n, R, generator=generator, device=device)
    k_rope = torch.randn(n, D, generator=generator, device=device)
    reference.mla_cache_append(latent, k_rope, cache, slot)
    return cache, table


def gather_pages(cache: Tensor, block_table: Tensor, v_head_dim: int, dtype: torch.dtype) -> Tensor:
    """The cached tokens of every sequence in order: [B, P * page, R + D] in `dtype`."""
    blocks, page = cache.shape[:2]
    B, P = block_table.shape
    block = block_table.long().clamp(0, max(blocks - 1, 0))
    entries = cache.flatten(2)[block].reshape(B, P * page, cache.shape[-1])
    if cache.dtype != FP8_BYTES:
        return entries.to(dtype)
    return unpack(entries, v_head_dim).to(dtype)


def unpack(entries: Tensor, R: int) -> Tensor:
    """FP8-format entries [..., bytes] -> fp32 [..., R + D]."""
    scales = R + 4 * -(-R // 128)
    latent = entries[..., :R].contiguous().view(torch.float8_e4m3fn).float()
    scale = entries[..., R:scales].contiguous().view(torch.float32).repeat_interleave(128, -1)
    rope = entries[..., scales:].contiguous().view(BF16).float()
    return torch.cat([latent * scale[..., :R], rope], -1)


def empty_indexer_cache(generator: Generator, blocks: int, page: int, D: int) -> Tensor:
    """A cache of the indexer in which every byte is 0xFF (NaN); its pages are 16 bytes apart."""
    pitch = page * (D + 4) + 16
    buffer = torch.full((blocks, pitch), 0xFF, dtype=torch.uint8, device=generator.device)
    return buffer.as_strided((blocks, page, 1, D + 4), (pitch, D + 4, D + 4, 1))


def indexer_pages(cache: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 keys [blocks, page, D] of an indexer's cache and their scales, fp32 [blocks, page]."""
    blocks, page, _, width = cache.shape
    whole = cache.reshape(blocks, page * width)
    keys, scales = whole[:, : page * (width - 4)], whole[:, page * (width - 4) :]
    keys = keys.contiguous().view(torch.float8_e4m3fn).view(blocks, page, width - 4)
    return keys, scales.contiguous().view(torch.float32)
