"""Inputs of the matmul ops."""

from __future__ import annotations

import torch
from torch import Generator

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


# The N x K of DeepSeek-V3's linear layers that published figures are for.
V3 = [(7168, 16384), (24576, 1536), (4096, 7168), (7168, 2048), (4096, 4096)]
F32 = torch.float32

SIZES = {
    "fp8_gemm_nt": Sizes(
        small=[
            {"M": 65, "N": 130, "K": 300, "c": F32},
            {"M": 1, "N": 256, "K": 256, "b_rows": 1, "out_dtype": torch.float16},
            {"M": 7, "N": 129, "K": 127, "c": BF16, "out_dtype": F32},
            {"M": 130, "N": 40, "K": 128, "b_rows": 1, "c": torch.float16},
            {"M": 0, "N": 128, "K": 128},
            {"M": 3, "N": 0, "K": 128},
            {"M": 3, "N": 5, "K": 0},
            {"M": 3, "N": 5, "K": 0, "c": F32},
        ],
        cpu=[{"M": M, "N": N, "K": K} for N, K in ((7168, 2048), (4096, 7168)) for M in (1, 4, 64)],
        gpu=[{"M": M, "N": N, "K": K} for N, K in V3 for M in (1, 16, 64, 128, 4096)],
        # Together these take every tile of every architecture: tests/matmul/test_tiles.py.
        inspect=[
            {"M": 1, "N": 512, "K": 7168},
            {"M": 192, "N": 512, "K": 7168},
            {"M": 384, "N": 512, "K": 7168},
            {"M": 768, "N": 512, "K": 7168},
            {"M": 4096, "N": 576, "K": 7168},
            {"M": 96, "N": 7168, "K": 2048},
            {"M": 1024, "N": 3072, "K": 1536},
            {"M": 24, "N": 24576, "K": 1536},
            # What takes the most registers: part of a block of K, scales per row of b, c in fp32.
            {"M": 4096, "N": 576, "K": 7184, "c": F32, "out_dtype": F32},
            {"M": 4096, "N": 576, "K": 7184, "c": F32, "out_dtype": F32, "b_rows": 1},
            {"M": 96, "N": 24576, "K": 7184, "c": F32, "out_dtype": F32, "b_rows": 1},
            {"M": 384, "N": 512, "K": 7184, "c": F32, "out_dtype": F32, "b_rows": 1},
        ],
    ),
}
