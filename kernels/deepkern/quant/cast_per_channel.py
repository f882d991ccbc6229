"""FP8 cast along the rows: one scale per column and block of 128 rows, transposed if asked.

    scale[i, k] = max(|x[128i : 128i+128, k]|, 1e-4) / 448        (rounded up to 2^n for ue8m0)
    q[m, k]     = e4m3(x[m, k] * (1 / scale[m // 128, k]))        or q[k, m], scale[k, i]

It is what a product that sums over the rows takes, as that of a weight's gradient does: transposed,
both operands have the values that are multiplied side by side. With groups, the blocks restart at
each group's first row.

Cut: a program takes one block of 64 columns and holds it in registers between finding the largest
magnitudes and casting. It reads 128-byte lines of bf16; transposed, the codes change hands in
shared memory, and it writes 128-byte lines too. Each value is read once and written once: 3 bytes
a value in bf16, and the speed is that of memory. Each program finds its block among the groups for
itself, from all of the offsets.

Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.5.1, the 128x1 tiles of the
backward pass; DeepGEMM's k-grouped product for the layout of groups.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv, next_power_of_2
from ..runtime import arch
from ..runtime.contract import FP8, check_choice, check_that
from ..runtime.op import op
from .fp8 import (
    BLOCK,
    LAYOUTS,
    as_bits,
    block_scale,
    magnitude_bits,
    new_scale,
    to_fp8,
    with_padding,
)
from .groups import block_at, check_offsets, group_spans


@op(x="real [M, K]", group_offsets="int32 [_]")
def cast_per_channel(
    x: Tensor,
    scale_format: str = "fp32",
    group_offsets: Tensor | None = None,
    transpose: bool = False,
    scale_layout: str = "row",
) -> tuple[Tensor, Tensor]:
    """Casts `x` to FP8 with one scale per column and block of 128 rows.

    Args:
        x: bf16, fp16 or fp32 [M, K]; rows may be strided, the last dimension is contiguous.
        scale_format: "fp32", or "ue8m0" to round every scale up to a power of two.
        group_offsets: int32 [G + 1] on the device of `x`: group g is rows group_offsets[g] to
            group_offsets[g + 1], and the blocks restart at its first row. Without, all rows are one
            group. The offsets count as clamped to [0, M], then raised to the largest one before.
        transpose: q and scale come transposed, as `fp8_gemm_nt` and `k_grouped_fp8_gemm_nt` take an
            operand that they sum over M.
        scale_layout: "row" for a contiguous scale, "column" for one of the same shape with strides
            (1, pitch), `pitch` being its length rounded up to a multiple of 4; the padding holds
            zeros.

    Returns:
        q: float8_e4m3fn [M, K], or [K, M]; zeros in the rows of no group.
        scale: fp32 [blocks, K], or [K, blocks]. `blocks` is ceil(M / 128); with groups it is
            ceil(M / 128) + G, the blocks of group g come after those of the groups before it, and
            what is past the last block is zeros.

    A block of zeros gets the scale 1e-4/448. inf or NaN makes its whole block NaN.
    DEEPKERN_DEBUG=1 raises for offsets that do not ascend or leave [0, M].

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    name, (M, K) = "cast_per_channel", x.shape
    check_choice(name, "scale_format", scale_format, ("fp32", "ue8m0"))
    check_choice(name, "scale_layout", scale_layout, LAYOUTS)
    blocks = -(-M // BLOCK)
    if group_offsets is not None:
        entries = group_offsets.shape[0]
        check_that(name, "group_offsets", entries >= 1, "G + 1, so at least 1 entry", entries)
        blocks += entries - 1
    q, scale = ((K, M), (K, blocks)) if transpose else ((M, K), (blocks, K))
    return x.new_empty(q, dtype=FP8), new_scale(x, scale, scale_layout)


@cast_per_channel.op.register_launcher("triton")
def _launch_triton(
    x: Tensor, scale_format: str, group_offsets: Tensor | None, transpose: bool, scale_layout: str
) -> tuple[Tensor, Tensor]:
    q, scale = cast_per_channel.op.allocate(x, scale_format, group_offsets, transpose, scale_layout)
    padded = with_padding(scale, scale_layout)
    if padded.numel() == 0:
        return q, scale
    (M, K), (blocks, channels) = x.shape, padded.mT.shape if transpose else padded.shape
    q_strides, scale_strides = q.stride(), padded.stride()
    if transpose:
        q_strides, scale_strides = q_strides[::-1], scale_strides[::-1]
    G = 0 if group_offsets is None else group_offsets.shape[0] - 1
    native_fp8 = arch.of(x.device).native_fp8_cast
    aligned = K % 16 == 0 and (M % 16 == 0 or not transpose)
    COLS = 64
    cast_per_channel_kernel[(blocks * cdiv(channels, COLS),)](
        x, as_bits(q, native_fp8), padded, group_offsets, M, K, G, channels,
        x.stride(0), *q_strides, *scale_strides,
        # Without groups, blocks are aligned if M is, which Triton sees.
        MAY_ALIGN=transpose and aligned and G > 0, UE8M0=scale_format == "ue8m0",
        NATIVE_FP8=native_fp8,
        GROUPS=next_power_of_2(max(G, 1)), COLS=COLS,
        num_warps=4 if native_fp8 and aligned else 8,  # an address for each value needs registers
    )  # fmt: skip
    return q, scale


@cast_per_channel.op.register_debug_check
def check_contents(x: Tensor, scale_format: str, group_offsets: Tensor | None, *_) -> None:
    """For DEEPKERN_DEBUG=1: the offsets need no repair."""
    check_offsets("cast_per_channel", group_offsets, x.shape[0])


@triton.jit
def cast_per_channel_kernel(
    x_ptr, q_ptr, scale_ptr, offsets_ptr, M, K, G, channels,
    x_row, q_row, q_column, scale_block, scale_channel,
    MAY_ALIGN: tl.constexpr, UE8M0: tl.constexpr, NATIVE_FP8: tl.constexpr,
    GROUPS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(channels, COLS)
    block = tl.program_id(0) // tiles
    column = (tl.program_id(0) % tiles * COLS + tl.arange(0, COLS)).to(tl.int64)
    first, end = block * 128, M  # of the rows to cast
    if offsets_ptr is not None:
        group_first, group_last = group_spans(offsets_ptr, G, M, GROUPS)
        # These rows are cleared where they are in no group, wherever the block of this number lies.
        begin, stop = tl.min(group_first, 0), tl.max(group_last, 0)  # of all groups
        last = tl.minimum(first + 128, M)
        clear_rows(q_ptr, first, tl.minimum(last, begin), column, K, q_row, q_column, NATIVE_FP8)
        clear_rows(q_ptr, tl.maximum(first, stop), last, column, K, q_row, q_column, NATIVE_FP8)
        first, rows = block_at(group_first, group_last, block)
        end = first + rows

    row = (first + tl.arange(0, 128)).to(tl.int64)
    inside = (row < end)[:, None] & (column < K)[None, :]
    x_tile = x_ptr + row[:, None] * x_row + column[None, :]  # [128, COLS]
    x = tl.load(x_tile, mask=inside, other=0.0).to(tl.float32)

    scale = block_scale(tl.max(magnitude_bits(x), 0), UE8M0)  # [COLS]
    q = to_fp8(x * tl.div_rn(1.0, scale)[None, :], NATIVE_FP8)

    if MAY_ALIGN and (first % 16 == 0) & (end % 16 == 0):
        # The same numbers, but seen to be multiples of 16: then 16 rows are one access.
        store_rows(q_ptr, q, first // 16 * 16, end // 16 * 16, column, K, q_row, q_column)
    else:
        store_rows(q_ptr, q, first, end, column, K, q_row, q_column)
    used = (first < end) & (column < K)
    scale_tile = scale_ptr + tl.cast(block, tl.int64) * scale_block + column * scale_channel
    tl.store(scale_tile, tl.where(used, scale, 0.0), mask=column < channels)


@triton.jit
def store_rows(q_ptr, q, first, end, column, K, q_row, q_column):
    """The codes of those rows `first` and on that come before `end`."""
    row = (first + tl.arange(0, q.shape[0])).to(tl.int64)
    q_tile = q_ptr + row[:, None] * q_row + column[None, :] * q_column  # [rows, COLS]
    tl.store(q_tile, q, mask=(row < end)[:, None] & (column < K)[None, :])


@triton.jit
def clear_rows(q_ptr, first, end, column, K, q_row, q_column, NATIVE_FP8: tl.constexpr):
    """Zeros into rows `first` to `end`: few at a time, because it is seldom done."""
    zero = to_fp8(tl.zeros((32, column.shape[0]), tl.float32), NATIVE_FP8)
    for start in range(first, end, 32):
        store_rows(q_ptr, zero, start, end, column, K, q_row, q_column)
