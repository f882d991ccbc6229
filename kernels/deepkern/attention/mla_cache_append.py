"""Writes new tokens into the latent cache, with the norm and the rotation that precede it.

    latent'[t] = latent[t] / sqrt(mean(latent[t]^2) + eps) * norm_weight     (RMSNorm, if given)
    rope'[t]   = k_rope[t], each pair (2i, 2i+1) turned by the angle of its position  (if given)
    cache[slot[t]] = (latent'[t], rope'[t]), rounded once to the cache's format

Cut: a program takes ROWS whole tokens; a token's latents stay in registers between the norm and
the cast. Each value is read once and written once, and the speed is that of memory.

The result is the reference's bit for bit, so every sum has a fixed order: squares are added
pairwise, neighbours first, and no multiplication is fused with an addition.

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
from .cache import check_width, parts, store, strides


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

    Args:
        latent: bf16, fp16 or fp32 [T, R], the compressed keys and values.
        k_rope: bf16, fp16 or fp32 [T, D], the part of the key that all heads share.
        cache: [blocks, page, 1, R + D] in bf16, fp16 or fp32, or in the FP8 format uint8
            [blocks, page, 1, R + 4 * ceil(R / 128) + 2 * D]: R e4m3 latents, one fp32 scale
            per 128 of them (as `cast_per_token` makes it), D bf16 RoPE values. Its pages may
            be strided; the tokens of two pages must not overlap.
        slot_mapping: int64 [T], where each token goes: block * page + offset. A token whose
            slot is negative or past the end is skipped. Two tokens of one slot are the
            caller's error: either may win, or a mixture.
        norm_weight: real [R]; given, the latents are first RMS-normalised in fp32.
        positions, cos_sin: int64 [T] and fp32 [max_positions, D] = [cos | sin] of D/2 angles;
            given (both or neither), each pair (2i, 2i + 1) of `k_rope` is rotated in fp32 and
            stored in its place. A token whose position is not in the table is skipped.
        eps: what the RMSNorm adds to the mean of squares.

    Raises:
        TypeError, ValueError: an argument is not as above; with DEEPKERN_DEBUG=1 also for slots
            and positions out of range (a slot of -1 apart) and slots that occur twice.
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
    blocks, page = cache.shape[:2]
    if T == 0 or cache.numel() == 0:
        return
    native_fp8 = arch.of(cache.device).native_fp8_cast
    cached = parts(cache, R, FP8 if native_fp8 else torch.uint8)
    R_TILE, D_TILE = max(next_power_of_2(R), 128), max(next_power_of_2(D), 2)
    ROWS = max(2048 // R_TILE, 1)
    mla_cache_append_kernel[(cdiv(T, ROWS),)](
        latent, k_rope, *cached, slot_mapping, norm_weight, positions, cos_sin,
        T, R, D, blocks * page, page, eps, cos_sin.shape[0] if cos_sin is not None else 0,
        latent.stride(0), k_rope.stride(0), cos_sin.stride(0) if cos_sin is not None else 0,
        *strides(*cached),
        FP8_CACHE=cache.dtype == torch.uint8, NATIVE_FP8=native_fp8,
        ROWS=ROWS, R_TILE=R_TILE, D_TILE=D_TILE, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def mla_cache_append_kernel(
    latent_ptr, rope_ptr, out_latent_ptr, out_scale_ptr, out_rope_ptr,
    slot_ptr, weight_ptr, position_ptr, cos_sin_ptr,
    T, R, D, slots, page, eps, max_positions,
    latent_stride, rope_stride, cos_sin_stride,
    out_latent_block, out_latent_slot, out_scale_block, out_scale_slot,
    out_rope_block, out_rope_slot,
    FP8_CACHE: tl.constexpr, NATIVE_FP8: tl.constexpr,
    ROWS: tl.constexpr, R_TILE: tl.constexpr, D_TILE: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    slot = tl.load(slot_ptr + row, mask=row < T, other=-1)  # [ROWS]
    kept = (slot >= 0) & (slot < slots)
    if position_ptr is not None:
        position = tl.load(position_ptr + row, mask=kept, other=-1)
        kept &= (position >= 0) & (position < max_positions)
    block, offset = slot // page, slot % page

    column = tl.arange(0, R_TILE)
    inside = kept[:, None] & (column < R)[None, :]
    latent = tl.load(latent_ptr + row[:, None] * latent_stride + column, mask=inside, other=0.0)
    latent = latent.to(tl.float32)  # [ROWS, R_TILE]
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=column < R, other=0.0).to(tl.float32)
        inverse = inverse_rms(sum_pairwise(latent * latent), R, eps)  # [ROWS]
        latent = latent * inverse[:, None] * weight
    out = out_latent_ptr + (block * out_latent_block + offset * out_latent_slot)[:, None]
    if FP8_CACHE:
        blocked = tl.reshape(latent, (ROWS, R_TILE // 128, 128))
        scale = block_scale(tl.max(magnitude_bits(blocked), 2), False)  # [ROWS, R_TILE / 128]
        q = to_fp8(blocked * tl.div_rn(1.0, scale)[:, :, None], NATIVE_FP8)
        tl.store(out + column, tl.reshape(q, (ROWS, R_TILE)), mask=inside)
        out = out_scale_ptr + (block * out_scale_block + offset * out_scale_slot)[:, None]
        index = tl.arange(0, R_TILE // 128)
        store(out, index[None, :], scale, kept[:, None] & (index < tl.cdiv(R, 128))[None, :])
    else:
        tl.store(out + column, latent.to(out_latent_ptr.dtype.element_ty), mask=inside)

    column = tl.arange(0, D_TILE)
    inside = kept[:, None] & (column < D)[None, :]
    rope = tl.load(rope_ptr + row[:, None] * rope_stride + column, mask=inside, other=0.0)
    rope = rope.to(tl.float32)  # [ROWS, D_TILE]
    if position_ptr is not None:
        pair = tl.arange(0, D_TILE // 2)
        angle = cos_sin_ptr + position[:, None] * cos_sin_stride + pair
        known = kept[:, None] & (pair < D // 2)[None, :]
        cos = tl.load(angle, mask=known, other=1.0)  # [ROWS, D_TILE / 2]
        sin = tl.load(angle + D // 2, mask=known, other=0.0)
        even, odd = tl.split(tl.reshape(rope, (ROWS, D_TILE // 2, 2)))
        turned = tl.join(even * cos - odd * sin, odd * cos + even * sin)
        rope = tl.reshape(turned, (ROWS, D_TILE))
    out = out_rope_ptr + (block * out_rope_block + offset * out_rope_slot)[:, None]
    rope = rope.to(tl.bfloat16 if FP8_CACHE else out_rope_ptr.dtype.element_ty)
    store(out, column[None, :], rope, inside)


@mla_cache_append.op.register_debug_check
def check_contents(
    latent, k_rope, cache, slot_mapping, norm_weight, positions, cos_sin, eps
) -> None:
    slots = cache.shape[0] * cache.shape[1]
    used = slot_mapping[slot_mapping != -1]
    wrong = used[(used < 0) | (used >= slots)]
    check_that("mla_cache_append", "slot_mapping", wrong.numel() == 0,
               f"slots in [-1, {slots})", wrong[:1].tolist())  # fmt: skip
    unique, count = used.unique(return_counts=True)
    check_that("mla_cache_append", "slot_mapping", bool((count == 1).all()),
               "each slot once", f"{unique[count > 1][:1].tolist()} more than once")  # fmt: skip
    if positions is not None:
        used = positions[slot_mapping != -1]
        wrong = used[(used < 0) | (used >= cos_sin.shape[0])]
        check_that("mla_cache_append", "positions", wrong.numel() == 0,
                   f"positions in [0, {cos_sin.shape[0]})", wrong[:1].tolist())  # fmt: skip
