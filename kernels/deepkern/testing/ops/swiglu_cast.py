"""Inputs, sizes, cost and baseline of swiglu_cast."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..costs import each_tensor_once
from ..random_inputs import values
from . import Sizes, cast_per_token

BF16 = torch.bfloat16


def inputs(
    generator: Generator,
    M: int,
    I: int,
    dtype: torch.dtype = BF16,
    weighted: bool = False,
    limit: float | None = None,
    scale_format: str = "fp32",
    scale_layout: str = "row",
) -> tuple[Tensor, Tensor | None, float | None, str, str]:
    gate_up = values(generator, M, 2 * I, dtype=dtype)
    weights = torch.rand(M, generator=generator, device=generator.device) if weighted else None
    return gate_up, weights, limit, scale_format, scale_layout


SIZES = Sizes(
    small=[
        {"M": 33, "I": 300, "weighted": True},
        {"M": 1, "I": 128, "dtype": torch.float32, "scale_format": "ue8m0"},
        {"M": 17, "I": 129, "dtype": torch.float16, "limit": 2.0, "scale_layout": "column"},
        {"M": 0, "I": 128, "weighted": True, "scale_layout": "column"},
        {"M": 3, "I": 0},
    ],
    cpu=[{"M": 512, "I": 2048}],
    gpu=[
        {"M": 4096, "I": 2048},
        {"M": 4096, "I": 18432},
        {"M": 4096, "I": 2048, "weighted": True, "scale_layout": "column"},
    ],
    inspect=[
        {"M": 4096, "I": 2048},
        {"M": 4096, "I": 18432, "scale_format": "ue8m0"},
        {"M": 4096, "I": 2048, "weighted": True, "limit": 7.0, "scale_layout": "column"},
        {"M": 4096, "I": 2048, "dtype": torch.float32},
    ],
)
EXACT = True
cost = each_tensor_once


def baseline(
    gate_up, weights=None, limit=None, scale_format="fp32", scale_layout="row"
) -> tuple[Tensor, Tensor]:
    """F.silu, multiply, cast op by op."""
    return cast_per_token.baseline(swiglu(gate_up, weights, limit), scale_format)


def swiglu(gate_up: Tensor, weights: Tensor | None, limit: float | None) -> Tensor:
    """fp32 [M, I]: silu(gate) * up, clamped to `limit` first and weighted last."""
    gate, up = gate_up.float().tensor_split(2, -1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    y = F.silu(gate) * up
    return y if weights is None else y * weights[:, None]
