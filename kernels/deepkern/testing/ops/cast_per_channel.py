"""Inputs, sizes, cost and baseline of cast_per_channel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..costs import each_tensor_once
from ..random_inputs import values
from . import Sizes
from .cast_per_token import block_scale, with_layout

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


def inputs(
    generator: Generator,
    M: int,
    K: int,
    G: int | None = None,
    dtype: torch.dtype = BF16,
    scale_format: str = "fp32",
    transpose: bool = False,
    scale_layout: str = "row",
) -> tuple[Tensor, str, Tensor | None, bool, str]:
    """G groups of about equal size; most do not start at a multiple of 128 rows or 16 bytes."""
    offsets = None
    if G is not None:
        offsets = [g * M // max(G, 1) for g in range(G + 1)]
        offsets = torch.tensor(offsets, dtype=torch.int32, device=generator.device)
    x = values(generator, M, K, dtype=dtype)
    return x, scale_format, offsets, transpose, scale_layout


SIZES = Sizes(
    small=[
        {"M": 300, "K": 70, "G": 3, "transpose": True},
        {"M": 257, "K": 130},
        {"M": 130, "K": 65, "dtype": torch.float16, "transpose": True},
        {"M": 130, "K": 7, "transpose": True, "scale_layout": "column"},
        {"M": 200, "K": 70, "G": 2, "scale_format": "ue8m0", "scale_layout": "column"},
        {"M": 1, "K": 128, "dtype": torch.float32, "scale_format": "ue8m0"},
        {"M": 128, "K": 64, "G": 2, "transpose": True},
        {"M": 5, "K": 3, "G": 0},
        {"M": 0, "K": 5, "G": 2},
        {"M": 0, "K": 128},
        {"M": 3, "K": 0, "G": 1},
    ],
    cpu=[{"M": 2048, "K": 2048}, {"M": 2048, "K": 2048, "transpose": True}],
    gpu=[
        {"M": 4096, "K": 7168},
        {"M": 4096, "K": 7168, "transpose": True},
        {"M": 8192, "K": 7168, "G": 32, "transpose": True},  # 256 rows a group
        {"M": 8000, "K": 7168, "G": 32, "transpose": True},  # 250
        {"M": 32768, "K": 2048, "G": 256, "transpose": True, "scale_layout": "column"},
    ],
    inspect=[
        {"M": 4096, "K": 7168},
        {"M": 4096, "K": 7168, "transpose": True},
        {"M": 4096, "K": 7168, "dtype": torch.float32, "transpose": True},
        {"M": 8192, "K": 7168, "G": 32},
        {"M": 8192, "K": 7168, "G": 32, "transpose": True},
        {"M": 32768, "K": 2048, "G": 256, "transpose": True, "scale_layout": "column"},
        {"M": 4097, "K": 7168, "G": 1024, "transpose": True},
    ],
)
EXACT = True
cost = each_tensor_once


def baseline(
    x, scale_format="fp32", group_offsets=None, transpose=False, scale_layout="row"
) -> tuple[Tensor, Tensor]:
    """amax, divide, cast and transpose, op by op and group by group."""
    M, K = x.shape
    offsets = [0, M] if group_offsets is None else group_offsets.tolist()
    scales, casts = [], []
    for first, last in zip(offsets, offsets[1:], strict=False):
        rows = x[first:last].float()
        scale = F.pad(rows, (0, 0, 0, (first - last) % 128)).unflatten(0, (-1, 128)).abs().amax(1)
        scales.append(block_scale(scale, scale_format))
        row_scale = scales[-1].repeat_interleave(128, 0)[: last - first]
        casts.append((rows / row_scale).clamp(-448, 448).to(FP8))
    q = torch.cat(casts) if casts else x.new_zeros((M, K)).to(FP8)
    groups = 0 if group_offsets is None else len(offsets) - 1
    scale = x.new_zeros((-(-M // 128) + groups, K), dtype=torch.float32)
    filled = torch.cat(scales) if scales else scale
    scale[: len(filled)] = filled
    if transpose:
        q, scale = q.T.contiguous(), scale.T.contiguous()
    return q, with_layout(scale, scale_layout)
