"""Collectives with gradients, for activations that ranks divide.

    Enter    x -> x                    gradient: sum over the ranks
    Leave    x -> sum over the ranks   gradient: as given
    Gather   x -> rows of all ranks    gradient: sum over the ranks of the rows of this one

A region between Enter and Leave computes a part of its output on each rank, and a part of the
gradient of its input.

Source: f and g of Megatron-LM (arXiv:1909.08053), section 3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Their names from torch 2.13 on, and before.
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Enter(torch.autograd.Function):
    """x -> x; the gradient is the sum over the group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class Leave(torch.autograd.Function):
    """x -> its sum over the group; the gradient is that of the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return grad, None


class Gather(torch.autograd.Function):
    """x [T, ...] -> [size · T, ...] of all ranks; the gradient is summed over them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = x.new_empty((group.size() * len(x), *x.shape[1:]))
        ALL_GATHER(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        out = grad.new_empty((len(grad) // ctx.group.size(), *grad.shape[1:]))
        REDUCE_SCATTER(out, grad.contiguous(), group=ctx.group)
        return out, None
