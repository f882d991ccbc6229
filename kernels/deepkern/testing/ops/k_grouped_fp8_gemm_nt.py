"""Inputs, sizes, cost and baseline of k_grouped_fp8_gemm_nt."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ...reference.quant import to_e4m3
from .. import gemms
from ..costs import Cost, tensor_bytes
from ..providers import Provider, library, prepared
from ..random_inputs import values
from . import Sizes, cast_back

FP8, F32 = torch.float8_e4m3fn, torch.float32


def inputs(
    generator: Generator, M: int, N: int, K: int, G: int, c: bool = False, equal: bool = False
) -> tuple:
    """Groups of random or `equal` length that together cover the K columns."""
    offsets = torch.randint(K + 1, (max(G - 1, 0),), generator=generator, device=generator.device)
    if equal:
        offsets = torch.arange(1, G, device=generator.device) * (K // G)
    offsets = torch.cat([offsets.new_zeros(1), offsets.sort().values, offsets.new_full((1,), K)])
    operands = []
    for rows in (M, N):
        q = to_e4m3(values(generator, rows, K, dtype=F32) * 16)
        scale = torch.rand(rows, -(-K // 128) + G, generator=generator, device=generator.device)
        operands += [q, scale + 2**-10]
    addend = values(generator, G, M, N, dtype=F32) if c else None
    return *operands, offsets[: G + 1].int(), addend


SIZES = Sizes(
    small=[
        {"M": 70, "N": 130, "K": 500, "G": 3, "c": True},
        {"M": 9, "N": 40, "K": 129, "G": 5},
        {"M": 4, "N": 5, "K": 0, "G": 2, "c": True},
        {"M": 4, "N": 5, "K": 10, "G": 0},
        {"M": 0, "N": 5, "K": 10, "G": 1},
        {"M": 4, "N": 0, "K": 10, "G": 1},
    ],
    cpu=[{"M": 512, "N": 256, "K": 1024, "G": 4}],
    gpu=[
        {"M": M, "N": N, "K": 32768, "G": G, "equal": equal}
        for M, N in ((4096, 7168), (7168, 2048))
        for G, equal in ((4, True), (8, True), (4, False))
    ],
    inspect=[
        {**size, "K": size["G"] * size["K"], "c": True}
        for size in gemms.sizes_with_a_new_tile(gemms.EXPERT_SIZES, 1, "k_grouped")
    ],
)
EXACT = False
FP8_PRODUCT = True


def cost(a: Tensor, b: Tensor, **rest) -> Cost:
    flops = 2 * a.shape[0] * a.shape[1] * b.shape[0]
    return Cost(tensor_bytes(a, b, rest), flops, fp8=True)


def baseline(a, a_scale, b, b_scale, group_offsets, c=None) -> Tensor:
    """Group by group: dequantize both to bf16, F.linear in fp32."""
    offsets, block, products = group_offsets.tolist(), 0, []
    for first, last in zip(offsets, offsets[1:], strict=False):
        scales = slice(block, block - (first - last) // 128)
        block = scales.stop
        x, w = (
            cast_back.baseline(q[:, first:last], scale[:, scales], (1, 128), torch.bfloat16)
            for q, scale in ((a, a_scale), (b, b_scale))
        )
        products.append(F.linear(x.float(), w.float()))
    out = (
        torch.stack(products) if products else a.new_zeros((0, len(a), len(b)), dtype=torch.float32)
    )
    return out if c is None else out + c


def providers(a, a_scale, b, b_scale, group_offsets, c, **rest) -> list[Provider]:
    """c is added after the call, untimed; DeepGEMM adds to its output in each call."""

    def grouped_mm() -> Callable:
        ends = group_offsets[1:].contiguous()
        column = scale_columns(group_offsets)
        x, y = (
            (q.float() * scale[:, column]).bfloat16() for q, scale in ((a, a_scale), (b, b_scale))
        )
        return lambda: F.grouped_mm(x, y.t(), offs=ends)

    def outputs(out: Tensor) -> tuple[Tensor]:
        return (out.float() if c is None else out.float() + c,)

    args = a, a_scale, b, b_scale, group_offsets, c
    about = f"{gemms.GROUPED_MM}, bf16 output"
    found = library("deep_gemm", "DeepGEMM's product, added to the output",
                    lambda module: deep_gemm(module, *args))  # fmt: skip
    # On a GPU grouped_mm asserts that every group's K is a multiple of 8.
    if a.is_cuda and (group_offsets % 8).any():
        return found
    return [Provider("grouped_mm", about, prepared(grouped_mm), outputs), *found]


def scale_columns(group_offsets: Tensor) -> Tensor:
    """The column of a_scale for each column of a; the groups cover all columns."""
    lengths, first, columns = group_offsets.diff().tolist(), 0, []
    for length in lengths:
        columns.append(first + torch.arange(length) // 128)
        first += -(-length // 128)
    return torch.cat(columns).to(group_offsets.device)


def deep_gemm(module: ModuleType, a, a_scale, b, b_scale, group_offsets, c) -> Callable:
    """DeepGEMM takes the groups' matrices one after the other in memory and adds to `d`."""
    lengths = group_offsets.diff()
    ks, d = lengths.tolist(), a.new_zeros((len(lengths), len(a), len(b)), dtype=torch.float32)
    if c is not None:
        d.copy_(c)
    parts = [
        (torch.cat([x.contiguous().flatten() for x in q.view(torch.uint8).split(ks, 1)]).view(FP8),
         scale[:, : sum(-(-k // 128) for k in ks)])
        for q, scale in ((a, a_scale), (b, b_scale))
    ]  # fmt: skip
    return lambda: module.k_grouped_fp8_gemm_nt_contiguous(*parts, d, ks, lengths, d) or d
