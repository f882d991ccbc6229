"""Inputs, sizes, cost and baseline of mla_sparse_prefill."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Generator, Tensor

from ..costs import Cost, row_bytes, tensor_bytes
from ..providers import Provider, library
from ..sparse_attention import OPTIONS, attend, count_tokens, flash_mla_serves, token_mask
from . import Sizes

BF16 = torch.bfloat16


def inputs(
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
    """Random indices; with `holes`, a ninth is -1."""
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


SIZES = Sizes(
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
)
EXACT = False


def cost(q, kv, indices, v_head_dim, topk_length, result, **rest) -> Cost:
    """Reads a row of kv once for each query that names it."""
    tokens = count_tokens(indices, len(kv), topk_length)
    moved = tokens * row_bytes(kv) + tensor_bytes(q, indices, result)
    return Cost(moved, tokens * 2 * q.shape[1] * (q.shape[2] + v_head_dim))


def baseline(
    q, kv, indices, softmax_scale, v_head_dim=512, attn_sink=None, topk_length=None
) -> tuple[Tensor, None, None]:
    """Gather the named rows, SDPA with the heads as rows, 64 queries at a time."""
    mask = token_mask(indices, kv.shape[0], topk_length)[:, 0]
    out = q.new_empty(*q.shape[:2], v_head_dim)
    for i in range(0, len(q), 64):
        part = slice(i, i + 64)
        row = indices[part, 0].long().masked_fill(~mask[part], 0)
        tokens = kv[row, 0] if kv.shape[0] else kv.new_zeros(*row.shape, kv.shape[-1])
        out[part] = attend(q[part], tokens, mask[part], softmax_scale, v_head_dim, attn_sink)
    return out, None, None


def providers(**arguments) -> list[Provider]:
    """Only the output of FlashMLA is compared: releases differ in the base of its logarithms."""
    q = arguments["q"]
    if not flash_mla_serves(q, arguments["v_head_dim"]) or q.dtype != BF16:
        return []
    return library(
        "flash_mla", "FlashMLA's flash_mla_sparse_fwd",
        lambda module: flash_mla(module, **arguments),
        outputs=lambda result: (result[0], None, None),
    )  # fmt: skip


def flash_mla(
    module: ModuleType, q, kv, indices, softmax_scale, v_head_dim, attn_sink, topk_length, **rest
) -> Callable[[], object]:
    args = q, kv, indices, softmax_scale, v_head_dim, attn_sink, topk_length
    return lambda: module.flash_mla_sparse_fwd(*args)
