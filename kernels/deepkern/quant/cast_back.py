"""Dequantizes FP8 values with block scales of any block size.

    x[n, k] = out_dtype(float32(q[n, k]) * scale[n // rows, k // cols])        block = (rows, cols)

Parallelization: one program dequantizes one tile of ROWS x COLS values. Along a dimension in which
no tile crosses a block boundary, as with the blocks of all our casts, the program loads one scale.
Otherwise it loads one scale per value, mostly from the L1 cache.

Limit: memory bandwidth; 3 bytes per value for bf16 output (1 read, 2 written).

Source: the inverse of `cast_per_token` and `cast_per_block`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv
from ..runtime import arch
from ..runtime.contract import check_choice, check_that
from ..runtime.op import op
from .fp8 import as_bits, from_fp8

REAL = (torch.bfloat16, torch.float16, torch.float32)


@op(q="fp8 [..., N, K]", scale="fp32 [..., _, _] strided")
def cast_back(q: Tensor, scale: Tensor, block: Sequence[int], out_dtype: torch.dtype) -> Tensor:
    """Multiplies FP8 values by their scales.

    Args:
        q: float8_e4m3fn [..., N, K]; rows may be strided, the last dimension is contiguous.
        scale: fp32 [..., ceil(N / rows), ceil(K / cols)], any strides.
        block: (rows, cols) that one scale covers, both at least 1: (1, 128) for the output of
            cast_per_token, (128, 128) for that of cast_per_block.
        out_dtype: bfloat16, float16 or float32.

    Returns:
        [..., N, K] of `out_dtype`: the fp32 product, rounded once. NaN stays NaN.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Example:
        >>> q, scale = deepkern.cast_per_token(torch.randn(64, 7168))
        >>> deepkern.cast_back(q, scale, (1, 128), torch.bfloat16).shape
        torch.Size([64, 7168])
    """
    valid = len(block) == 2 and min(block) >= 1
    check_that("cast_back", "block", valid, "(rows, cols), both at least 1", tuple(block))
    check_choice("cast_back", "out_dtype", out_dtype, REAL)
    blocks = tuple(-(-size // b) for size, b in zip(q.shape[-2:], block, strict=True))
    expected = f"{blocks} blocks of {tuple(block)} as the last two dimensions"
    check_that("cast_back", "scale", scale.shape[-2:] == blocks, expected, tuple(scale.shape))
    # Fake kernel: allocates the output; the launcher of a backend computes it.
    return q.new_empty(q.shape, dtype=out_dtype)


@cast_back.op.register_launcher("triton")
def _launch_triton(
    q: Tensor, scale: Tensor, block: Sequence[int], out_dtype: torch.dtype
) -> Tensor:
    out = cast_back.op.allocate(q, scale, block, out_dtype)
    if out.numel() == 0:
        return out
    # Views, unless the leading dimensions cannot be merged.
    matrices = q.reshape(-1, *q.shape[-2:])
    scales = scale.reshape(-1, *scale.shape[-2:])
    G, N, K = matrices.shape
    rows, cols = min(block[0], N), min(block[1], K)  # a longer block has the same effect
    native_fp8 = arch.of(q.device).native_fp8
    ROWS, COLS = 32, 128
    cast_back_kernel[(G * cdiv(N, ROWS) * cdiv(K, COLS),)](
        as_bits(matrices, native_fp8), scales, out, N, K, rows, cols,
        *matrices.stride()[:2], *scales.stride(),
        ONE_SCALE_ROW=rows % ROWS == 0 or rows == N, ONE_SCALE_COLUMN=cols % COLS == 0 or cols == K,
        NATIVE_FP8=native_fp8, ROWS=ROWS, COLS=COLS, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def cast_back_kernel(
    q_ptr,  # FP8 or its bytes [G, N, K]
    scale_ptr,  # fp32 [G, ceil(N / rows), ceil(K / cols)]
    out_ptr,  # real [G, N, K], contiguous
    N,  # rows of a matrix
    K,  # columns
    rows,  # rows that one scale covers
    cols,  # columns that one scale covers
    q_matrix_stride,  # all strides in elements
    q_row_stride,
    scale_matrix_stride,
    scale_row_stride,
    scale_column_stride,
    ONE_SCALE_ROW: tl.constexpr,  # no tile crosses a block boundary along N
    ONE_SCALE_COLUMN: tl.constexpr,  # no tile crosses a block boundary along K
    NATIVE_FP8: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row_tiles, column_tiles = tl.cdiv(N, ROWS), tl.cdiv(K, COLS)
    row_tile = tl.program_id(0) // column_tiles  # counted over all matrices
    matrix = (row_tile // row_tiles).to(tl.int64)
    first_row = row_tile % row_tiles * ROWS
    first_column = tl.program_id(0) % column_tiles * COLS
    row = (first_row + tl.arange(0, ROWS)).to(tl.int64)
    column = first_column + tl.arange(0, COLS)
    mask = (row < N)[:, None] & (column < K)[None, :]
    q_ptrs = q_ptr + matrix * q_matrix_stride + row[:, None] * q_row_stride + column  # [ROWS, COLS]
    q = tl.load(q_ptrs, mask=mask, other=0.0)

    scaled_row = (first_row + tl.arange(0, 1 if ONE_SCALE_ROW else ROWS)).to(tl.int64)
    scaled_column = (first_column + tl.arange(0, 1 if ONE_SCALE_COLUMN else COLS)).to(tl.int64)
    scale_mask = (scaled_row < N)[:, None] & (scaled_column < K)[None, :]
    scale_offset = (scaled_row // rows * scale_row_stride)[:, None]
    scale_offset += scaled_column // cols * scale_column_stride
    scale_ptrs = scale_ptr + matrix * scale_matrix_stride + scale_offset
    scale = tl.load(scale_ptrs, mask=scale_mask, other=0.0)  # [ROWS or 1, COLS or 1]

    out = (from_fp8(q, NATIVE_FP8) * scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (matrix * N + row)[:, None] * K + column, out, mask=mask)
