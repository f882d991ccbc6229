"""Plain PyTorch for the FP8 matrix products, and what else people run: cuBLASLt, DeepGEMM."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

from .quant import FP8, cast_back
from .registry import baseline, others, prepared

Calls = dict[str, Callable[[], object]]
SCALED_MM = "scaled_mm, blockwise"
GROUPED_MM = "bf16 F.grouped_mm, all dequantised before"


@baseline
def fp8_gemm_nt(a, a_scale, b, b_scale, out_dtype=torch.bfloat16, c=None) -> Tensor:
    """Dequantise both to bf16, F.linear."""
    a, b, out_dtype = _dequantised(a, a_scale, b, b_scale, out_dtype)
    out = F.linear(a, b).to(out_dtype)
    return out if c is None else (out + c).to(out_dtype)


def _dequantised(a, a_scale, b, b_scale, out_dtype) -> tuple[Tensor, Tensor, torch.dtype]:
    """Both factors in the 16-bit type that the product is made in."""
    wide = torch.bfloat16 if out_dtype == torch.float32 else out_dtype
    return (
        cast_back(a, a_scale, (1, 128), wide),
        cast_back(b, b_scale, (_rows(b, b_scale), 128), wide),
        out_dtype,
    )


def _rows(b: Tensor, b_scale: Tensor) -> int:
    """How many rows of b share a scale."""
    return 1 if b_scale.shape[-2] == b.shape[-2] else 128


@others("fp8_gemm_nt")
def other_fp8_gemm_nt(args: tuple) -> Calls:
    a, b, out_dtype = _dequantised(*args[:5])
    found = {"bf16 F.linear, all dequantised before": lambda: F.linear(a, b).to(out_dtype)}
    if a.device.type == "cpu":  # what people run there; it has no blockwise scaled_mm
        wide_a, wide_b = a.float(), b.float()
        found["fp32 F.linear, all dequantised before"] = lambda: F.linear(wide_a, wide_b)
    else:
        found[SCALED_MM] = prepared(lambda: scaled_mm(*args[:5]))
    return found | with_deep_gemm(lambda library: deep_gemm_dense(library, *args))


def scaled_mm(a, a_scale, b, b_scale, out_dtype) -> Callable[[], Tensor]:
    """cuBLASLt through torch: scales column-major, those of 128x128 padded to 4 along K."""
    per_row, per_block = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128
    recipe = per_row if b_scale.shape[0] == b.shape[0] else per_block
    if recipe == per_block:
        y_scale = F.pad(b_scale, (0, -b_scale.shape[1] % 4)).contiguous().t()
    else:
        y_scale = column_major(b_scale)
    x_scale = column_major(a_scale)
    return lambda: F.scaled_mm(
        a, b.t(), x_scale, per_row, y_scale, recipe, output_dtype=out_dtype
    )  # fmt: skip


def column_major(scale: Tensor) -> Tensor:
    return scale.t().contiguous().t()


def with_deep_gemm(prepare: Callable[[ModuleType], Callable[[], object]]) -> Calls:
    """DeepGEMM beside an op, where it is installed."""
    if importlib.util.find_spec("deep_gemm") is None:
        return {}
    return {"DeepGEMM": prepared(lambda: prepare(importlib.import_module("deep_gemm")))}


def deep_gemm_dense(library: ModuleType, a, a_scale, b, b_scale, out_dtype, c) -> Callable:
    d = a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)
    a_scale = library.get_mn_major_tma_aligned_tensor(a_scale)
    return lambda: library.fp8_gemm_nt((a, a_scale), (b, b_scale), d, c=c) or d


@baseline
def m_grouped_fp8_gemm_nt_contiguous(
    a, a_scale, b, b_scale, group_index, out_dtype=torch.bfloat16
) -> Tensor:
    """Group by group: index, dequantise both to bf16, F.linear."""
    out = a.new_zeros((a.shape[0], b.shape[1]), dtype=out_dtype)
    for g in range(b.shape[0]):
        row = (group_index == g).nonzero()[:, 0]
        rows = a.view(torch.uint8)[row].view(FP8)  # not every device indexes FP8
        out[row] = fp8_gemm_nt(rows, a_scale[row], b[g], b_scale[g], out_dtype)
    return out


@others("m_grouped_fp8_gemm_nt_contiguous")
def other_contiguous(args: tuple) -> Calls:
    a, a_scale, b, b_scale, group_index, out_dtype = args

    def grouped_mm() -> Callable:
        row, ends = sorted_rows(group_index, len(b))
        x = cast_back(a, a_scale, (1, 128), torch.bfloat16)[row]
        w = cast_back(b, b_scale, (_rows(b, b_scale), 128), torch.bfloat16).mT
        return lambda: F.grouped_mm(x, w, offs=ends)

    return {GROUPED_MM: prepared(grouped_mm)} | with_deep_gemm(
        lambda library: deep_gemm_contiguous(library, *args)
    )


def sorted_rows(group_index: Tensor, G: int) -> tuple[Tensor, Tensor]:
    """The rows that have a group, by group, and where in them each group ends."""
    row = ((group_index >= 0) & (group_index < G)).nonzero()[:, 0]
    row = row[group_index[row].sort(stable=True).indices]
    ends = torch.bincount(group_index[row].long(), minlength=G).cumsum(0)
    return row, ends.int()


def deep_gemm_contiguous(
    library: ModuleType, a, a_scale, b, b_scale, group_index, out_dtype
) -> Callable:
    """Its groups must begin at multiples of 128 rows: made so before."""
    row, ends = sorted_rows(group_index, len(b))
    counts = ends.diff(prepend=ends.new_zeros(1))
    starts = (-(-counts // 128) * 128).cumsum(0)
    M = int(starts[-1])
    group = group_index[row].long()
    at = torch.arange(len(row), device=a.device) - (ends - counts)[group]
    at = at + (starts - -(-counts // 128) * 128)[group]
    x, x_scale = a.new_zeros((M, a.shape[1])), a_scale.new_ones((M, a_scale.shape[1]))
    x.view(torch.uint8)[at], x_scale[at] = a.view(torch.uint8)[row], a_scale[row]
    index = group_index.new_full((M,), -1)
    index[at] = group_index[row]
    x_scale = library.get_mn_major_tma_aligned_tensor(x_scale)
    d = a.new_empty((M, b.shape[1]), dtype=out_dtype)

    def call() -> Tensor:
        library.m_grouped_fp8_gemm_nt_contiguous((x, x_scale), (b, b_scale), d, index)
        return d

    return call


@baseline
def m_grouped_fp8_gemm_nt_masked(
    a, a_scale, b, b_scale, masked_m, out_dtype=torch.bfloat16, expected_m=None
) -> Tensor:
    """Dequantise all to bf16, torch.bmm, zero the unused rows."""
    wide = torch.bfloat16
    x = cast_back(a, a_scale, (1, 128), wide)
    w = cast_back(b, b_scale, (_rows(b, b_scale), 128), wide)
    unused = torch.arange(a.shape[1], device=a.device) >= masked_m[:, None]
    return torch.bmm(x, w.mT).masked_fill(unused[:, :, None], 0).to(out_dtype)


@others("m_grouped_fp8_gemm_nt_masked")
def other_masked(args: tuple) -> Calls:
    a, a_scale, b, b_scale, masked_m = args[:5]

    def dequantised() -> tuple[Tensor, Tensor]:
        x = cast_back(a, a_scale, (1, 128), torch.bfloat16)
        return x, cast_back(b, b_scale, (_rows(b, b_scale), 128), torch.bfloat16).mT

    def bmm() -> Callable:
        x, w = dequantised()
        return lambda: torch.bmm(x, w)

    def grouped_mm() -> Callable:
        x, w = dequantised()
        used = torch.arange(a.shape[1], device=a.device) < masked_m[:, None]
        x, ends = x[used], masked_m.cumsum(0).int()
        return lambda: F.grouped_mm(x, w, offs=ends)

    found = {"bf16 torch.bmm, all rows, dequantised before": prepared(bmm)}
    found[GROUPED_MM] = prepared(grouped_mm)
    return found | with_deep_gemm(lambda library: deep_gemm_masked(library, *args))


def deep_gemm_masked(
    library: ModuleType, a, a_scale, b, b_scale, masked_m, out_dtype, expected_m
) -> Callable:
    d = a.new_empty((*a.shape[:2], b.shape[1]), dtype=out_dtype)
    x = a, library.get_mn_major_tma_aligned_tensor(a_scale)
    expected = a.shape[1] if expected_m is None else expected_m
    product = library.m_grouped_fp8_gemm_nt_masked
    return lambda: product(x, (b, b_scale), d, masked_m, expected) or d


@baseline
def k_grouped_fp8_gemm_nt(a, a_scale, b, b_scale, group_offsets, c=None) -> Tensor:
    """Group by group: dequantise both to bf16, F.linear in fp32."""
    offsets, block, found = group_offsets.tolist(), 0, []
    for first, last in zip(offsets, offsets[1:], strict=False):
        scales = slice(block, block - (first - last) // 128)
        block = scales.stop
        x, w = (
            cast_back(q[:, first:last], scale[:, scales], (1, 128), torch.bfloat16)
            for q, scale in ((a, a_scale), (b, b_scale))
        )
        found.append(F.linear(x.float(), w.float()))
    out = torch.stack(found) if found else a.new_zeros((0, len(a), len(b)), dtype=torch.float32)
    return out if c is None else out + c


@others("k_grouped_fp8_gemm_nt")
def other_k_grouped(args: tuple) -> Calls:
    a, a_scale, b, b_scale, group_offsets, _ = args

    def grouped_mm() -> Callable:
        ends = group_offsets[1:].contiguous()
        per_column = columns_of_scales(group_offsets)
        x, y = (
            (q.float() * scale[:, per_column]).bfloat16()
            for q, scale in ((a, a_scale), (b, b_scale))
        )
        return lambda: F.grouped_mm(x, y.t(), offs=ends)

    return {f"{GROUPED_MM}, bf16 out": prepared(grouped_mm)} | with_deep_gemm(
        lambda library: deep_gemm_k_grouped(library, *args)
    )


def columns_of_scales(group_offsets: Tensor) -> Tensor:
    """The column of a_scale for each column of a; the groups have all columns."""
    lengths, first, found = group_offsets.diff().tolist(), 0, []
    for length in lengths:
        found.append(first + torch.arange(length) // 128)
        first += -(-length // 128)
    return torch.cat(found).to(group_offsets.device)


def deep_gemm_k_grouped(library: ModuleType, a, a_scale, b, b_scale, group_offsets, c) -> Callable:
    """It takes each group's matrix for itself, one after the other, and adds to `d`."""
    lengths = group_offsets.diff()
    ks, d = lengths.tolist(), a.new_zeros((len(lengths), len(a), len(b)), dtype=torch.float32)
    if c is not None:
        d.copy_(c)
    parts = [
        (torch.cat([x.contiguous().flatten() for x in q.view(torch.uint8).split(ks, 1)]).view(FP8),
         scale[:, : sum(-(-k // 128) for k in ks)])
        for q, scale in ((a, a_scale), (b, b_scale))
    ]  # fmt: skip
    return lambda: library.k_grouped_fp8_gemm_nt_contiguous(*parts, d, ks, lengths, d) or d
