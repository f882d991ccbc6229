"""AdamW and Muon with fp32 weights and bf16 moments.

    AdamW:  m = b1·m + (1-b1)·g;  v = b2·v + (1-b2)·g²;  w = (1 - lr·decay)·w - lr·m̂ / (√v̂ + eps)
    Muon:   m = b·m + g;  w = (1 - lr·decay)·w - lr·0.2·√max(rows, columns)·orthogonal(g + b·m)

The arithmetic is fp32; only the stored moments are rounded.  Muon orthogonalizes each matrix of the
last two dimensions by five Newton-Schulz iterations; embeddings, the head, the router and vectors
are updated by AdamW in both.

Source: DeepSeek-V3 report (arXiv:2412.19437), section 3.3.3; Muon by Keller Jordan, with the scale
of Moonlight (arXiv:2502.16982).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from model.training.recipe import Recipe

BETAS = (0.9, 0.95)
EPS = 1e-8
MOMENTUM = 0.95
MOMENT = torch.bfloat16
# Coefficients of x = a·x + (b·y + c·y²)·x with y = x·xᵀ, which moves singular values towards 1.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NOT_HIDDEN = ("embed_tokens", "head", "mlp.gate.")  # matrices that Muon does not update


class MixedOptimizer(torch.optim.Optimizer):
    """Each group has `muon`, True or False, `lr` and `weight_decay`."""

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "muon": False, "steps": 0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            group["steps"] += 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = self._muon if group["muon"] else self._adamw
                    update(parameter, parameter.grad, self.state[parameter], group)

    @staticmethod
    def _adamw(w: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        if not state:
            state["m"], state["v"] = (torch.zeros_like(w, dtype=MOMENT) for _ in range(2))
        b1, b2 = BETAS
        m = state["m"].float().mul_(b1).add_(grad, alpha=1 - b1)
        v = state["v"].float().mul_(b2).addcmul_(grad, grad, value=1 - b2)
        state["m"].copy_(m)
        state["v"].copy_(v)
        m_correction, v_correction = 1 - b1 ** group["steps"], 1 - b2 ** group["steps"]
        w.mul_(1 - group["lr"] * group["weight_decay"])
        root = v.div_(v_correction).sqrt_().add_(EPS)
        w.addcdiv_(m, root, value=-group["lr"] / m_correction)

    @staticmethod
    def _muon(w: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        if not state:
            state["m"] = torch.zeros_like(w, dtype=MOMENT)
        m = state["m"].float().mul_(MOMENTUM).add_(grad)
        state["m"].copy_(m)
        update = orthogonal(grad + MOMENTUM * m)
        w.mul_(1 - group["lr"] * group["weight_decay"])
        w.add_(update, alpha=-group["lr"] * 0.2 * max(w.shape[-2:]) ** 0.5)


def orthogonal(x: Tensor) -> Tensor:
    """The nearest matrices with singular values about 1, fp32 [..., rows, columns].

    A sharded x is gathered: each process computes the whole matrices and keeps its part.
    """
    if isinstance(x, DTensor):
        whole = orthogonal(x.full_tensor())
        return distribute_tensor(whole, x.device_mesh, x.placements, src_data_rank=None)
    transposed = x.shape[-2] > x.shape[-1]
    x = x.mT if transposed else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if x.is_cuda:
        x = x.bfloat16()
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        y = x @ x.mT
        x = a * x + (b * y + c * (y @ y)) @ x
    return (x.mT if transposed else x).float()


def make_optimizer(model: nn.Module, recipe: Recipe) -> MixedOptimizer:
    """Weight decay on matrices only; with Muon, AdamW for what is no hidden matrix."""
    kinds: dict[str, list[Tensor]] = {"muon": [], "matrix": [], "vector": []}
    for name, parameter in model.named_parameters():
        hidden = recipe.optimizer == "muon" and not any(part in name for part in NOT_HIDDEN)
        kind = "vector" if parameter.dim() < 2 else "muon" if hidden else "matrix"
        kinds[kind].append(parameter)
    decay = {"muon": recipe.weight_decay, "matrix": recipe.weight_decay, "vector": 0.0}
    return MixedOptimizer(
        {"params": parameters, "weight_decay": decay[kind], "muon": kind == "muon"}
        for kind, parameters in kinds.items()
        if parameters
    )
