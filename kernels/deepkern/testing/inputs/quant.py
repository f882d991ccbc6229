"""Inputs of the casts."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from ... import reference
from . import Sizes

BF16 = torch.bfloat16


def values(generator: Generator, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Normal values whose magnitude varies from row to row by a factor of up to 2^12."""
    device = generator.device
    x = torch.randn(shape, generator=generator, device=device)
    row = torch.randn((*shape[:-1], 1), generator=generator, device=device)
    return (x * torch.exp2(3 * row.clamp(-2, 2))).to(dtype)


def cast_per_token(
    generator: Generator, M: int, K: int, dtype: torch.dtype = BF16, scale_format: str = "fp32"
) -> tuple[Tensor, str]:
    return values(generator, M, K, dtype=dtype), scale_format


def cast_per_block(
    generator: Generator,
    N: int,
    K: int,
    G: int | None = None,
    dtype: torch.dtype = BF16,
    scale_format: str = "fp32",
) -> tuple[Tensor, str]:
    shape = (N, K) if G is None else (G, N, K)
    return values(generator, *shape, dtype=dtype), scale_format


def cast_back(
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


SIZES = {
    "cast_per_token": Sizes(
        small=[
            {"M": 33, "K": 300},
            {"M": 1, "K": 128, "dtype": torch.float32, "scale_format": "ue8m0"},
            {"M": 70, "K": 129, "dtype": torch.float16},
            {"M": 0, "K": 128},
            {"M": 3, "K": 0},
        ],
        cpu=[{"M": 512, "K": 7168}],
        gpu=[{"M": 4096, "K": 7168}, {"M": 64, "K": 7168}, {"M": 8192, "K": 2048}],
        inspect=[{"M": 4096, "K": 7168}],
    ),
    "cast_per_block": Sizes(
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
    ),
    "cast_back": Sizes(
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
    ),
}
