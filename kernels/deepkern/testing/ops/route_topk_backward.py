"""Inputs, sizes, cost and baseline of route_topk_backward."""

from __future__ import annotations

import torch
from torch import Generator

from ..costs import each_tensor_once
from ..routing import V2, router_scores
from . import Sizes, route_topk
from .route_topk import routing_weights

BF16 = torch.bfloat16


def inputs(generator: Generator, T: int, E: int, topk: int = 8, **rule) -> tuple:
    """Some indices are -1."""
    logits, _, topk, _, _, score, _, normalize, scale = route_topk.inputs(
        generator, T, E, topk, **rule
    )
    grad_weights = torch.randn(T, topk, generator=generator, device=generator.device)
    idx = torch.rand(T, E, generator=generator, device=generator.device).argsort(1)[:, :topk]
    idx = torch.where(idx == 0, -1, idx)
    return grad_weights, logits, idx.contiguous(), score, normalize, scale


SIZES = Sizes(
    small=[
        {"T": 9, "E": 256, "scale": 2.5},
        {"T": 20, "E": 10, "topk": 3, **V2, "dtype": BF16},
        {"T": 4, "E": 100, "topk": 6, "score": "softmax"},
        {"T": 6, "E": 64, "topk": 6, "score": "sqrtsoftplus", "dtype": torch.float16},
        {"T": 0, "E": 8, "topk": 2},
    ],
    cpu=[{"T": 512, "E": 256, "scale": 2.5}],
    gpu=[{"T": 4096, "E": 256, "scale": 2.5}],
    inspect=[
        {"T": 4096, "E": 256, "scale": 2.5},
        {"T": 4096, "E": 160, "topk": 6, **V2},
        {"T": 4096, "E": 384, "topk": 6, "score": "sqrtsoftplus"},
    ],
)
EXACT = False
cost = each_tensor_once


def baseline(grad_weights, logits, idx, score="sigmoid", normalize=True, scale=1.0):
    """Autograd through scores and gather."""
    valid = (idx >= 0) & (idx < logits.shape[1])
    with torch.enable_grad():
        logits = logits.detach().requires_grad_()
        chosen = router_scores(logits, score).gather(1, idx.where(valid, 0)) * valid
        weights = routing_weights(chosen, normalize, scale)
        return torch.autograd.grad(weights, logits, grad_weights * valid)[0]
