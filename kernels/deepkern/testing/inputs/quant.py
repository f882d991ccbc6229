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


def cast_per_channel(
    generator: Generator,
    M: int,
    K: int,
    G: int | None = None,
    dtype: torch.dtype = BF16,
    scale_format: str = "fp32",
    transpose: bool = False,
    scale_layout: str = "row",
) -> tuple[Tensor, str, Tensor | None, bool, str]:
    """G groups share the rows evenly, so that most begin off the blocks and off 16 bytes."""
    offsets = None
    if G is not None:
        offsets = [g * M // max(G, 1) for g in range(G + 1)]
        offsets = torch.tensor(offsets, dtype=torch.int32, device=generator.device)
    x = values(generator, M, K, dtype=dtype)
    return x, scale_format, offsets, transpose, scale_layout


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


def swiglu_cast(
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


def swiglu_cast_backward(
    generator: Generator,
    M: int,
    I: int,
    dtype: torch.dtype = BF16,
    fp8: bool = False,
    weighted: bool = False,
    limit: float | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, float | None]:
    """`dtype` is that of the gradient, and of `gate_up` unless it is FP8.

    Most gradients have the sign of their y: had the terms of a weight's gradient cancelled, the
    bound, which is relative to the sum, would say nothing about how it is added up.
    """
    gate_up, weights, *_ = swiglu_cast(generator, M, I, dtype, weighted)
    grad = values(generator, M, I, dtype=dtype)
    likewise = grad.abs() * (gate_up[:, :I] * gate_up[:, I:]).sign()
    grad = torch.where(torch.arange(I, device=grad.device) % 4 == 0, grad, likewise)
    gate_up, scale = reference.cast_per_token(gate_up) if fp8 else (gate_up, None)
    return grad, gate_up, scale, weights, limit


def rmsnorm_cast(
    generator: Generator,
    M: int,
    K: int,
    dtype: torch.dtype = BF16,
    weight_dtype: torch.dtype | None = None,
    eps: float = 1e-6,
    residual: bool = False,
    scale_format: str = "fp32",
    scale_layout: str = "row",
) -> tuple[Tensor, Tensor, float, Tensor | None, str, str]:
    x = values(generator, M, K, dtype=dtype)
    weight = torch.rand(K, generator=generator, device=generator.device) + 0.5
    added = values(generator, M, K, dtype=dtype) if residual else None
    return x, weight.to(weight_dtype or dtype), eps, added, scale_format, scale_layout


SIZES = {
    "cast_per_token": Sizes(
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
    ),
    "cast_per_channel": Sizes(
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
    "swiglu_cast": Sizes(
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
    ),
    "swiglu_cast_backward": Sizes(
        small=[
            {"M": 9, "I": 300, "fp8": True, "weighted": True, "limit": 2.0},
            {"M": 11, "I": 256, "fp8": True},
            {"M": 3, "I": 129, "dtype": torch.float32, "weighted": True},
            {"M": 5, "I": 1, "dtype": torch.float16, "limit": 0.5},
            {"M": 0, "I": 128, "weighted": True},
            {"M": 3, "I": 0, "weighted": True},
        ],
        cpu=[{"M": 512, "I": 2048, "fp8": True}],
        gpu=[
            {"M": 4096, "I": 2048, "fp8": True, "weighted": True},
            {"M": 4096, "I": 18432, "fp8": True},
            {"M": 4096, "I": 2048},
        ],
        inspect=[
            {"M": 4096, "I": 2048, "fp8": True, "weighted": True, "limit": 7.0},
            {"M": 4096, "I": 18432, "fp8": True},
            {"M": 4096, "I": 2048},
            {"M": 4096, "I": 2048, "dtype": torch.float32, "weighted": True},
            {"M": 4096, "I": 300, "fp8": True, "weighted": True},
        ],
    ),
    "rmsnorm_cast": Sizes(
        small=[
            {"M": 5, "K": 300, "residual": True},
            {"M": 1, "K": 128, "dtype": torch.float32, "scale_format": "ue8m0"},
            {"M": 9, "K": 129, "dtype": torch.float16, "scale_layout": "column", "residual": True},
            {"M": 2, "K": 1536, "weight_dtype": torch.float32},
            {"M": 0, "K": 128, "residual": True},
            {"M": 3, "K": 0, "scale_layout": "column"},
        ],
        cpu=[{"M": 512, "K": 7168, "residual": True}],
        gpu=[
            {"M": 4096, "K": 7168, "residual": True},
            {"M": 4096, "K": 1536},
            {"M": 4096, "K": 512},
            {"M": 64, "K": 7168, "residual": True},
            {"M": 256, "K": 20000},
        ],
        inspect=[
            {"M": 4096, "K": 7168, "residual": True},
            {"M": 4096, "K": 7168, "residual": True, "dtype": torch.float32},
            {"M": 4096, "K": 4096, "scale_layout": "column"},
            {"M": 4096, "K": 1536, "scale_format": "ue8m0"},
            {"M": 4096, "K": 512},
            {"M": 4096, "K": 16384, "residual": True, "dtype": torch.float32},
            {"M": 4096, "K": 20000, "residual": True, "dtype": torch.float32},
            {"M": 4096, "K": 16383, "residual": True, "dtype": torch.float32},
            {"M": 4096, "K": 100, "residual": True},
        ],
    ),
}
