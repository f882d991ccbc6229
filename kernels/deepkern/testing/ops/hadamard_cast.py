"""Inputs, sizes, cost and baseline of hadamard_cast."""

from __future__ import annotations

import torch
from torch import Tensor

from ..costs import each_tensor_once
from . import Sizes, cast_per_token, hadamard_transform
from .hadamard_transform import hadamard_matrix

inputs = hadamard_transform.inputs


SIZES = Sizes(
    small=[
        {"M": 40, "N": 128},
        {"M": 3, "N": 1, "dtype": torch.float32},
        {"M": 3, "N": 1024, "dtype": torch.float16},
        {"M": 0, "N": 128},
        {"M": 2, "N": 0},
    ],
    cpu=[{"M": 8192, "N": 128}],
    gpu=[{"M": 64 * 4096, "N": 128}],
    inspect=[{"M": 64 * 4096, "N": 128}],
)
EXACT = True
cost = each_tensor_once


def baseline(x, scale=1.0, scale_format="fp32") -> tuple[Tensor, Tensor]:
    """A product with the Hadamard matrix, amax, divide and cast."""
    rotated = x.float() @ hadamard_matrix(x.shape[-1], x.device) * scale
    return cast_per_token.baseline(rotated, scale_format)
