"""Inputs, sizes, cost and baseline of mla_sparse_decode."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Generator, Tensor

from ..caches import BF16, FP8, FP32, paged_cache, unpack
from ..costs import Cost, row_bytes, tensor_bytes
from ..providers import Provider, library
from ..sparse_attention import OPTIONS, attend, count_tokens, flash_mla_serves, token_mask
from . import Sizes
from .mla_decode import flash_mla_outputs

V32 = {"topk": 2048, "tokens": 32768}


def inputs(
    generator: Generator,
    B: int = 2,
    Sq: int = 1,
    H: int = 16,
    topk: int = 64,
    tokens: int = 100,
    R: int = 512,
    D: int = 64,
    page: int = 64,
    dtype: torch.dtype = BF16,
    cache_dtype: torch.dtype = BF16,
    lengths: bool = False,
    sink: bool = False,
    holes: bool = True,
) -> tuple:
    """Indices of `tokens` shuffled slots; with `holes`, a ninth is -1. Other slots are NaN."""
    device = generator.device
    seqlens = torch.tensor([tokens], dtype=torch.int32, device=device)
    cache, table = paged_cache(generator, seqlens, page, R, D, cache_dtype)
    token = torch.randint(0, max(tokens, 1), (B, Sq, topk), generator=generator, device=device)
    indices = table[0, token // page] * page + (token % page).int()
    if holes:
        hole = torch.randint(0, 9, (B, Sq, topk), generator=generator, device=device) == 0
        indices.masked_fill_(hole, -1)
    q = torch.randn(B, Sq, H, R + D, generator=generator, device=device).to(dtype)
    topk_length, attn_sink = None, None
    if lengths:
        topk_length = torch.randint(0, topk + 1, (B,), generator=generator, device=device).int()
    if sink:
        attn_sink = torch.randn(H, generator=generator, device=device).mul_(3)
    return q, cache, indices, (R + D) ** -0.5, topk_length, attn_sink, R


SIZES = Sizes(
    small=[
        {"Sq": 2, "H": 3, "topk": 40, "R": 64, "D": 16, "page": 16, **OPTIONS},
        {"H": 2, "B": 1, "topk": 600, "R": 32, "D": 16, "page": 53, **FP32, "sink": True},
        {"B": 1},
        {"B": 1, "H": 9, "topk": 65, **FP8, **OPTIONS},
        {"Sq": 2, "H": 5, "topk": 33, "tokens": 20, "R": 130, "D": 6, "page": 2, **FP8},
        {"H": 1, "topk": 7, "R": 64, "D": 0, "page": 1, "sink": True, **FP32},
        {"topk": 0, "R": 32, "D": 16, **OPTIONS},
        {"tokens": 0, "topk": 5, "R": 32, "D": 16, **OPTIONS},
        {"H": 0},
        {"B": 0},
    ],
    cpu=[{"B": 4, "topk": 512, "tokens": 4096}],
    gpu=[
        {"B": 128, "Sq": 2, "H": 128, **V32, **FP8},
        {"B": 128, "Sq": 2, "H": 64, **V32, **FP8},
        {"B": 128, "Sq": 2, "H": 16, **V32, **FP8},
        {"B": 2, "H": 128, **V32, **FP8},
        {"B": 128, "Sq": 2, "H": 128, **V32},
    ],
    inspect=[
        {"H": 16, **V32},
        {"H": 128, **V32},
        {"H": 16, **V32, **FP8, **OPTIONS},
        {"H": 128, **V32, **FP8, **OPTIONS},
    ],
)
EXACT = False


def cost(q, cache, indices, topk_length, v_head_dim, result, **rest) -> Cost:
    """Reads a token once for each query that names it."""
    tokens = count_tokens(indices, cache.shape[0] * cache.shape[1], topk_length)
    moved = tokens * row_bytes(cache) + tensor_bytes(q, indices, result)
    return Cost(moved, tokens * 2 * q.shape[2] * (q.shape[3] + v_head_dim))


def baseline(
    q, cache, indices, softmax_scale, topk_length=None, attn_sink=None, v_head_dim=512
) -> tuple[Tensor, None]:
    """Gather the named tokens, SDPA with the heads as rows."""
    page = cache.shape[1]
    mask = token_mask(indices, cache.shape[0] * page, topk_length)
    slot = indices.long().masked_fill(~mask, 0)
    entries = cache[slot // page, slot % page, 0]  # [B, Sq, topk, width]
    tokens = unpack(entries, v_head_dim) if cache.dtype == torch.uint8 else entries
    rows = (x.flatten(0, 1) for x in (q, tokens.to(q.dtype), mask))
    out = attend(*rows, softmax_scale, v_head_dim, attn_sink)
    return out.view(*q.shape[:3], v_head_dim), None


def providers(**arguments) -> list[Provider]:
    q, cache, R = (arguments[name] for name in ("q", "cache", "v_head_dim"))
    if not flash_mla_serves(q, R) or cache.dtype != torch.uint8:
        return []
    return library(
        "flash_mla", "FlashMLA's flash_mla_with_kvcache, FP8 cache, with indices",
        lambda module: flash_mla(module, **arguments), outputs=flash_mla_outputs,
    )  # fmt: skip


def flash_mla(
    module: ModuleType, q, cache, indices, softmax_scale, topk_length, attn_sink, v_head_dim, **rest
) -> Callable[[], object]:
    plan, _ = module.get_mla_metadata()
    cache = cache.contiguous()
    return lambda: module.flash_mla_with_kvcache(
        q, cache, None, None, v_head_dim, plan, softmax_scale=softmax_scale,
        is_fp8_kvcache=True, indices=indices, attn_sink=attn_sink, topk_length=topk_length,
    )  # fmt: skip
