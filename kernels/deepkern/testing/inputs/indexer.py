"""Inputs of the indexer's ops (the attention family)."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from deepkern import reference

from . import Sizes
from .attention import ABSENT, BF16


def mqa_logits(
    generator: Generator, S: int, Skv: int, H: int = 64, D: int = 128, causal: bool = True
) -> tuple:
    """The last S of Skv tokens see those up to themselves, or each a random range."""
    device = generator.device

    def randn(*shape):
        return torch.randn(shape, generator=generator, device=device)

    q = randn(S, H, D).to(torch.float8_e4m3fn)
    kv, kv_scale = randn(Skv, D).to(torch.float8_e4m3fn), randn(Skv).abs()
    starts = torch.zeros(S, dtype=torch.int32, device=device)
    ends = torch.arange(Skv - S + 1, Skv + 1, dtype=torch.int32, device=device)
    if not causal:
        starts = torch.randint(0, Skv + 1, (S,), generator=generator, device=device).int()
        ends = torch.randint(0, Skv + 1, (S,), generator=generator, device=device).int()
    return q, kv, kv_scale, randn(S, H), starts, ends


def hadamard_transform(generator: Generator, M: int, N: int, dtype: torch.dtype = BF16) -> tuple:
    x = torch.randn(M, N, generator=generator, device=generator.device)
    return x.to(dtype), max(N, 1) ** -0.5


hadamard_cast = hadamard_transform


def indexer_cache(generator: Generator, blocks: int, page: int, D: int) -> Tensor:
    """A cache of the indexer in which every byte is that of NaN, pages a few bytes apart."""
    pitch = page * (D + 4) + 16
    buffer = torch.full((blocks, pitch), 0xFF, dtype=torch.uint8, device=generator.device)
    return buffer.as_strided((blocks, page, 1, D + 4), (pitch, D + 4, D + 4, 1))


def indexer_cache_append(
    generator: Generator, T: int, D: int = 128, page: int = 64, dtype: torch.dtype = BF16
) -> tuple:
    device = generator.device
    scale = torch.exp2(torch.randn(T, 1, generator=generator, device=device).mul_(2))
    k = (torch.randn(T, D, generator=generator, device=device) * scale).to(dtype)
    blocks = -(-T // page) + 1
    slot = torch.randperm(blocks * page, generator=generator, device=device)[:T]
    slot[1::7] = -1
    return k, indexer_cache(generator, blocks, page, D), slot


def paged_mqa_logits(
    generator: Generator,
    lengths: tuple[int, ...] | list[int],
    next_n: int = 1,
    H: int = 64,
    D: int = 128,
    page: int = 64,
    width: int = 0,
    each: bool = False,
) -> tuple:
    """`lengths` random tokens in shuffled pages, NaN elsewhere; a result of `width` columns more.

    each: a length for every query.
    """
    device, B = generator.device, len(lengths)
    used = [-(-n // page) for n in lengths]
    P = max(used, default=0) + 1
    cache = indexer_cache(generator, sum(used) + 1, page, D)
    order = torch.randperm(sum(used) + 1, generator=generator, device=device).int()
    table = torch.full((B, P), ABSENT, dtype=torch.int32, device=device)
    for b, n in enumerate(lengths):
        table[b, : used[b]], order = order[: used[b]], order[used[b] :]
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


def topk_indices(
    generator: Generator,
    S: int,
    N: int,
    k: int,
    dtype: torch.dtype = torch.float32,
    ragged: bool = False,
) -> tuple:
    """Logits with ties: a quarter of them are rounded to a few values."""
    device = generator.device
    logits = torch.randn(S, N, generator=generator, device=device)
    logits[:, ::4] = logits[:, ::4].round()
    if not ragged:
        return logits.to(dtype), k, None
    lengths = torch.randint(0, N + 1, (S,), generator=generator, device=device).int()
    return logits.to(dtype), k, lengths


SIZES = {
    "hadamard_cast": Sizes(
        small=[
            {"M": 40, "N": 128},
            {"M": 3, "N": 1, "dtype": torch.float32},
            {"M": 3, "N": 1024, "dtype": torch.float16},
            {"M": 0, "N": 128},
            {"M": 2, "N": 0},
        ],
        cpu=[{"M": 8192, "N": 128}],
        gpu=[{"M": 64 * 4096, "N": 128}],
        inspect=[{"M": 64 * 4096, "N": 128}],
    ),
    "hadamard_transform": Sizes(
        small=[
            {"M": 40, "N": 128},
            {"M": 3, "N": 1, "dtype": torch.float32},
            {"M": 5, "N": 16, "dtype": torch.float16},
            {"M": 2, "N": 8192},
            {"M": 0, "N": 128},
            {"M": 2, "N": 0},
        ],
        cpu=[{"M": 8192, "N": 128}],
        gpu=[{"M": 64 * 4096, "N": 128}, {"M": 4096, "N": 8192}],
        inspect=[{"M": 64 * 4096, "N": 128}, {"M": 4096, "N": 32768}],
    ),
    "indexer_cache_append": Sizes(
        small=[
            {"T": 11},
            {"T": 5, "D": 130, "page": 3, "dtype": torch.float32},
            {"T": 6, "D": 7, "page": 1, "dtype": torch.float16},
            {"T": 0},
        ],
        cpu=[{"T": 4096}],
        gpu=[{"T": 128}, {"T": 8192}],
        inspect=[{"T": 8192}],
    ),
    "mqa_logits": Sizes(
        small=[
            {"S": 6, "Skv": 70, "H": 3, "D": 32},
            {"S": 3, "Skv": 150, "H": 64, "D": 128, "causal": False},
            {"S": 2, "Skv": 40, "H": 5, "D": 200},
            {"S": 0, "Skv": 9, "H": 2, "D": 16},
            {"S": 3, "Skv": 0, "H": 2, "D": 16},
            {"S": 3, "Skv": 4, "H": 0, "D": 16},
        ],
        cpu=[{"S": 64, "Skv": 2048}],
        gpu=[
            {"S": 2048, "Skv": 4096},
            {"S": 4096, "Skv": 8192},
            {"S": 4096, "Skv": 32768},
        ],
        inspect=[{"S": 2048, "Skv": 4096}, {"S": 2048, "Skv": 4096, "D": 256}],
    ),
    "paged_mqa_logits": Sizes(
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
    ),
    "topk_indices": Sizes(
        small=[
            {"S": 3, "N": 50, "k": 8, "ragged": True},
            {"S": 2, "N": 3000, "k": 700, "dtype": BF16},
            {"S": 1, "N": 40000, "k": 2048, "ragged": True},
            {"S": 2, "N": 5, "k": 9},
            {"S": 0, "N": 5, "k": 2},
            {"S": 2, "N": 0, "k": 3},
            {"S": 2, "N": 5, "k": 0},
        ],
        cpu=[{"S": S, "N": N, "k": 2048} for S in (1, 64) for N in (32768, 131072)],
        gpu=[{"S": S, "N": N, "k": 2048} for S in (1, 64, 4096) for N in (32768, 131072)],
        inspect=[
            {"S": 64, "N": 32768, "k": 2048},
            {"S": 64, "N": 4096, "k": 512, "dtype": BF16},
            {"S": 64, "N": 1024, "k": 64, "ragged": True},
        ],
    ),
}
