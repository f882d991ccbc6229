"""Rotary position embedding over interleaved pairs, with YaRN's stretched frequencies.

Position p turns pair i by the angle p·f_i, f_i = theta^(-2i/rope).  YaRN (arXiv:2309.00071) slows
the pairs that turn rarely within the original context, so that a longer context looks like it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.config import Config, yarn_mscale


def rope_frequencies(config: Config) -> Tensor:
    """Angle per position of each rotary pair, fp32 [rope/2].

    YaRN: pairs that turn more than beta_fast times in the original context keep their frequency,
    pairs that turn less than beta_slow times are slowed by `factor`, with a ramp between.
    """
    dim, base, yarn = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    pair = torch.arange(0, dim, 2, dtype=torch.float32)
    frequency = 1.0 / base ** (pair / dim)
    if not yarn:
        return frequency
    original = yarn.get("original_max_position_embeddings") or config.max_position_embeddings

    def pair_with_turns(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = pair_with_turns(yarn.get("beta_fast") or 32)
    high = pair_with_turns(yarn.get("beta_slow") or 1)
    if yarn.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)
    slowed = ramp.clamp(0, 1)
    return frequency / yarn["factor"] * slowed + frequency * (1 - slowed)


def rope_table(config: Config, length: int) -> Tensor:
    """[cos | sin] of every position, fp32 [length, rope]."""
    frequency = rope_frequencies(config)
    angle = torch.arange(length, dtype=torch.float32)[:, None] * frequency
    yarn, scale = config.rope_scaling, 1.0
    if yarn:
        scale = yarn.get("attention_factor")
        if scale is None:
            all_dim = yarn.get("mscale_all_dim") or 0
            mscale = yarn.get("mscale") or 1
            both = bool(yarn.get("mscale") and all_dim)
            scale = yarn_mscale(yarn["factor"], mscale if both else 1)
            scale /= yarn_mscale(yarn["factor"], all_dim) if both else 1
    return torch.cat([angle.cos(), angle.sin()], -1) * scale


def rope(x: Tensor, table: Tensor, interleave: bool = True) -> Tensor:
    """Rotates pairs of the last dimension; x [B, S, ..., rope], table [S, rope] or [B, S, rope].

    A pair is two neighbours (DeepSeek), or i and i + rope/2 when not `interleave`; the result is
    interleaved either way, which queries and keys agree on.
    """
    if not interleave:
        x = x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    table = table.view(*table.shape[:-1], *(1,) * (x.dim() - 3), table.shape[-1])
    cos, sin = table.chunk(2, -1)
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).to(x.dtype)
