"""Inputs, sizes, cost and baseline of sequence_balance_loss_backward."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from ..costs import each_tensor_once
from . import sequence_balance_loss


def inputs(generator: Generator, **size) -> tuple:
    grad = torch.rand(1, generator=generator, device=generator.device) + 0.5
    return grad, *sequence_balance_loss.inputs(generator, **size)


SIZES = sequence_balance_loss.SIZES
EXACT = False
cost = each_tensor_once


def baseline(grad, logits, topk_idx, score="sigmoid", alpha=1e-4) -> Tensor:
    """Autograd through scores, mean and product."""
    with torch.enable_grad():
        logits = logits.detach().requires_grad_()
        loss = sequence_balance_loss.baseline(logits, topk_idx, score, alpha)
        return torch.autograd.grad(loss, logits, grad[0])[0]
