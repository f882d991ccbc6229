"""Writes new tokens into the latent cache, after their RMSNorm and rotation.

    latent'[t] = latent[t] / sqrt(mean(latent[t]^2) + eps) * norm_weight     (RMSNorm, if given)
    rope'[t]   = k_rope[t], each pair (2i, 2i+1) rotated by its position's angle  (if given)
    cache[slot[t]] = (latent'[t], rope'[t]), rounded once to the cache's format

Parallelization: one program takes ROWS whole tokens and keeps their latents in registers between
the norm and the cast. Each value is read once and written once; the speed is limited by memory
bandwidth.

The result equals the reference bitwise: every sum has a fixed order (squares are added pairwise,
neighbours first), and no multiplication is fused with an addition.

Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1; the FP8 format is DeepSeek-V3.2's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv, inverse_rms, next_power_of_2, sum_pairwise
from ..quant.fp8 import block_scale, magnitude_bits, to_fp8
from ..runtime import arch
from ..runtime.contract import FP8, check_that
from ..runtime.op import op
from .cache import cache_view, check_width, store


@op(
    mutates=("cache",),
    latent="real [T, R]",
    k_rope="real [T, D]",
    cache="real|uint8 [blocks, page, 1, _]",
    slot_mapping="int64 [T]",
    norm_weight="real [R]",
    positions="int64 [T]",
    cos_sin="fp32 [_, D]",
)
def mla_cache_append(
    latent: Tensor,
    k_rope: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
    norm_weight: Tensor | None = None,
    positions: Tensor | None = None,
    cos_sin: Tensor | None = None,
    eps: float = 1e-6,
) -> None:
    """Writes T tokens into the paged latent cache, in place.

        deepkern.mla_cache_append(latent, k_rope, cache, slot_mapping)

    Args:
        latent: bf16, fp16 or fp32 [T, R], the compressed keys and values.
        k_rope: bf16, fp16 or fp32 [T, D], the part of the key that all heads use.
        cache: [blocks, page, 1, R + D] in bf16, fp16 or fp32, or in the FP8 format uint8
            [blocks, page, 1, R + 4 * ceil(R / 128) + 2 * D]: R e4m3 latents, one fp32 scale
            per 128 of them (as of `cast_per_token`), D bf16 RoPE values. Its pages may be
            strided; the tokens of two pages must not overlap.
        slot_mapping: int64 [T], the slot of each token: block * page + offset. A token whose
            slot is negative or past the end is skipped. If two tokens have the same slot, the
            result there is undefined.
        norm_weight: real [R]; if given, the latents are first RMS-normalised in fp32.
        positions, cos_sin: int64 [T] and fp32 [max_positions, D] = [cos | sin] of D/2 angles,
            both or neither. If given, each pair (2i, 2i + 1) of `k_rope` is rotated in fp32 and
            stored at the same indices. A token whose position is not in the table is skipped.
        eps: added to the mean of squares in the RMSNorm.

    Raises:
        TypeError, ValueError: an argument does not match the above; with DEEPKERN_DEBUG=1 also for
            slots and positions out of range (except a slot of -1) and for repeated slots.
    """
    D = k_rope.shape[1]
    check_width("mla_cache_append", cache, latent.shape[1], D)
    for name, given, other in (
        ("positions", positions, cos_sin),
        ("cos_sin", cos_sin, positions),
    ):
        check_that("mla_cache_append", name, given is not None or other is None,
                   "positions and cos_sin together, or neither", "None")  # fmt: skip
    check_that("mla_cache_append", "k_rope", positions is None or D % 2 == 0,
               "an even number of values to rotate in pairs",
               f"shape {tuple(k_rope.shape)}")  # fmt: skip


@mla_cache_append.op.register_launcher("triton")
def _launch_triton(
    latent, k_rope, cache, slot_mapping, norm_weight, positions, cos_sin, eps
) -> None:
    mla_cache_append.op.allocate(
        latent, k_rope, cache, slot_mapping, norm_weight, positions, cos_sin, eps
    )
    (T, R), D = latent.shape, k_rope.shape[1]
    num_pages, page_size = cache.shape[:2]
    if T == 0 or cache.numel() == 0:
        return
    native_fp8 = arch.of(cache.device).native_fp8_cast
    view = cache_view(cache, R, FP8 if native_fp8 else torch.uint8)
    R_TILE, D_TILE = max(next_power_of_2(R), 128), max(next_power_of_2(D), 2)
    ROWS = max(2048 // R_TILE, 1)  # 2048 latents: 16 per thread of 4 warps
    mla_cache_append_kernel[(cdiv(T, ROWS),)](
        latent, k_rope, view, slot_mapping, norm_weight, positions, cos_sin,
        T, R, D, num_pages * page_size, page_size, eps,
        cos_sin.shape[0] if cos_sin is not None else 0,
        latent.stride(0), k_rope.stride(0), cos_sin.stride(0) if cos_sin is not None else 0,
        FP8_CACHE=cache.dtype == torch.uint8, NATIVE_FP8=native_fp8,
        ROWS=ROWS, R_TILE=R_TILE, D_TILE=D_TILE, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def mla_cache_append_kernel(
    latent_ptr,  # [T, R]
    rope_ptr,  # [T, D]
    cache,  # CacheView, written
    slot_ptr,  # int64 [T]
    weight_ptr,  # [R], or None: no RMSNorm
    position_ptr,  # int64 [T], or None: no rotation
    cos_sin_ptr,  # fp32 [max_positions, D], or None
    T,
    R,
    D,
    num_slots,
    page_size,  # tokens
    eps,
    max_positions,
    latent_stride,  # elements from row to row
    rope_stride,
    cos_sin_stride,
    FP8_CACHE: tl.constexpr,  # whether the cache has the FP8 format
    NATIVE_FP8: tl.constexpr,  # whether the target converts to e4m3 itself
    ROWS: tl.constexpr,  # tokens of a program
    R_TILE: tl.constexpr,  # R rounded up to a power of two, at least 128
    D_TILE: tl.constexpr,  # D rounded up to a power of two, at least 2
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    slot = tl.load(slot_ptr + row, mask=row < T, other=-1)  # [ROWS]
    row_mask = (slot >= 0) & (slot < num_slots)
    if position_ptr is not None:
        position = tl.load(position_ptr + row, mask=row_mask, other=-1)
        row_mask &= (position >= 0) & (position < max_positions)
    page, offset = slot // page_size, slot % page_size

    # Latents: RMSNorm, then the cast.
    column = tl.arange(0, R_TILE)
    mask = row_mask[:, None] & (column < R)[None, :]
    latent = tl.load(latent_ptr + row[:, None] * latent_stride + column, mask=mask, other=0.0)
    latent = latent.to(tl.float32)  # [ROWS, R_TILE]
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=column < R, other=0.0).to(tl.float32)
        inverse = inverse_rms(sum_pairwise(latent * latent), R, eps)  # [ROWS]
        latent = latent * inverse[:, None] * weight
    at = page * cache.latent_page_stride + offset * cache.latent_token_stride
    out = cache.latent + at[:, None]
    if FP8_CACHE:
        blocked = tl.reshape(latent, (ROWS, R_TILE // 128, 128))
        scale = block_scale(tl.max(magnitude_bits(blocked), 2), False)  # [ROWS, R_TILE / 128]
        q = to_fp8(blocked * tl.div_rn(1.0, scale)[:, :, None], NATIVE_FP8)
        tl.store(out + column, tl.reshape(q, (ROWS, R_TILE)), mask=mask)
        at = page * cache.scale_page_stride + offset * cache.scale_token_stride
        out = cache.scale + at[:, None]
        index = tl.arange(0, R_TILE // 128)
        store(out, index[None, :], scale, row_mask[:, None] & (index < tl.cdiv(R, 128))[None, :])
    else:
        tl.store(out + column, latent.to(cache.latent.dtype.element_ty), mask=mask)

    # RoPE values: rotation, then the cast.
    column = tl.arange(0, D_TILE)
    mask = row_mask[:, None] & (column < D)[None, :]
    rope = tl.load(rope_ptr + row[:, None] * rope_stride + column, mask=mask, other=0.0)
    rope = rope.to(tl.float32)  # [ROWS, D_TILE]
    if position_ptr is not None:
        pair = tl.arange(0, D_TILE // 2)
        angle = cos_sin_ptr + position[:, None] * cos_sin_stride + pair
        pair_mask = row_mask[:, None] & (pair < D // 2)[None, :]
        cos = tl.load(angle, mask=pair_mask, other=1.0)  # [ROWS, D_TILE / 2]
        sin = tl.load(angle + D // 2, mask=pair_mask, other=0.0)
        even, odd = tl.split(tl.reshape(rope, (ROWS, D_TILE // 2, 2)))
        rotated = tl.join(even * cos - odd * sin, odd * cos + even * sin)
        rope = tl.reshape(rotated, (ROWS, D_TILE))
    at = page * cache.rope_page_stride + offset * cache.rope_token_stride
    out = cache.rope + at[:, None]
    rope = rope.to(tl.bfloat16 if FP8_CACHE else cache.rope.dtype.element_ty)
    store(out, column[None, :], rope, mask)


@mla_cache_append.op.register_debug_check
def check_contents(
    latent, k_rope, cache, slot_mapping, norm_weight, positions, cos_sin, eps
) -> None:
    num_slots = cache.shape[0] * cache.shape[1]
    slots = slot_mapping[slot_mapping != -1]
    wrong = slots[(slots < 0) | (slots >= num_slots)]
    check_that("mla_cache_append", "slot_mapping", wrong.numel() == 0,
               f"slots in [-1, {num_slots})", wrong[:1].tolist())  # fmt: skip
    unique, count = slots.unique(return_counts=True)
    check_that("mla_cache_append", "slot_mapping", bool((count == 1).all()),
               "each slot once", f"{unique[count > 1][:1].tolist()} more than once")  # fmt: skip
    if positions is not None:
        written = positions[slot_mapping != -1]
        wrong = written[(written < 0) | (written >= cos_sin.shape[0])]
        check_that("mla_cache_append", "positions", wrong.numel() == 0,
                   f"positions in [0, {cos_sin.shape[0]})", wrong[:1].tolist())  # fmt: skip
