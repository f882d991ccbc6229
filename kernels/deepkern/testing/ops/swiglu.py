"""Inputs, sizes, cost and baseline of swiglu."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from ..costs import each_tensor_once
from ..providers import Provider, library
from ..random_inputs import values
from . import Sizes, swiglu_cast

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def inputs(generator: Generator, M: int, I: int, dtype: torch.dtype = BF16) -> tuple[Tensor]:
    return (values(generator, M, 2 * I, dtype=dtype),)


SIZES = Sizes(
    small=[
        {"M": 33, "I": 300},
        {"M": 1, "I": 128, "dtype": F32},
        {"M": 17, "I": 129, "dtype": F16},
        {"M": 0, "I": 128},
        {"M": 3, "I": 0},
    ],
    cpu=[{"M": 512, "I": 2048}],
    gpu=[{"M": 4096, "I": 2048}, {"M": 4096, "I": 18432}],
    inspect=[{"M": 4096, "I": 2048}, {"M": 4096, "I": 2048, "dtype": F32}],
)
EXACT = True
cost = each_tensor_once


def baseline(gate_up) -> Tensor:
    """F.silu, multiply, cast."""
    return swiglu_cast.swiglu(gate_up, None, None).to(gate_up.dtype)


def providers(gate_up, **rest) -> list[Provider]:
    if not gate_up.is_cuda:
        return []
    gate, up = (half.contiguous() for half in gate_up.chunk(2, -1))
    return [
        *library("flashinfer", "FlashInfer's silu_and_mul",
                 lambda module: lambda: module.silu_and_mul(gate_up)),
        *library("liger", "Liger's SiLU and multiply, halves separated before",
                 lambda module: lambda: module.LigerSiLUMulFunction.apply(gate, up),
                 module="liger_kernel.ops.swiglu"),
    ]  # fmt: skip
