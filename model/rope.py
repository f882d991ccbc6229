"""Rotary position embedding, with YaRN for long contexts.

Position p rotates pair i by the angle p·f_i with f_i = theta^(-2i/rope).  YaRN lowers the frequency
of the pairs that turn rarely within the original context, which makes a longer context look like
it.

Source: RoFormer (arXiv:2104.09864); YaRN (arXiv:2309.00071).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.config import Config, yarn_mscale


def rope_frequencies(config: Config) -> Tensor:
    """Angle per position of each rotary pair, fp32 [rope/2].

    YaRN keeps the frequency of pairs that turn more than beta_fast times in the original context,
    divides by `factor` that of pairs that turn less than beta_slow times, and interpolates between.
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
    ramp = ramp.clamp(0, 1)
    return frequency / yarn["factor"] * ramp + frequency * (1 - ramp)


def rope_cos_sin(config: Config, length: int) -> Tensor:
    """[cos | sin] of positions 0 to length - 1, fp32 [length, rope], times YaRN's factor."""
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


def pair_factors(cos_sin: Tensor) -> tuple[Tensor, Tensor]:
    """[cos | sin] fp32 [..., rope] -> the factors of a value and of its partner, [..., rope] each.

    Of a pair (a, b): a·cos - b·sin and b·cos + a·sin.
    """
    cos, sin = cos_sin.chunk(2, -1)
    return cos.repeat_interleave(2, -1), torch.stack([-sin, sin], -1).flatten(-2)


def interleave_pairs(x: Tensor) -> Tensor:
    """Moves pairs (i, i + rope/2) of the last dimension to (2i, 2i + 1)."""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def split_pairs(x: Tensor) -> Tensor:
    """Moves pairs (2i, 2i + 1) of the last dimension to (i, i + rope/2)."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the adjacent pairs of x [..., rope] in fp32, by `pair_factors`; x's dtype.

    Each operation is rounded once, so that the bits do not depend on the number of rows.
    """
    real = x.float()
    partner = real.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (real * cos + partner * sin).to(x.dtype)
