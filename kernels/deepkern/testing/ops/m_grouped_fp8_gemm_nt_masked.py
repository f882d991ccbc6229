"""Inputs, sizes, cost and baseline of m_grouped_fp8_gemm_nt_masked."""

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
from . import Sizes

BF16, F32 = torch.bfloat16, torch.float32


def inputs(
    generator: Generator,
    M: int,
    N: int,
    K: int,
    G: int,
    out_dtype: torch.dtype = BF16,
    b_rows: int = 128,
    expected_m: int | None = None,
) -> tuple:
    """Up to M valid rows in each group, or `expected_m` on average."""
    a, a_scale = reference.cast_per_token(values(generator, G, M, K))
    max_m = M if expected_m is None else min(M, 2 * expected_m)
    masked_m = torch.randint(max_m + 1, (G,), generator=generator, device=generator.device)
    weights = gemms.group_weights(generator, G, N, K, b_rows)
    return a, a_scale, *weights, masked_m.int(), out_dtype, expected_m


SIZES = Sizes(
    small=[
        {"G": 3, "M": 70, "N": 130, "K": 200},
        {"G": 9, "M": 5, "N": 40, "K": 128, "b_rows": 1, "out_dtype": F32, "expected_m": 2},
        {"G": 0, "M": 5, "N": 40, "K": 128},
        {"G": 2, "M": 0, "N": 40, "K": 128},
        {"G": 2, "M": 5, "N": 0, "K": 128},
        {"G": 2, "M": 5, "N": 8, "K": 0},
    ],
    cpu=[{"G": 8, "M": 32, "N": 512, "K": 1024}],
    gpu=[
        {**size, "M": 2 * size["M"], "expected_m": size["M"]}
        for size in gemms.v3_expert_sizes(((1, 1024), (2, 512), (4, 256), (32, 64)))
    ],
    inspect=gemms.grouped_sizes_for_every_tile(),
)
EXACT = False
FP8_PRODUCT = True


def cost(a: Tensor, b: Tensor, masked_m: Tensor, **rest) -> Cost:
    rows = int(masked_m.clamp(0, a.shape[1]).sum())
    return Cost(tensor_bytes(a, b, masked_m, rest), 2 * rows * a.shape[2] * b.shape[1], fp8=True)


def baseline(a, a_scale, b, b_scale, masked_m, out_dtype=BF16, expected_m=None) -> Tensor:
    """Dequantize all to bf16, torch.bmm, zero the unused rows."""
    x, w = gemms.dequantize(a, a_scale, b, b_scale)
    unused = torch.arange(a.shape[1], device=a.device) >= masked_m[:, None]
    return torch.bmm(x, w.mT).masked_fill(unused[:, :, None], 0).to(out_dtype)


def providers(a, a_scale, b, b_scale, masked_m, out_dtype, expected_m, **rest) -> list[Provider]:
    row_mask = torch.arange(a.shape[1], device=a.device) < masked_m[:, None]

    def bmm() -> Callable:
        x, w = gemms.dequantize(a, a_scale, b, b_scale)
        return lambda: torch.bmm(x, w.mT)

    def grouped_mm() -> Callable:
        x, w = gemms.dequantize(a, a_scale, b, b_scale)
        x, ends = x[row_mask], masked_m.cumsum(0).int()
        return lambda: F.grouped_mm(x, w.mT, offs=ends)

    def masked(out: Tensor) -> tuple[Tensor]:
        return (out.masked_fill(~row_mask[..., None], 0).to(out_dtype),)

    def outputs(rows: Tensor) -> tuple[Tensor]:
        out = rows.new_zeros(*a.shape[:2], b.shape[1])
        out[row_mask] = rows
        return (out.to(out_dtype),)

    args = a, a_scale, b, b_scale, masked_m, out_dtype, expected_m
    about = "torch.bmm in bf16 of all rows, operands dequantized before"
    return [
        Provider("bmm", about, prepared(bmm), masked),
        Provider("grouped_mm", gemms.GROUPED_MM, prepared(grouped_mm), outputs),
        *library("deep_gemm", "DeepGEMM's product, scales transposed before",
                 lambda module: deep_gemm(module, *args), outputs=masked),
    ]  # fmt: skip


def deep_gemm(
    module: ModuleType, a, a_scale, b, b_scale, masked_m, out_dtype, expected_m
) -> Callable:
    d = a.new_empty((*a.shape[:2], b.shape[1]), dtype=out_dtype)
    x = a, module.get_mn_major_tma_aligned_tensor(a_scale)
    expected = a.shape[1] if expected_m is None else expected_m
    product = module.m_grouped_fp8_gemm_nt_masked
    return lambda: product(x, (b, b_scale), d, masked_m, expected) or d
