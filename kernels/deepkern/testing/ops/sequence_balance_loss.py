"""Inputs, sizes, cost and baseline of sequence_balance_loss."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from ..costs import each_tensor_once
from ..routing import indices, router_scores
from . import Sizes

BF16 = torch.bfloat16


def inputs(
    generator: Generator, B: int, S: int, E: int, topk: int, score: str = "sigmoid",
    dtype: torch.dtype = torch.float32, none: float = 0.1,
) -> tuple:  # fmt: skip
    logits = torch.randn(B, S, E, generator=generator, device=generator.device) * 3
    return logits.to(dtype), indices(generator, B * S, E, topk, none).view(B, S, topk), score, 1e-4


SIZES = Sizes(
    small=[
        {"B": 3, "S": 37, "E": 10, "topk": 3},
        {"B": 2, "S": 5, "E": 256, "topk": 8, "score": "softmax", "dtype": BF16},
        {"B": 1, "S": 70, "E": 64, "topk": 6, "score": "sqrtsoftplus"},
        {"B": 2, "S": 1, "E": 1, "topk": 1, "dtype": torch.float16},
        {"B": 0, "S": 4, "E": 8, "topk": 2},
        {"B": 2, "S": 0, "E": 8, "topk": 2},
        {"B": 2, "S": 4, "E": 8, "topk": 0},
    ],
    cpu=[{"B": 2, "S": 512, "E": 256, "topk": 8}],
    gpu=[{"B": 4, "S": 4096, "E": 256, "topk": 8}],
    inspect=[
        {"B": 4, "S": 4096, "E": 256, "topk": 8},
        {"B": 4, "S": 4096, "E": 160, "topk": 6, "score": "softmax"},
        {"B": 4, "S": 4096, "E": 256, "topk": 6, "score": "sqrtsoftplus"},
    ],
)
EXACT = False
cost = each_tensor_once


def baseline(logits, topk_idx, score="sigmoid", alpha=1e-4) -> Tensor:
    """scores, scatter_add, means, product."""
    (B, S, E), topk = logits.shape, topk_idx.shape[2]
    if logits.numel() == 0 or topk == 0:
        return logits.float().sum() * 0.0
    valid = (topk_idx >= 0) & (topk_idx < E)
    chosen = torch.zeros(B, E, device=logits.device).scatter_add_(
        1, topk_idx.where(valid, 0).flatten(1).long(), valid.float().flatten(1)
    )
    s = router_scores(logits, score)
    mean_score = (s / s.sum(-1, keepdim=True)).mean(1)
    return alpha * (chosen * (E / (topk * S)) * mean_score).sum(1).mean()
