"""Inputs, sizes, cost and baseline of cast_per_token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..costs import each_tensor_once
from ..random_inputs import values
from . import Sizes

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


def inputs(
    generator: Generator,
    M: int,
    K: int,
    G: int | None = None,
    dtype: torch.dtype = BF16,
    scale_format: str = "fp32",
    scale_layout: str = "row",
) -> tuple[Tensor, str, str]:
    shape = (M, K) if G is None else (G, M, K)
    return values(generator, *shape, dtype=dtype), scale_format, scale_layout


SIZES = Sizes(
    small=[
        {"M": 33, "K": 300},
        {"M": 1, "K": 128, "dtype": torch.float32, "scale_format": "ue8m0"},
        {"M": 70, "K": 129, "dtype": torch.float16},
        {"M": 33, "K": 130, "scale_layout": "column"},
        {"M": 5, "K": 200, "G": 3, "scale_layout": "column"},
        {"M": 0, "K": 128},
        {"M": 3, "K": 0},
        {"M": 0, "K": 128, "scale_layout": "column"},
    ],
    cpu=[{"M": 512, "K": 7168}],
    gpu=[
        {"M": 4096, "K": 7168},
        {"M": 64, "K": 7168},
        {"M": 8192, "K": 2048},
        {"M": 4096, "K": 7168, "scale_layout": "column"},
    ],
    inspect=[{"M": 4096, "K": 7168}, {"M": 4096, "K": 7168, "scale_layout": "column"}],
)
EXACT = True
cost = each_tensor_once


def baseline(
    x: Tensor, scale_format: str = "fp32", scale_layout: str = "row"
) -> tuple[Tensor, Tensor]:
    """amax, divide and cast, op by op."""
    K = x.shape[-1]
    blocks = F.pad(x, (0, -K % 128)).unflatten(-1, (-1, 128)).float()
    scale = block_scale(blocks.abs().amax(-1), scale_format)
    q = (blocks / scale[..., None]).clamp(-448, 448).to(FP8)
    return q.flatten(-2)[..., :K], with_layout(scale, scale_layout)


def block_scale(amax: Tensor, scale_format: str) -> Tensor:
    """The scale of blocks whose largest magnitude is `amax`."""
    scale = amax.clamp(min=1e-4) / 448
    if scale_format == "ue8m0":
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    # A block with NaN or inf has scale NaN.
    return torch.where(amax.isfinite(), scale, torch.nan)


def with_layout(scale: Tensor, layout: str) -> Tensor:
    """The scales stored by row or by column."""
    return scale if layout == "row" else scale.mT.contiguous().mT
