"""Inputs, sizes, cost and baseline of route_topk."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from ..costs import each_tensor_once
from ..routing import V2, V3, V3_TOKENS, router_scores
from . import Sizes

BF16 = torch.bfloat16


def inputs(
    generator: Generator,
    T: int,
    E: int,
    topk: int = 8,
    num_groups: int = 1,
    topk_groups: int = 1,
    score: str = "sigmoid",
    group_score: str = "top2",
    normalize: bool = True,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    biased: bool = True,
) -> tuple:
    """Logits in steps of 1/8, so that a token has equal scores."""
    device = generator.device
    logits = torch.randn(T, E, generator=generator, device=device) * 3
    logits = (logits * 8).round() / 8
    bias = torch.randn(E, generator=generator, device=device) * 0.1 if biased else None
    rule = topk, num_groups, topk_groups, score, group_score, normalize, scale
    return logits.to(dtype), bias, *rule


SIZES = Sizes(
    small=[
        {"T": 9, "E": 256, **V3},
        {"T": 70, "E": 10, "topk": 3, "num_groups": 5, "topk_groups": 2, **V2, "dtype": BF16},
        {"T": 5, "E": 160, "topk": 6, "num_groups": 8, "topk_groups": 3, "score": "softmax"},
        {"T": 33, "E": 64, "topk": 6, "score": "sqrtsoftplus", "biased": False},
        {"T": 3, "E": 1, "topk": 1, "dtype": torch.float16},
        {"T": 0, "E": 8, "topk": 2},
    ],
    cpu=[{"T": 512, "E": 256, **V3}],
    gpu=[{"T": T, "E": 256, **V3} for T in V3_TOKENS],
    inspect=[
        {"T": 4096, "E": 256, **V3},
        {"T": 4096, "E": 160, "topk": 6, "num_groups": 8, "topk_groups": 3, **V2},
        {"T": 4096, "E": 384, "topk": 6, "score": "sqrtsoftplus", "scale": 1.5},
        {"T": 4096, "E": 64, "topk": 6, **V2, "biased": False},
    ],
)
EXACT = True
cost = each_tensor_once


def baseline(
    logits, bias=None, topk=8, num_groups=1, topk_groups=1, score="sigmoid", group_score="top2",
    normalize=True, scale=1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scores, torch.topk of groups and of experts."""
    s = router_scores(logits, score)
    biased = s if bias is None else s + bias.float()
    if num_groups > 1:
        groups = biased.unflatten(1, (num_groups, -1))  # [T, G, E/G]
        best = 1 if group_score == "max" else min(2, groups.shape[2])
        chosen = groups.topk(best, -1).values.sum(-1).topk(topk_groups).indices
        masked = torch.ones(groups.shape[:2], dtype=torch.bool, device=s.device)
        masked.scatter_(1, chosen, False)
        biased = groups.masked_fill(masked[..., None], -torch.inf).flatten(1)
    idx = biased.topk(topk).indices
    return routing_weights(s.gather(1, idx), normalize, scale), idx


def routing_weights(chosen: Tensor, normalize: bool, scale: float) -> Tensor:
    """The weights of chosen scores [T, topk]."""
    return scale * (chosen / (chosen.sum(-1, keepdim=True) + 1e-20) if normalize else chosen)


def readable(output: Tensor, logits: Tensor, bias: Tensor | None, score: str, **rest) -> Tensor:
    """The biased scores of chosen experts: torch.topk may choose either of two equal ones."""
    if output.dtype != torch.int64:
        return output
    s = router_scores(logits, score)
    return (s if bias is None else s + bias.float()).gather(1, output)
