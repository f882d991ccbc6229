"""Plain PyTorch for the FP8 matrix products."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .quant import FP8, cast_back
from .registry import baseline, others


@baseline
def fp8_gemm_nt(a, a_scale, b, b_scale, out_dtype=torch.bfloat16, c=None) -> Tensor:
    """Dequantise both to bf16, F.linear."""
    a, b, out_dtype = _dequantised(a, a_scale, b, b_scale, out_dtype)
    out = F.linear(a, b).to(out_dtype)
    return out if c is None else (out + c).to(out_dtype)


def _dequantised(a, a_scale, b, b_scale, out_dtype) -> tuple[Tensor, Tensor, torch.dtype]:
    """Both factors in the 16-bit type that the product is made in."""
    wide = torch.bfloat16 if out_dtype == torch.float32 else out_dtype
    rows = 1 if b_scale.shape[0] == b.shape[0] else 128
    return (
        cast_back(a, a_scale, (1, 128), wide),
        cast_back(b, b_scale, (rows, 128), wide),
        out_dtype,
    )


@others("fp8_gemm_nt")
def other_fp8_gemm_nt(args: tuple) -> dict[str, Callable[[], object]]:
    a, b, out_dtype = _dequantised(*args[:5])
    found = {"bf16 F.linear, all dequantised before": lambda: F.linear(a, b).to(out_dtype)}
    if a.device.type == "cpu":  # what people run there
        wide_a, wide_b = a.float(), b.float()
        found["fp32 F.linear, all dequantised before"] = lambda: F.linear(wide_a, wide_b)
    return found


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


@baseline
def m_grouped_fp8_gemm_nt_masked(
    a, a_scale, b, b_scale, masked_m, out_dtype=torch.bfloat16, expected_m=None
) -> Tensor:
    """Dequantise all to bf16, torch.bmm, zero the unused rows."""
    rows, wide = (1 if b_scale.shape[1] == b.shape[1] else 128), torch.bfloat16
    x, w = cast_back(a, a_scale, (1, 128), wide), cast_back(b, b_scale, (rows, 128), wide)
    unused = torch.arange(a.shape[1], device=a.device) >= masked_m[:, None]
    return torch.bmm(x, w.mT).masked_fill(unused[:, :, None], 0).to(out_dtype)


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
