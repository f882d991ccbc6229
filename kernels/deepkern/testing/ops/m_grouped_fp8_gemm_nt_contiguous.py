"""Inputs, sizes, cost and baseline of m_grouped_fp8_gemm_nt_contiguous."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ... import reference
from .. import gemms
from ..costs import Cost, tensor_bytes
from ..providers import Provider, library, prepared
from ..random_inputs import values
from . import Sizes, fp8_gemm_nt

BF16, FP8, F32 = torch.bfloat16, torch.float8_e4m3fn, torch.float32


def inputs(
    generator: Generator,
    M: int,
    N: int,
    K: int,
    G: int,
    out_dtype: torch.dtype = BF16,
    b_rows: int = 128,
    skipped: float = 0.1,
) -> tuple:
    """Groups of random size; a row has no group with the probability `skipped`."""
    a, a_scale = reference.cast_per_token(values(generator, M, K))
    group_index = gemms.random_groups(generator, M, G, skipped)
    return a, a_scale, *gemms.group_weights(generator, G, N, K, b_rows), group_index, out_dtype


SIZES = Sizes(
    small=[
        {"M": 150, "N": 130, "K": 200, "G": 3},
        {"M": 9, "N": 40, "K": 128, "G": 20, "b_rows": 1, "out_dtype": F32},
        {"M": 0, "N": 40, "K": 128, "G": 2},
        {"M": 5, "N": 0, "K": 128, "G": 2},
        {"M": 5, "N": 8, "K": 0, "G": 2},
        {"M": 5, "N": 8, "K": 128, "G": 0},
    ],
    cpu=[{"M": 256, "N": 512, "K": 1024, "G": 8}],
    gpu=[
        {**size, "M": size["G"] * size["M"], "skipped": 0}
        for size in gemms.v3_expert_sizes(((4, 8192), (8, 4096), (32, 256)))
    ],
    inspect=[{**size, "M": size["G"] * size["M"]} for size in gemms.grouped_sizes_for_every_tile()],
)
EXACT = False
FP8_PRODUCT = True


def cost(a: Tensor, b: Tensor, group_index: Tensor, **rest) -> Cost:
    rows = int(((group_index >= 0) & (group_index < b.shape[0])).sum())
    moved = tensor_bytes(a, b, group_index, rest)
    return Cost(moved, 2 * rows * a.shape[1] * b.shape[1], fp8=True)


def baseline(a, a_scale, b, b_scale, group_index, out_dtype=torch.bfloat16) -> Tensor:
    """Group by group: index, dequantize both to bf16, F.linear."""
    out = a.new_zeros((a.shape[0], b.shape[1]), dtype=out_dtype)
    for g in range(b.shape[0]):
        row = (group_index == g).nonzero()[:, 0]
        rows = a.view(torch.uint8)[row].view(FP8)  # not every device indexes FP8
        out[row] = fp8_gemm_nt.baseline(rows, a_scale[row], b[g], b_scale[g], out_dtype)
    return out


def providers(a, a_scale, b, b_scale, group_index, out_dtype, **rest) -> list[Provider]:
    def grouped_mm() -> Callable:
        row, ends = gemms.sorted_rows(group_index, len(b))
        x, w = gemms.dequantize(a, a_scale, b, b_scale)
        x = x[row]
        return lambda: F.grouped_mm(x, w.mT, offs=ends)

    def outputs(rows: Tensor) -> tuple[Tensor]:
        return (gemms.original_rows(rows, group_index, len(b)).to(out_dtype),)

    def unpadded(d: Tensor) -> tuple[Tensor]:
        return outputs(d[gemms.aligned_rows(group_index, len(b))[1]])

    args = a, a_scale, b, b_scale, group_index, out_dtype
    return [
        Provider("grouped_mm", gemms.GROUPED_MM, prepared(grouped_mm), outputs),
        *library("deep_gemm", "DeepGEMM's product, groups aligned to 128 rows before",
                 lambda module: deep_gemm(module, *args), outputs=unpadded),
    ]  # fmt: skip


def deep_gemm(module: ModuleType, a, a_scale, b, b_scale, group_index, out_dtype) -> Callable:
    """DeepGEMM requires groups that start at multiples of 128 rows; we copy the rows before."""
    row, at, index = gemms.aligned_rows(group_index, len(b))
    x, x_scale = (
        a.new_zeros((len(index), a.shape[1])),
        a_scale.new_ones((len(index), a_scale.shape[1])),
    )
    x.view(torch.uint8)[at], x_scale[at] = a.view(torch.uint8)[row], a_scale[row]
    x_scale = module.get_mn_major_tma_aligned_tensor(x_scale)
    d = a.new_empty((len(index), b.shape[1]), dtype=out_dtype)

    def call() -> Tensor:
        module.m_grouped_fp8_gemm_nt_contiguous((x, x_scale), (b, b_scale), d, index)
        return d

    return call
