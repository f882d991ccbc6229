"""Casts to and from FP8, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["cast_back", "cast_per_block", "cast_per_token"]

FP8_MAX = 448.0
BLOCK = 128


def to_e4m3(x: Tensor) -> Tensor:
    """fp32 -> e4m3: nearest even, saturating (torch alone sends some overflows elsewhere)."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)  # clamp keeps NaN


def block_scale(amax: Tensor, scale_format: str) -> Tensor:
    """The scale of blocks whose largest magnitude is `amax`, fp32; NaN where that is inf or NaN."""
    scale = amax.clamp(min=1e-4) / FP8_MAX
    if scale_format == "ue8m0":
        scale = ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return torch.where(amax.isfinite(), scale, torch.nan)


def spread(scale: Tensor, block: Sequence[int], N: int, K: int) -> Tensor:
    """Each value's scale: [..., N, K] from one scale per block of (rows, cols)."""
    row = torch.arange(N, device=scale.device) // block[0]
    column = torch.arange(K, device=scale.device) // block[1]
    return scale[..., row, :][..., column]


def cast_per_token(x: Tensor, scale_format: str = "fp32") -> tuple[Tensor, Tensor]:
    K = x.shape[-1]
    blocks = F.pad(x.float(), (0, -K % BLOCK)).unflatten(-1, (-1, BLOCK))  # [..., K/128, 128]
    scale = block_scale(blocks.abs().amax(-1), scale_format)  # [..., K/128]
    q = to_e4m3(blocks * (1.0 / scale)[..., None]).flatten(-2)[..., :K]
    return q.contiguous(), scale


def cast_per_block(x: Tensor, scale_format: str = "fp32") -> tuple[Tensor, Tensor]:
    N, K = x.shape[-2:]
    padded = F.pad(x.float(), (0, -K % BLOCK, 0, -N % BLOCK))
    blocks = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    scale = block_scale(blocks.abs().amax((-3, -1)), scale_format)  # [..., N/128, K/128]
    q = to_e4m3(x.float() * spread(1.0 / scale, (BLOCK, BLOCK), N, K))
    return q.contiguous(), scale


def cast_back(q: Tensor, scale: Tensor, block: Sequence[int], out_dtype: torch.dtype) -> Tensor:
    return (q.float() * spread(scale, block, *q.shape[-2:])).to(out_dtype).contiguous()
