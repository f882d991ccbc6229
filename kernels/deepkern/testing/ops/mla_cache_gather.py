"""Inputs, sizes, cost and baseline of mla_cache_gather."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..caches import BF16, FP8, paged_cache, unpack
from ..costs import Cost, row_bytes, tensor_bytes
from . import Sizes


def inputs(
    generator: Generator,
    lengths: tuple[int, ...] | list[int],
    taken: tuple[int, ...] | None = None,
    R: int = 512,
    D: int = 64,
    page: int = 64,
    cache_dtype: torch.dtype = BF16,
    out_dtype: torch.dtype = BF16,
    more: int = 0,
) -> tuple:
    """The last `taken` tokens of each sequence (by default all, from 0 on), and `more` rows."""
    device = generator.device
    seqlens = torch.tensor(lengths, dtype=torch.int32, device=device)
    cache, table = paged_cache(generator, seqlens, page, R, D, cache_dtype)
    lengths_out = lengths if taken is None else taken
    counts = torch.tensor((0, *lengths_out), dtype=torch.int32, device=device)
    starts = None if taken is None else seqlens - counts[1:]
    offsets = counts.cumsum(0, dtype=torch.int32)
    return cache, table, offsets, sum(lengths_out) + more, R, starts, out_dtype


SIZES = Sizes(
    small=[
        {"lengths": (5, 0, 9), "taken": (3, 0, 9), "R": 64, "D": 16, "page": 4, "more": 3},
        {"lengths": (7, 20), "R": 192, "D": 8, "page": 16, **FP8},
        {"lengths": (7, 2), "R": 130, "D": 6, "page": 3, **FP8, "out_dtype": torch.float32},
        {"lengths": (5,), "R": 600, "D": 3, "page": 2, "cache_dtype": torch.float32},
        {"lengths": (3, 1), "R": 16, "D": 0, "page": 1, "out_dtype": torch.float16},
        {"lengths": (), "R": 16, "D": 4},
        {"lengths": (), "R": 16, "D": 4, "more": 3},
    ],
    cpu=[{"lengths": (1024,) * 4}, {"lengths": (1024,) * 4, **FP8}],
    gpu=[{"lengths": (4096,) * 16}, {"lengths": (4096,) * 16, **FP8}],
    inspect=[
        {"lengths": (4096,) * 2},
        {"lengths": (4096,) * 2, "taken": (2048,) * 2, **FP8},
    ],
)
EXACT = True


def cost(cache: Tensor, block_table: Tensor, cu_seqlens: Tensor, result, **rest) -> Cost:
    tokens = int(cu_seqlens[-1] - cu_seqlens[0])
    return Cost(tokens * row_bytes(cache) + tensor_bytes(block_table, cu_seqlens, result))


def baseline(
    cache, block_table, cu_seqlens, total_tokens, v_head_dim=512, starts=None, out_dtype=BF16
) -> Tensor:
    """Gather the pages of each sequence, slice, cat."""
    page, offsets = cache.shape[1], cu_seqlens.tolist()
    begins = [0] * len(block_table) if starts is None else starts.tolist()
    # An empty slice, so that the width is right without a sequence.
    rows = [cache[:0, 0, 0]]
    for b, begin in enumerate(begins):
        position = torch.arange(begin, begin + offsets[b + 1] - offsets[b], device=cache.device)
        rows.append(cache[block_table[b].long()[position // page], position % page, 0])
    tokens = torch.cat(rows)
    tokens = (unpack(tokens, v_head_dim) if cache.dtype == torch.uint8 else tokens).to(out_dtype)
    return F.pad(tokens, (0, 0, 0, total_tokens - len(tokens)))
