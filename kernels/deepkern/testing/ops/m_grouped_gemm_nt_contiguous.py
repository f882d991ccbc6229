"""Inputs, sizes, cost and baseline of m_grouped_gemm_nt_contiguous."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .. import gemms
from ..costs import Cost, tensor_bytes
from ..providers import Provider, library, prepared
from ..random_inputs import values
from . import Sizes

BF16, F32 = torch.bfloat16, torch.float32


def inputs(
    generator: Generator,
    M: int,
    N: int,
    K: int,
    G: int,
    dtype: torch.dtype = BF16,
    out_dtype: torch.dtype | None = None,
    transposed: bool = False,
    skipped: float = 0.1,
) -> tuple:
    """A row has no group with the probability `skipped`; `transposed` as for gemm_nt."""
    a, b = values(generator, M, K, dtype=dtype), values(generator, G, N, K, dtype=dtype)
    group_index = gemms.random_groups(generator, M, G, skipped)
    return a, b.mT.contiguous().mT if transposed else b, group_index, out_dtype


SIZES = Sizes(
    small=[
        {"M": 80, "N": 130, "K": 136, "G": 3, "out_dtype": F32},
        {"M": 9, "N": 40, "K": 65, "G": 20, "dtype": F32, "transposed": True},
        {"M": 0, "N": 40, "K": 128, "G": 2},
        {"M": 5, "N": 0, "K": 128, "G": 2},
        {"M": 5, "N": 8, "K": 0, "G": 2},
        {"M": 5, "N": 8, "K": 128, "G": 0},
    ],
    cpu=[{"M": 256, "N": 512, "K": 1024, "G": 8}, {"M": 16, "N": 512, "K": 128, "G": 16}],
    gpu=[
        {**size, "M": size["G"] * size["M"], "skipped": 0}
        for size in gemms.v3_expert_sizes(((8, 1024), (32, 64)))
    ],
    inspect=[
        {**size, "M": size["G"] * size["M"], "skipped": 0}
        for size in gemms.real_sizes_for_every_tile(gemms.EXPERT_SIZES)
    ],
)
EXACT = False


def cost(a: Tensor, b: Tensor, group_index: Tensor, **rest) -> Cost:
    rows = int(((group_index >= 0) & (group_index < b.shape[0])).sum())
    return Cost(tensor_bytes(a, b, group_index, rest), 2 * rows * a.shape[1] * b.shape[1])


def baseline(a, b, group_index, out_dtype=None) -> Tensor:
    """Group by group: index, F.linear."""
    out = a.new_zeros((a.shape[0], b.shape[1]), dtype=out_dtype or a.dtype)
    for g in range(b.shape[0]):
        row = (group_index == g).nonzero()[:, 0]
        out[row] = F.linear(a[row], b[g]).to(out.dtype)
    return out


def providers(a, b, group_index, out_dtype, **rest) -> list[Provider]:
    if a.dtype == F32:
        return []

    def grouped_mm() -> Callable:
        row, ends = gemms.sorted_rows(group_index, len(b))
        x = a[row]
        return lambda: F.grouped_mm(x, b.mT, offs=ends)

    def outputs(rows: Tensor) -> tuple[Tensor]:
        return (gemms.original_rows(rows, group_index, len(b)).to(out_dtype or a.dtype),)

    def unpadded(d: Tensor) -> tuple[Tensor]:
        return outputs(d[gemms.aligned_rows(group_index, len(b))[1]])

    about = "F.grouped_mm, rows without a group removed before"
    return [
        Provider("grouped_mm", about, prepared(grouped_mm), outputs),
        *library("deep_gemm", "DeepGEMM's product, groups aligned to 128 rows before",
                 lambda module: deep_gemm(module, a, b, group_index), outputs=unpadded),
    ]  # fmt: skip


def deep_gemm(module: ModuleType, a: Tensor, b: Tensor, group_index: Tensor) -> Callable:
    row, at, index = gemms.aligned_rows(group_index, len(b))
    x, d = a.new_zeros((len(index), a.shape[1])), a.new_empty((len(index), b.shape[1]))
    x[at] = a[row]
    return lambda: module.m_grouped_bf16_gemm_nt_contiguous(x, b, d, index) or d
