"""Casts the indexer's new keys to FP8 and writes them into its paged cache.

    scale[t]       = max(|k[t]|, 1e-4) / 448         (rounded up to 2^n for ue8m0)
    cache[slot[t]] = e4m3(k[t] * (1 / scale[t])), scale[t]

Cut: a program takes ROWS whole tokens. Each value is read once and written once, and the speed is
that of memory. indexer_cache.py has the layout of the cache.

Source: DeepSeek-V3.2 (arXiv 2512.02556), section 2.1; the layout is DeepGEMM's and vLLM's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv, next_power_of_2
from ..quant.fp8 import block_scale, magnitude_bits, to_fp8
from ..runtime import arch
from ..runtime.contract import FP8, check_choice, check_that
from ..runtime.op import op
from .cache import store
from .indexer_cache import check_pages, page_parts


@op(
    mutates=("cache",),
    k="real [T, D]",
    cache="uint8 [blocks, page, 1, _]",
    slot_mapping="int64 [T]",
)
def indexer_cache_append(
    k: Tensor, cache: Tensor, slot_mapping: Tensor, scale_format: str = "fp32"
) -> None:
    """Writes T keys into the indexer's paged cache as FP8, one scale each, in place.

    Args:
        k: bf16, fp16 or fp32 [T, D], rotated and normalised as the model has it; D <= 8192.
        cache: uint8 [blocks, page, 1, D + 4]: in the bytes of a page first the D e4m3 values of
            each of its tokens, then the fp32 scale of each. Pages may be strided.
        slot_mapping: int64 [T], where each key goes: block * page + offset. A key whose slot is
            negative or past the end is skipped. Two keys of one slot are the caller's error.
        scale_format: "fp32", or "ue8m0" to round every scale up to a power of two.

    inf or NaN makes its whole token NaN; a token of zeros gets the scale 1e-4/448.

    Raises:
        TypeError, ValueError: an argument is not as above; with DEEPKERN_DEBUG=1 also for slots
            out of range (a slot of -1 apart) and slots that occur twice.
    """
    D = k.shape[1]
    check_that("indexer_cache_append", "k", D <= 8192, "at most 8192 columns",
               f"shape {tuple(k.shape)}")  # fmt: skip
    check_pages("indexer_cache_append", cache, D)
    check_choice("indexer_cache_append", "scale_format", scale_format, ("fp32", "ue8m0"))


@indexer_cache_append.op.register_launcher("triton")
def _launch_triton(k: Tensor, cache: Tensor, slot_mapping: Tensor, scale_format: str) -> None:
    indexer_cache_append.op.allocate(k, cache, slot_mapping, scale_format)
    (T, D), (blocks, page) = k.shape, cache.shape[:2]
    if T == 0 or cache.numel() == 0:
        return
    native_fp8 = arch.of(cache.device).native_fp8_cast
    values, scales = page_parts(cache, FP8 if native_fp8 else torch.uint8)
    D_TILE = max(next_power_of_2(D), 16)
    ROWS = max(2048 // D_TILE, 1)
    indexer_cache_append_kernel[(cdiv(T, ROWS),)](
        k, values, scales, slot_mapping, T, D, blocks * page, page,
        k.stride(0), values.stride(0), scales.stride(0),
        UE8M0=scale_format == "ue8m0", NATIVE_FP8=native_fp8, ROWS=ROWS, D_TILE=D_TILE, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def indexer_cache_append_kernel(
    k_ptr, values_ptr, scales_ptr, slot_ptr, T, D, slots, page,
    k_row, values_block, scales_block,
    UE8M0: tl.constexpr, NATIVE_FP8: tl.constexpr, ROWS: tl.constexpr, D_TILE: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    slot = tl.load(slot_ptr + row, mask=row < T, other=-1)  # [ROWS]
    kept = (slot >= 0) & (slot < slots)
    block, offset = slot // page, slot % page
    column = tl.arange(0, D_TILE)[None, :]
    inside = kept[:, None] & (column < D)
    k = tl.load(k_ptr + row[:, None] * k_row + column, mask=inside, other=0.0).to(tl.float32)
    scale = block_scale(tl.max(magnitude_bits(k), 1), UE8M0)  # [ROWS]
    q = to_fp8(k * tl.div_rn(1.0, scale)[:, None], NATIVE_FP8)  # [ROWS, D_TILE]
    tl.store(values_ptr + (block * values_block + offset * D)[:, None] + column, q, mask=inside)
    store(scales_ptr + block * scales_block, offset, scale, kept)


@indexer_cache_append.op.register_debug_check
def check_contents(k: Tensor, cache: Tensor, slot_mapping: Tensor, scale_format: str) -> None:
    slots = cache.shape[0] * cache.shape[1]
    used = slot_mapping[slot_mapping != -1]
    wrong = used[(used < 0) | (used >= slots)]
    check_that("indexer_cache_append", "slot_mapping", wrong.numel() == 0,
               f"slots in [-1, {slots})", wrong[:1].tolist())  # fmt: skip
    unique, count = used.unique(return_counts=True)
    check_that("indexer_cache_append", "slot_mapping", bool((count == 1).all()),
               "each slot once", f"{unique[count > 1][:1].tolist()} more than once")  # fmt: skip
