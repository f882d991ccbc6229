"""Casts the indexer's new keys to FP8 and writes them into its paged cache.

    scale[t]       = max(|k[t]|, 1e-4) / 448         (rounded up to 2^n for ue8m0)
    cache[slot[t]] = e4m3(k[t] * (1 / scale[t])), scale[t]

Parallelization: one program writes ROWS whole tokens. indexer_cache.py has the cache's layout.

Limit: memory bandwidth; each value is read once and written once.

Source: DeepSeek-V3.2 (arXiv 2512.02556), section 2.1; the layout is that of DeepGEMM and vLLM.
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
from .indexer_cache import check_pages, page_views


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
        k: bf16, fp16 or fp32 [T, D], D <= 8192, after the model's norm and rotation. Rows may be
            strided.
        cache: uint8 [num_pages, page_size, 1, D + 4]. The bytes of a page are the D e4m3 values of
            each of its tokens, then the fp32 scale of each. Pages may be strided.
        slot_mapping: int64 [T], the slot of each key: page * page_size + offset. Keys with a slot
            outside the cache are skipped. Slots must not repeat; the result is then undefined.
        scale_format: "fp32", or "ue8m0" to round every scale up to a power of two.

    inf or NaN makes its whole token NaN. A token of zeros has the scale 1e-4/448.

    Raises:
        TypeError, ValueError: an argument is not as above; with DEEPKERN_DEBUG=1 also for slots
            out of range, other than -1, and for repeated slots.

    Example:
        >>> cache = torch.zeros(4, 64, 1, 132, dtype=torch.uint8)
        >>> deepkern.indexer_cache_append(torch.randn(100, 128), cache, torch.arange(100))
    """
    D = k.shape[1]
    check_that("indexer_cache_append", "k", D <= 8192, "at most 8192 columns",
               f"shape {tuple(k.shape)}")  # fmt: skip
    check_pages("indexer_cache_append", cache, D)
    check_choice("indexer_cache_append", "scale_format", scale_format, ("fp32", "ue8m0"))


@indexer_cache_append.op.register_launcher("triton")
def _launch_triton(k: Tensor, cache: Tensor, slot_mapping: Tensor, scale_format: str) -> None:
    indexer_cache_append.op.allocate(k, cache, slot_mapping, scale_format)
    (T, D), (num_pages, page_size) = k.shape, cache.shape[:2]
    if T == 0 or cache.numel() == 0:
        return
    native_fp8 = arch.of(cache.device).native_fp8_cast
    values, scales = page_views(cache, FP8 if native_fp8 else torch.uint8)
    D_TILE = max(next_power_of_2(D), 16)
    ROWS = max(2048 // D_TILE, 1)
    indexer_cache_append_kernel[(cdiv(T, ROWS),)](
        k, values, scales, slot_mapping, T, D, num_pages * page_size, page_size,
        k.stride(0), values.stride(0), scales.stride(0),
        UE8M0=scale_format == "ue8m0", NATIVE_FP8=native_fp8, ROWS=ROWS, D_TILE=D_TILE, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def indexer_cache_append_kernel(
    k_ptr,  # real [T, D]
    values_ptr,  # FP8 or its bytes [num_pages, page_size * D]
    scales_ptr,  # fp32 [num_pages, page_size], or its bytes
    slot_mapping_ptr,  # int64 [T]
    T,
    D,
    num_slots,
    page_size,  # tokens
    k_row_stride,  # elements
    values_page_stride,  # elements
    scales_page_stride,  # elements
    UE8M0: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    ROWS: tl.constexpr,  # tokens per program
    D_TILE: tl.constexpr,  # D, rounded up to a power of two
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + row, mask=row < T, other=-1)  # [ROWS]
    slot_mask = (slot >= 0) & (slot < num_slots)
    page, offset = slot // page_size, slot % page_size
    column = tl.arange(0, D_TILE)[None, :]
    mask = slot_mask[:, None] & (column < D)
    k = tl.load(k_ptr + row[:, None] * k_row_stride + column, mask=mask, other=0.0).to(tl.float32)
    scale = block_scale(tl.max(magnitude_bits(k), 1), UE8M0)  # [ROWS]
    q = to_fp8(k * tl.div_rn(1.0, scale)[:, None], NATIVE_FP8)  # [ROWS, D_TILE]
    token_ptrs = values_ptr + (page * values_page_stride + offset * D)[:, None]
    tl.store(token_ptrs + column, q, mask=mask)
    store(scales_ptr + page * scales_page_stride, offset, scale, slot_mask)


@indexer_cache_append.op.register_debug_check
def check_contents(k: Tensor, cache: Tensor, slot_mapping: Tensor, scale_format: str) -> None:
    """For DEEPKERN_DEBUG=1: slots are -1 or inside the cache, and do not repeat."""
    num_slots = cache.shape[0] * cache.shape[1]
    slots = slot_mapping[slot_mapping != -1]
    wrong = slots[(slots < 0) | (slots >= num_slots)]
    check_that("indexer_cache_append", "slot_mapping", wrong.numel() == 0,
               f"slots in [-1, {num_slots})", wrong[:1].tolist())  # fmt: skip
    unique, count = slots.unique(return_counts=True)
    check_that("indexer_cache_append", "slot_mapping", bool((count == 1).all()),
               "each slot once", f"{unique[count > 1][:1].tolist()} more than once")  # fmt: skip
