"""Inputs, sizes, cost and baseline of cast_per_block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..costs import each_tensor_once
from ..providers import Provider, library
from ..random_inputs import values
from . import Sizes
from .cast_per_token import block_scale, transformer_engine

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


def inputs(
    generator: Generator,
    N: int,
    K: int,
    G: int | None = None,
    dtype: torch.dtype = BF16,
    scale_format: str = "fp32",
) -> tuple[Tensor, str]:
    shape = (N, K) if G is None else (G, N, K)
    return values(generator, *shape, dtype=dtype), scale_format


SIZES = Sizes(
    small=[
        {"N": 130, "K": 300},
        {"N": 257, "K": 100, "G": 2, "dtype": torch.float16},
        {"N": 1, "K": 128, "dtype": torch.float32, "scale_format": "ue8m0"},
        {"N": 0, "K": 128},
        {"N": 5, "K": 0, "G": 3},
        {"N": 5, "K": 7, "G": 0},
    ],
    cpu=[{"N": 2048, "K": 2048}],
    gpu=[{"N": 4096, "K": 7168}, {"N": 2048, "K": 7168, "G": 32}, {"N": 576, "K": 7168}],
    inspect=[{"N": 4096, "K": 7168}, {"N": 4096, "K": 7168, "dtype": torch.float32}],
)
EXACT = True
cost = each_tensor_once


def baseline(x: Tensor, scale_format: str = "fp32") -> tuple[Tensor, Tensor]:
    """amax, divide and cast, op by op."""
    N, K = x.shape[-2:]
    blocks = F.pad(x, (0, -K % 128, 0, -N % 128)).float()
    blocks = blocks.unflatten(-1, (-1, 128)).unflatten(
        -3, (-1, 128)
    )  # [.., N/128, 128, K/128, 128]
    scale = block_scale(blocks.abs().amax((-1, -3)), scale_format)
    q = (blocks / scale[..., :, None, :, None]).clamp(-448, 448).to(FP8)
    return q.flatten(-2).flatten(-3, -2)[..., :N, :K], scale


def providers(x, scale_format, **rest) -> list[Provider]:
    if not x.is_cuda or x.dim() != 2 or x.shape[1] % 128:
        return []
    columns = x.shape[1] // 128  # Transformer Engine pads them to a multiple of 4
    return library(
        "transformer_engine", "Transformer Engine's Float8BlockQuantizer, 128x128",
        lambda module: transformer_engine(module, x, scale_format == "ue8m0", 2),
        module="transformer_engine.pytorch",
        outputs=lambda got: (got._rowwise_data.view(FP8), got._rowwise_scale_inv[:, :columns]),
    )  # fmt: skip
