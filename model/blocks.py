"""FP8 weights in blocks, in plain PyTorch: how a checkpoint is written and how an oracle reads it.

    scale[i, j] = max(|block[i, j]|, 1e-4) / 448        q = e4m3(w * (1 / scale))

The scale multiplies to dequantise (`weight_scale_inv` in checkpoints); edge blocks are partial.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
E4M3_MAX = 448.0


def quantise_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """real [N, K] -> e4m3 [N, K] and fp32 scales [⌈N/128⌉, ⌈K/128⌉] that multiply to dequantise."""
    rows, columns = weight.shape
    pad = (0, -columns % BLOCK, 0, -rows % BLOCK)
    blocks = torch.nn.functional.pad(weight.float(), pad).unflatten(0, (-1, BLOCK))
    blocks = blocks.unflatten(2, (-1, BLOCK))  # [rows / 128, 128, columns / 128, 128]
    scale = blocks.abs().amax((1, 3)).clamp(min=1e-4) / E4M3_MAX
    scaled = blocks * (1 / scale)[:, None, :, None]
    codes = scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    codes = codes.view(torch.uint8).flatten(2).flatten(0, 1)[:rows, :columns]
    return codes.contiguous().view(torch.float8_e4m3fn), scale


def dequantise_blocks(codes: Tensor, scale: Tensor, block: tuple[int, int] = (128, 128)) -> Tensor:
    """e4m3 [N, K] and one scale per block -> the fp32 weight that they stand for."""
    wide = scale.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return codes.float() * wide[: codes.shape[0], : codes.shape[1]]
