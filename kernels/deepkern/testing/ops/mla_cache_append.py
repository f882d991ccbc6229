"""Inputs, sizes, cost and baseline of mla_cache_append."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..caches import BF16, FP8, FP32, empty_cache, unpack
from ..costs import Cost, row_bytes, tensor_bytes
from . import Sizes, cast_per_token


def inputs(
    generator: Generator,
    T: int,
    R: int = 512,
    D: int = 64,
    page: int = 64,
    dtype: torch.dtype = BF16,
    cache_dtype: torch.dtype = BF16,
    norm: bool = True,
    rope: bool = True,
) -> tuple:
    device = generator.device
    scale = torch.exp2(torch.randn(T, 1, generator=generator, device=device).mul_(2))
    latent = (torch.randn(T, R, generator=generator, device=device) * scale).to(dtype)
    k_rope = torch.randn(T, D, generator=generator, device=device).to(dtype)
    blocks = -(-T // page) + 1
    cache = empty_cache(generator, blocks, page, R, D, cache_dtype)
    slot = torch.randperm(blocks * page, generator=generator, device=device)[:T]
    slot[1::7] = -1
    weight = 1 + 0.1 * torch.randn(R, generator=generator, device=device)
    positions = torch.randint(0, 4 * T + 1, (T,), generator=generator, device=device)
    table = rope_table(4 * T + 1, D, device) if rope else None
    return (
        latent,
        k_rope,
        cache,
        slot,
        weight.to(dtype) if norm else None,
        positions if rope else None,
        table,
    )


SIZES = Sizes(
    small=[
        {"T": 11},
        {"T": 9, **FP8},
        {"T": 5, "R": 130, "D": 6, "page": 3, **FP8, "dtype": torch.float32},
        {"T": 6, "R": 48, "D": 16, "page": 1, **FP32},
        {"T": 3, "norm": False, "rope": False, "dtype": torch.float16},
        {"T": 0},
    ],
    cpu=[{"T": 512}, {"T": 512, **FP8}],
    gpu=[{"T": 128}, {"T": 8192}, {"T": 8192, **FP8}],
    inspect=[{"T": 8192}, {"T": 8192, **FP8}],
)
EXACT = True


def cost(latent: Tensor, k_rope: Tensor, cache: Tensor, slot_mapping: Tensor, **rest) -> Cost:
    written = int((slot_mapping >= 0).sum()) * row_bytes(cache)
    return Cost(tensor_bytes(latent, k_rope, slot_mapping) + written)


def baseline(
    latent, k_rope, cache, slot_mapping, norm_weight=None, positions=None, cos_sin=None, eps=1e-6
) -> None:
    """RMS norm, RoPE and index_put, op by op."""
    slots = cache.shape[0] * cache.shape[1]
    valid = (slot_mapping >= 0) & (slot_mapping < slots)
    if positions is not None:
        valid &= (positions >= 0) & (positions < cos_sin.shape[0])
    latent, k_rope, slot_mapping = latent[valid].float(), k_rope[valid].float(), slot_mapping[valid]
    if norm_weight is not None:
        latent = F.rms_norm(latent, latent.shape[-1:], norm_weight.float(), eps)
    if positions is not None:
        cos, sin = cos_sin[positions[valid]].chunk(2, -1)
        even, odd = k_rope[..., 0::2], k_rope[..., 1::2]
        k_rope = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
    if cache.dtype == torch.uint8:
        parts = (*cast_per_token.baseline(latent), k_rope.bfloat16())
        entry = torch.cat([part.contiguous().view(torch.uint8) for part in parts], -1)
    else:
        entry = torch.cat([latent, k_rope], -1).to(cache.dtype)
    page = cache.shape[1]
    cache[slot_mapping // page, slot_mapping % page, 0] = entry


def readable(output: Tensor, latent: Tensor, **rest) -> Tensor:
    """An FP8 cache is unpacked."""
    return unpack(output, latent.shape[-1]) if output.dtype == torch.uint8 else output


def rope_table(positions: int, D: int, device: torch.device) -> Tensor:
    """fp32 [positions, D] = [cos | sin] of the usual D/2 frequencies."""
    exponent = torch.arange(0, D, 2, device=device, dtype=torch.float64) / max(D, 1)
    angles = torch.arange(positions, device=device)[:, None] * 10000.0**-exponent
    return torch.cat((angles.cos(), angles.sin()), dim=1).float()
