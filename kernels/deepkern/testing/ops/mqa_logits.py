"""Inputs, sizes, cost and baseline of mqa_logits."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from ..costs import Cost, tensor_bytes
from ..providers import Provider, library
from . import Sizes


def inputs(
    generator: Generator, S: int, Skv: int, H: int = 64, D: int = 128, causal: bool = True
) -> tuple:
    """The last S of Skv tokens; each sees all tokens up to itself, or a random range."""
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


SIZES = Sizes(
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
)
EXACT = False
FP8_PRODUCT = True


def cost(q: Tensor, kv: Tensor, starts: Tensor, ends: Tensor, **rest) -> Cost:
    first, last = (x.clamp(0, len(kv)).long() for x in (starts, ends))
    pairs = int((last - first).clamp(min=0).sum())
    moved = tensor_bytes(q, kv, starts, ends, rest)
    return Cost(moved, 2 * q.shape[1] * q.shape[2] * pairs, fp8=True)


def baseline(q, kv, kv_scale, weights, starts, ends) -> Tensor:
    """Dequantize, two einsums, a mask; 128 queries at a time."""
    key = torch.arange(len(kv), device=q.device)
    logits = q.new_empty(len(q), len(kv), dtype=torch.float32)
    for s in range(0, len(q), 128):  # the products of all queries would not fit
        part = slice(s, s + 128)
        logits[part] = weighted_scores(q[part], kv, weights[part]) * kv_scale
    masked = (key < starts[:, None]) | (key >= ends[:, None])
    return logits.masked_fill_(masked, -math.inf)


def weighted_scores(q: Tensor, kv: Tensor, weights: Tensor) -> Tensor:
    """[S, N] from q [S, H, D], kv [N, D] and weights [S, H]; bf16 holds e4m3 exactly."""
    fast = torch.bfloat16 if q.is_cuda else torch.float32
    products = torch.einsum("shd,nd->shn", q.to(fast), kv.to(fast))
    return torch.einsum("shn,sh->sn", products.relu().float(), weights)


def providers(q, kv, kv_scale, weights, starts, ends, **rest) -> list[Provider]:
    args = q, (kv, kv_scale), weights, starts, ends
    return library(
        "deep_gemm", "DeepGEMM's fp8_mqa_logits", lambda m: lambda: m.fp8_mqa_logits(*args)
    )
