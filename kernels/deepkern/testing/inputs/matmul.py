"""Inputs of the matmul ops."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from ... import reference
from . import Sizes
from .quant import BF16, values


def fp8_gemm_nt(
    generator: Generator,
    M: int,
    N: int,
    K: int,
    out_dtype: torch.dtype = BF16,
    c: torch.dtype | None = None,
    b_rows: int = 128,
) -> tuple:
    """`b_rows`: how many rows of b one scale covers, 128 or 1; `c`: the dtype of c, if given."""
    a, a_scale = reference.cast_per_token(values(generator, M, K))
    cast = reference.cast_per_block if b_rows == 128 else reference.cast_per_token
    b, b_scale = cast(values(generator, N, K))
    addend = None if c is None else values(generator, M, N, dtype=c)
    return a, a_scale, b, b_scale, out_dtype, addend


# The shapes of DeepSeek-V3's linear layers, N x K, that the published figures are for.
V3 = [(7168, 16384), (24576, 1536), (4096, 7168), (7168, 2048), (4096, 4096)]

SIZES = {
    "fp8_gemm_nt": Sizes(
        small=[
            {"M": 65, "N": 130, "K": 300, "c": torch.float32},
            {"M": 1, "N": 256, "K": 256, "b_rows": 1, "out_dtype": torch.float16},
            {"M": 7, "N": 129, "K": 127, "c": BF16, "out_dtype": torch.float32},
            {"M": 130, "N": 40, "K": 128, "b_rows": 1, "c": torch.float16},
            {"M": 0, "N": 128, "K": 128},
            {"M": 3, "N": 0, "K": 128},
            {"M": 3, "N": 5, "K": 0},
            {"M": 3, "N": 5, "K": 0, "c": torch.float32},
        ],
        cpu=[{"M": 1, "N": 7168, "K": 2048}, {"M": 4, "N": 4096, "K": 7168}, {"M": 64, "N": 4096, "K": 7168}],
        gpu=[{"M": M, "N": N, "K": K} for N, K in V3 for M in (1, 16, 64, 128, 4096)],
        inspect=[{"M": M, "N": 4096, "K": 7168} for M in (1, 32, 64, 128, 512, 4096)],
    ),
}
