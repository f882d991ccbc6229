"""Inputs of the sparse attention ops (the attention family)."""

from __future__ import annotations

import torch
from torch import Generator

from deepkern import reference

from . import Sizes
from .attention import BF16, FP8, FP32, paged


def mla_sparse_decode(
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
    """Indices into `tokens` shuffled slots, with holes a ninth of them -1; other slots are NaN."""
    device = generator.device
    seqlens = torch.tensor([tokens], dtype=torch.int32, device=device)
    cache, table = paged(generator, seqlens, page, R, D, cache_dtype)
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


def mla_sparse_prefill(
    generator: Generator,
    S: int = 3,
    Skv: int = 50,
    H: int = 16,
    topk: int = 32,
    R: int = 512,
    D: int = 64,
    dtype: torch.dtype = BF16,
    lengths: bool = False,
    sink: bool = False,
    holes: bool = True,
) -> tuple:
    """Random indices, with holes a ninth of them -1."""
    device = generator.device
    indices = torch.randint(0, max(Skv, 1), (S, 1, topk), generator=generator, device=device).int()
    if holes:
        hole = torch.randint(0, 9, indices.shape, generator=generator, device=device) == 0
        indices.masked_fill_(hole, -1)
    q = torch.randn(S, H, R + D, generator=generator, device=device).to(dtype)
    kv = torch.randn(Skv, 1, R + D, generator=generator, device=device).to(dtype)
    topk_length, attn_sink = None, None
    if lengths:
        topk_length = torch.randint(0, topk + 1, (S,), generator=generator, device=device).int()
    if sink:
        attn_sink = torch.randn(H, generator=generator, device=device).mul_(3)
    return q, kv, indices, (R + D) ** -0.5, R, attn_sink, topk_length


def mla_sparse_prefill_backward(generator: Generator, grad_lse: bool = False, **size) -> tuple:
    args = mla_sparse_prefill(generator, **size)
    q, kv, indices, scale, R, attn_sink, topk_length = args
    out, _, lse = reference.mla_sparse_prefill(*args)
    grad_out = torch.randn(out.shape, generator=generator, device=q.device).to(q.dtype)
    slope = torch.randn(lse.shape, generator=generator, device=q.device) if grad_lse else None
    return grad_out, slope, q, kv, indices, out, lse, scale, attn_sink, topk_length


OPTIONS = {"lengths": True, "sink": True}
V32 = {"topk": 2048, "tokens": 32768}

SIZES = {
    "mla_sparse_decode": Sizes(
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
    ),
    "mla_sparse_prefill": Sizes(
        small=[
            {"H": 3, "R": 64, "D": 16, **OPTIONS},
            {"S": 2, "H": 2, "topk": 70, "R": 32, "D": 16, "dtype": torch.float32, "sink": True},
            {"S": 2, "H": 9},
            {"S": 2, "H": 5, "R": 130, "D": 6, "dtype": torch.float16, "lengths": True},
            {"S": 2, "H": 1, "R": 64, "D": 0, "dtype": torch.float32},
            {"S": 2, "H": 2, "topk": 0, "R": 32, "D": 16, **OPTIONS},
            {"S": 2, "H": 2, "Skv": 0, "R": 32, "D": 16, **OPTIONS},
            {"S": 0},
            {"H": 0},
        ],
        cpu=[{"S": 16, "Skv": 1024, "topk": 256}],
        gpu=[
            {"S": 4096, "Skv": 8192, "H": 128, "topk": 2048},
            {"S": 4096, "Skv": 32768, "H": 128, "topk": 2048},
            {"S": 4096, "Skv": 8192, "H": 64, "topk": 2048, **OPTIONS},
            {"S": 4096, "Skv": 8192, "H": 16, "topk": 2048},
        ],
        inspect=[
            {"H": 16, "topk": 2048},
            {"H": 128, "topk": 2048, **OPTIONS},
        ],
    ),
    "mla_sparse_prefill_backward": Sizes(
        small=[
            {"S": 4, "H": 9, "R": 64, "D": 16, "grad_lse": True, **OPTIONS},
            {"S": 2, "H": 2, "topk": 70, "R": 32, "D": 16, "dtype": torch.float32, "sink": True},
            {"H": 16, "Skv": 20},
            {"S": 2, "H": 5, "Skv": 9, "R": 130, "D": 6, "dtype": torch.float16, "lengths": True},
            {"S": 2, "H": 1, "Skv": 20, "R": 64, "D": 0, "dtype": torch.float32},
            {"S": 2, "H": 2, "topk": 0, "R": 32, "D": 16, "grad_lse": True, **OPTIONS},
            {"S": 2, "H": 2, "Skv": 0, "R": 32, "D": 16, **OPTIONS},
            {"S": 0},
            {"H": 0},
        ],
        cpu=[{"S": 16, "Skv": 1024, "topk": 256}],
        gpu=[
            {"S": 4096, "Skv": 8192, "H": 128, "topk": 2048},
            {"S": 4096, "Skv": 8192, "H": 64, "topk": 2048, **OPTIONS},
        ],
        inspect=[
            {"S": 1, "H": 16, "topk": 64},
            {"S": 1, "H": 128, "topk": 64, "grad_lse": True, **OPTIONS},
        ],
    ),
}
