"""Inputs, sizes, cost and baseline of gemm_nt."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .. import gemms
from ..costs import Cost, tensor_bytes
from ..providers import Provider, library
from ..random_inputs import values
from . import Sizes

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def inputs(
    generator: Generator,
    M: int,
    N: int,
    K: int,
    dtype: torch.dtype = BF16,
    out_dtype: torch.dtype | None = None,
    transposed: bool = False,
) -> tuple[Tensor, Tensor, torch.dtype | None]:
    """`transposed`: b is the view of a matrix [K, N]."""
    a, b = values(generator, M, K, dtype=dtype), values(generator, N, K, dtype=dtype)
    return a, b.t().contiguous().t() if transposed else b, out_dtype


SIZES = Sizes(
    small=[
        {"M": 37, "N": 130, "K": 200, "out_dtype": F32},
        {"M": 3, "N": 70, "K": 90, "dtype": F32},
        {"M": 1, "N": 40, "K": 136, "dtype": F16, "transposed": True},
        {"M": 18, "N": 33, "K": 65, "dtype": F32, "transposed": True, "out_dtype": BF16},
        {"M": 0, "N": 128, "K": 128},
        {"M": 3, "N": 0, "K": 128},
        {"M": 3, "N": 5, "K": 0},
    ],
    cpu=[
        {"M": M, "N": N, "K": K, "dtype": dtype}
        for N, K in ((7168, 2048), (576, 7168))
        for dtype in (BF16, F32)
        for M in (1, 4, 64)
    ],
    gpu=[{"M": M, "N": N, "K": K} for N, K in gemms.V3[:4] for M in (1, 16, 128, 4096)],
    inspect=[
        {"M": 4096, "N": 7168, "K": 2048, "transposed": True},
        *gemms.real_sizes_for_every_tile(
            [{"M": M, "N": N, "K": K} for M in gemms.ROWS for N, K in gemms.LAYERS]
        ),
    ],
)
EXACT = False


def cost(a: Tensor, b: Tensor, **rest) -> Cost:
    return Cost(tensor_bytes(a, b, rest), 2 * a.shape[0] * a.shape[1] * b.shape[0])


def baseline(a, b, out_dtype=None) -> Tensor:
    """F.linear."""
    return F.linear(a, b).to(out_dtype or a.dtype)


def providers(a, b, out_dtype, **rest) -> list[Provider]:
    if not a.is_cuda or a.dtype == F32:
        return []
    dtype = out_dtype or a.dtype
    return [
        *library("deep_gemm", "DeepGEMM's bf16_gemm_nt", lambda m: deep_gemm(m, a, b, dtype)),
        *library("quack", "quack's gemm", lambda m: lambda: m.gemm(a, b.t(), out_dtype=dtype),
                 module="quack.gemm_interface"),
    ]  # fmt: skip


def deep_gemm(module: ModuleType, a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Callable:
    d = a.new_empty((len(a), len(b)), dtype=out_dtype)
    return lambda: module.bf16_gemm_nt(a, b, d) or d
