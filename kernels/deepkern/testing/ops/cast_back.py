"""Inputs, sizes, cost and baseline of cast_back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from ... import reference
from ..costs import each_tensor_once
from ..random_inputs import values
from . import Sizes

BF16 = torch.bfloat16


def inputs(
    generator: Generator,
    N: int,
    K: int,
    G: int | None = None,
    block: tuple[int, int] = (1, 128),
    out_dtype: torch.dtype = BF16,
) -> tuple[Tensor, Tensor, list[int], torch.dtype]:
    lead = () if G is None else (G,)
    q = reference.quant.to_e4m3(values(generator, *lead, N, K, dtype=torch.float32) * 16)
    blocks = (*lead, -(-N // block[0]), -(-K // block[1]))
    scale = torch.rand(blocks, generator=generator, device=generator.device) + 2**-10
    return q, scale, list(block), out_dtype


SIZES = Sizes(
    small=[
        {"N": 33, "K": 300},
        {"N": 130, "K": 257, "G": 2, "block": (128, 128), "out_dtype": torch.float32},
        {"N": 130, "K": 70, "block": (128, 1), "out_dtype": torch.float16},
        {"N": 40, "K": 50, "block": (3, 7)},
        {"N": 4, "K": 5, "block": (1000, 1000)},
        {"N": 0, "K": 128},
        {"N": 3, "K": 0, "G": 2},
    ],
    cpu=[{"N": 2048, "K": 2048, "block": (128, 128)}],
    gpu=[
        {"N": 4096, "K": 7168},
        {"N": 4096, "K": 7168, "block": (128, 128)},
        {"N": 4096, "K": 7168, "block": (128, 1)},
    ],
    inspect=[
        {"N": 4096, "K": 7168},
        {"N": 4096, "K": 7168, "block": (128, 128)},
        {"N": 4096, "K": 7168, "block": (128, 1)},
        {"N": 4096, "K": 7168, "block": (3, 7)},
    ],
)
EXACT = True
cost = each_tensor_once


def baseline(q: Tensor, scale: Tensor, block: Sequence[int], out_dtype: torch.dtype) -> Tensor:
    """Cast, expand the scales, multiply."""
    return (q.float() * expand_scales(scale, block, *q.shape[-2:])).to(out_dtype)


def expand_scales(scale: Tensor, block: Sequence[int], N: int, K: int) -> Tensor:
    """The scale of every value: [..., N, K]."""
    wide = scale.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return wide[..., :N, :K]
