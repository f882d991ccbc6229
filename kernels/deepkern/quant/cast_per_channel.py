"""FP8 cast with one scale per column and block of 128 rows, optionally transposed.

    scale[i, k] = max(|x[128i : 128i+128, k]|, 1e-4) / 448        (rounded up to 2^n for ue8m0)
    q[m, k]     = e4m3(x[m, k] * (1 / scale[m // 128, k]))        or q[k, m], scale[k, i]

A GEMM that sums over the rows, such as the gradient of a weight, needs this cast. Transposed, both
of its operands are contiguous along the summed dimension. With groups, the blocks restart at the
first row of each group.

Parallelization: one program casts one block of 128 rows and 64 columns. It keeps the block in
registers from the search for the largest magnitudes to the cast. With groups, each program finds
the rows of its block from all offsets.

Limit: memory bandwidth; 3 bytes per bf16 value (2 read, 1 written). Reads are 128-byte lines in
bf16. Transposed, the codes are exchanged through shared memory, so writes are 128-byte lines too.

Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.5.1, the 128x1 tiles of the
backward pass; DeepGEMM's k-grouped GEMM for the layout of groups.
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
from .groups import check_offsets, find_block, group_spans


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
        scale_format: "fp32" (the default), or "ue8m0" to round every scale up to a power of two.
        group_offsets: int32 [G + 1] on the device of `x`: group g is rows group_offsets[g] to
            group_offsets[g + 1], and the blocks restart at its first row. None (the default): all
            rows are one group. Offsets are clamped to [0, M], then raised to the largest offset
            before.
        transpose: return q and scale transposed, as operands of `fp8_gemm_nt` and
            `k_grouped_fp8_gemm_nt` that are summed over M. Default False.
        scale_layout: "row" (the default) for a contiguous scale. "column" for a scale of the same
            shape with strides (1, pitch); `pitch` is its length rounded up to a multiple of 4, and
            the padding holds zeros.

    Returns:
        q: float8_e4m3fn [M, K], or [K, M]; zeros in rows outside all groups.
        scale: fp32 [blocks, K], or [K, blocks]. `blocks` is ceil(M / 128), or ceil(M / 128) + G
            with groups. The blocks of group g follow those of group g - 1; entries past the last
            block are zeros.

    A block of zeros has the scale 1e-4/448. inf or NaN makes its whole block NaN.
    DEEPKERN_DEBUG=1 raises for offsets that do not ascend or are outside [0, M].

    Raises:
        TypeError, ValueError: an argument is not as above.

    Example:
        >>> x = torch.randn(300, 512)
        >>> q, scale = deepkern.cast_per_channel(x, transpose=True)
        >>> q.shape, scale.shape
        (torch.Size([512, 300]), torch.Size([512, 3]))
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
    # Fake kernel: allocates the outputs; the launcher of a backend computes them.
    return x.new_empty(q, dtype=FP8), new_scale(x, scale, scale_layout)


@cast_per_channel.op.register_launcher("triton")
def _launch_triton(
    x: Tensor, scale_format: str, group_offsets: Tensor | None, transpose: bool, scale_layout: str
) -> tuple[Tensor, Tensor]:
    q, scale = cast_per_channel.op.allocate(x, scale_format, group_offsets, transpose, scale_layout)
    padded = with_padding(scale, scale_layout)
    if padded.numel() == 0:
        return q, scale
    (M, K), (blocks, padded_K) = x.shape, padded.mT.shape if transpose else padded.shape
    q_strides, scale_strides = q.stride(), padded.stride()
    if transpose:
        q_strides, scale_strides = q_strides[::-1], scale_strides[::-1]
    G = 0 if group_offsets is None else group_offsets.shape[0] - 1
    native_fp8 = arch.of(x.device).native_fp8_cast
    aligned = K % 16 == 0 and (M % 16 == 0 or not transpose)
    COLS = 64
    cast_per_channel_kernel[(blocks * cdiv(padded_K, COLS),)](
        x, as_bits(q, native_fp8), padded, group_offsets, M, K, G, padded_K,
        x.stride(0), *q_strides, *scale_strides,
        # Without groups, all blocks are aligned if M is; Triton sees that from M.
        MAY_ALIGN=transpose and aligned and G > 0, UE8M0=scale_format == "ue8m0",
        NATIVE_FP8=native_fp8,
        GROUPS=next_power_of_2(max(G, 1)), COLS=COLS,
        # Scalar accesses need one address per value, so more registers per program.
        num_warps=4 if native_fp8 and aligned else 8,
    )  # fmt: skip
    return q, scale


@cast_per_channel.op.register_debug_check
def check_contents(x: Tensor, scale_format: str, group_offsets: Tensor | None, *_) -> None:
    """For DEEPKERN_DEBUG=1: the offsets need no correction."""
    check_offsets("cast_per_channel", group_offsets, x.shape[0])


@triton.jit
def cast_per_channel_kernel(
    x_ptr,  # real [M, K]
    q_ptr,  # FP8 or its bytes [M, K], any strides
    scale_ptr,  # fp32 [blocks, padded_K]
    offsets_ptr,  # int32 [G + 1], or None
    M,
    K,
    G,  # number of groups; 0 without offsets
    padded_K,  # columns of the scale with its padding
    x_row_stride,  # all strides in elements
    q_row_stride,
    q_column_stride,
    scale_block_stride,
    scale_column_stride,
    MAY_ALIGN: tl.constexpr,  # blocks of some groups may start and end at multiples of 16
    UE8M0: tl.constexpr,  # round scales up to powers of two
    NATIVE_FP8: tl.constexpr,
    GROUPS: tl.constexpr,  # power of two, at least G
    COLS: tl.constexpr,
):
    column_tiles = tl.cdiv(padded_K, COLS)
    block = tl.program_id(0) // column_tiles
    column = (tl.program_id(0) % column_tiles * COLS + tl.arange(0, COLS)).to(tl.int64)
    first, end = block * 128, M  # rows to cast
    if offsets_ptr is not None:
        group_first, group_end = group_spans(offsets_ptr, G, M, GROUPS)
        # Clear rows 128 * block and on where they are outside all groups. These rows need not be
        # the rows of block number `block`.
        grouped_first, grouped_end = tl.min(group_first, 0), tl.max(group_end, 0)  # of all groups
        last = tl.minimum(first + 128, M)
        clear_rows(
            q_ptr, first, tl.minimum(last, grouped_first), column, K, q_row_stride,
            q_column_stride, NATIVE_FP8,
        )  # fmt: skip
        clear_rows(
            q_ptr, tl.maximum(first, grouped_end), last, column, K, q_row_stride,
            q_column_stride, NATIVE_FP8,
        )  # fmt: skip
        first, rows = find_block(group_first, group_end, block)
        end = first + rows

    row = (first + tl.arange(0, 128)).to(tl.int64)
    mask = (row < end)[:, None] & (column < K)[None, :]
    x_ptrs = x_ptr + row[:, None] * x_row_stride + column[None, :]  # [128, COLS]
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)

    scale = block_scale(tl.max(magnitude_bits(x), 0), UE8M0)  # [COLS]
    q = to_fp8(x * tl.div_rn(1.0, scale)[None, :], NATIVE_FP8)

    if MAY_ALIGN and (first % 16 == 0) & (end % 16 == 0):
        # // 16 * 16 makes the alignment visible to the compiler: one access stores 16 rows.
        store_rows(
            q_ptr, q, first // 16 * 16, end // 16 * 16, column, K, q_row_stride, q_column_stride
        )
    else:
        store_rows(q_ptr, q, first, end, column, K, q_row_stride, q_column_stride)
    has_values = (first < end) & (column < K)
    scale_ptrs = scale_ptr + tl.cast(block, tl.int64) * scale_block_stride
    scale_ptrs += column * scale_column_stride
    tl.store(scale_ptrs, tl.where(has_values, scale, 0.0), mask=column < padded_K)


@triton.jit
def store_rows(
    q_ptr,  # FP8 or its bytes [M, K]
    q,  # tile [rows, COLS]
    first,  # row of the first tile row
    end,  # rows from `end` on are not stored
    column,  # int64 [COLS]
    K,
    q_row_stride,  # elements
    q_column_stride,  # elements
):
    """Stores the rows of the tile `q` that are before row `end`."""
    row = (first + tl.arange(0, q.shape[0])).to(tl.int64)
    q_ptrs = q_ptr + row[:, None] * q_row_stride + column[None, :] * q_column_stride
    tl.store(q_ptrs, q, mask=(row < end)[:, None] & (column < K)[None, :])


@triton.jit
def clear_rows(
    q_ptr, first, end, column, K, q_row_stride, q_column_stride, NATIVE_FP8: tl.constexpr
):
    """Stores zeros in rows [first, end), 32 at a time: rarely needed, so it gets few registers."""
    zero = to_fp8(tl.zeros((32, column.shape[0]), tl.float32), NATIVE_FP8)
    for start in range(first, end, 32):
        store_rows(q_ptr, zero, start, end, column, K, q_row_stride, q_column_stride)
