"""Inputs, sizes, cost and baseline of paged_mqa_logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Generator, Tensor

from ... import reference
from ..caches import ABSENT, empty_indexer_cache, indexer_pages
from ..costs import Cost, row_bytes, tensor_bytes
from ..providers import Provider, library
from . import Sizes
from .mqa_logits import weighted_scores


def inputs(
    generator: Generator,
    lengths: tuple[int, ...] | list[int],
    next_n: int = 1,
    H: int = 64,
    D: int = 128,
    page: int = 64,
    width: int = 0,
    each: bool = False,
) -> tuple:
    """`lengths` random tokens in shuffled pages, NaN elsewhere; `width` more columns of output.

    each: one length per query.
    """
    device, B = generator.device, len(lengths)
    num_pages = [-(-n // page) for n in lengths]
    P = max(num_pages, default=0) + 1
    cache = empty_indexer_cache(generator, sum(num_pages) + 1, page, D)
    order = torch.randperm(sum(num_pages) + 1, generator=generator, device=device).int()
    table = torch.full((B, P), ABSENT, dtype=torch.int32, device=device)
    for b, n in enumerate(lengths):
        table[b, : num_pages[b]], order = order[: num_pages[b]], order[num_pages[b] :]
        token = torch.arange(n, device=device)
        slot = table[b].long()[token // page] * page + token % page
        k = torch.randn(n, D, generator=generator, device=device)
        reference.indexer_cache_append(k, cache, slot)
    q = torch.randn(B, next_n, H, D, generator=generator, device=device).to(torch.float8_e4m3fn)
    weights = torch.randn(B * next_n, H, generator=generator, device=device)
    context = torch.tensor(lengths, dtype=torch.int32, device=device)
    if each:
        context = (context[:, None] - torch.arange(next_n, device=device).flip(0)).clamp(0).int()
    return q, cache, weights, context, table, max(lengths, default=0) + width


SIZES = Sizes(
    small=[
        {"lengths": (37, 0, 90), "next_n": 2, "H": 3, "D": 32, "page": 16, "width": 9},
        {"lengths": (70, 3), "page": 64, "width": 600},
        {"lengths": (33,), "next_n": 3, "H": 5, "D": 130, "page": 3, "each": True},
        {"lengths": ()},
        {"lengths": (4,), "H": 0},
        {"lengths": (4,), "next_n": 0},
    ],
    cpu=[{"lengths": (4096,) * 4}],
    gpu=[
        {"lengths": (n,) * B, "next_n": next_n}
        for B, n in ((64, 8192), (64, 65536), (128, 32768))
        for next_n in (1, 2)
    ],
    inspect=[{"lengths": (4096,)}, {"lengths": (4096,), "next_n": 2, "each": True}],
)
EXACT = False
FP8_PRODUCT = True


def cost(q, cache, weights, context_lens, block_table, max_context_len, result, **rest) -> Cost:
    """Reads each token that a sequence's queries see once."""
    lengths = context_lens.clamp(0, block_table.shape[1] * cache.shape[1]).long()
    lengths = visible(q, lengths).clamp(0, max_context_len)
    tokens = int(lengths.amax(1).sum()) if lengths.numel() else 0
    moved = tokens * row_bytes(cache) + tensor_bytes(q, weights, context_lens, block_table, result)
    return Cost(moved, 2 * q.shape[2] * q.shape[3] * int(lengths.sum()), fp8=True)


def baseline(q, cache, weights, context_lens, block_table, max_context_len) -> Tensor:
    """Gather the pages, two einsums, a mask; a sequence at a time."""
    B, next_n = q.shape[:2]
    values, scales = indexer_pages(cache)
    in_table = (block_table >= 0) & (block_table < len(values))
    table = block_table.clamp(0, max(len(values) - 1, 0))
    lengths = visible(q, context_lens)
    capacity = table.shape[1] * cache.shape[1]
    key = torch.arange(max_context_len, device=q.device)
    out = q.new_full((B, next_n, max_context_len), -math.inf, dtype=torch.float32)
    n = min(capacity, max_context_len)
    for b in range(B):
        kv = values[table[b]].flatten(0, 1)[:n]
        logits = weighted_scores(q[b], kv, weights[b * next_n : (b + 1) * next_n])
        logits = logits * scales[table[b]].flatten()[:n]
        mask = (key[:n] < lengths[b][:, None]) & in_table[b].repeat_interleave(cache.shape[1])[:n]
        out[b, :, :n] = logits.masked_fill(~mask, -math.inf)
    return out.flatten(0, 1)


def providers(**arguments) -> list[Provider]:
    def outputs(logits: Tensor) -> tuple[Tensor]:
        """Without what DeepGEMM leaves after the tokens of a query."""
        lengths = visible(arguments["q"], arguments["context_lens"]).flatten()[:, None]
        key = torch.arange(logits.shape[1], device=logits.device)
        return (logits.masked_fill(key >= lengths, -math.inf),)

    return library(
        "deep_gemm", "DeepGEMM's fp8_paged_mqa_logits, logits not cleaned, schedule made before",
        lambda module: deep_gemm(module, **arguments), outputs=outputs,
    )  # fmt: skip


def visible(q: Tensor, context_lens: Tensor) -> Tensor:
    """How many tokens each query sees: [B, next_n]."""
    if context_lens.dim() == 2:
        return context_lens
    later = torch.arange(q.shape[1] - 1, -1, -1, device=context_lens.device)
    return context_lens[:, None] - later


def deep_gemm(
    module: ModuleType, q, cache, weights, context_lens, block_table, max_context_len, **rest
) -> Callable[[], Tensor]:
    cache, page = cache.contiguous(), cache.shape[1]
    table = block_table.masked_fill(block_table >= len(cache), 0)
    plan = module.get_paged_mqa_logits_metadata(context_lens, page, module.get_num_sms())
    return lambda: module.fp8_paged_mqa_logits(
        q, cache, weights, context_lens, table, plan, max_context_len
    )
