"""From FP8 and its scales back to real numbers, whatever block a scale covers.

    x[n, k] = out_dtype(float32(q[n, k]) * scale[n // rows, k // cols])        block = (rows, cols)

Cut: a program takes a tile of ROWS x 128 values. When the tile lies within one block along a
dimension, as it does for the blocks of all our casts, the scale is loaded once for that dimension;
otherwise per value, which the L1 cache serves. 3 bytes a value for bf16 out: the speed is that of
memory.
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
        block: (rows, cols), both at least 1, that one scale covers: (1, 128) for the output of
            cast_per_token, (128, 128) for that of cast_per_block.
        out_dtype: bfloat16, float16 or float32.

    Returns:
        [..., N, K] of `out_dtype`: the fp32 product, rounded once. NaN stays NaN.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    fits = len(block) == 2 and min(block) >= 1
    check_that("cast_back", "block", fits, "(rows, cols), both at least 1", tuple(block))
    check_choice("cast_back", "out_dtype", out_dtype, REAL)
    blocks = tuple(-(-size // b) for size, b in zip(q.shape[-2:], block, strict=True))
    expected = f"{blocks} blocks of {tuple(block)} as the last two dimensions"
    check_that("cast_back", "scale", scale.shape[-2:] == blocks, expected, tuple(scale.shape))
    return q.new_empty(q.shape, dtype=out_dtype)


@cast_back.op.register_launcher("triton")
def _launch_triton(
    q: Tensor, scale: Tensor, block: Sequence[int], out_dtype: torch.dtype
) -> Tensor:
    out = cast_back.op.allocate(q, scale, block, out_dtype)
    if out.numel() == 0:
        return out
    # Views unless the leading dimensions cannot be merged.
    matrices = q.reshape(-1, *q.shape[-2:])
    scales = scale.reshape(-1, *scale.shape[-2:])
    G, N, K = matrices.shape
    rows, cols = min(block[0], N), min(block[1], K)  # a longer block covers no more
    native_fp8 = arch.of(q.device).native_fp8
    ROWS, COLS = 32, 128
    cast_back_kernel[(G * cdiv(N, ROWS) * cdiv(K, COLS),)](
        as_bits(matrices, native_fp8), scales, out, N, K, rows, cols,
        *matrices.stride()[:2], *scales.stride(),
        ONE_ROW=rows % ROWS == 0 or rows == N, ONE_COLUMN=cols % COLS == 0 or cols == K,
        NATIVE_FP8=native_fp8, ROWS=ROWS, COLS=COLS, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def cast_back_kernel(
    q_ptr, scale_ptr, out_ptr, N, K, rows, cols,
    q_matrix, q_row, scale_matrix, scale_row, scale_column,
    ONE_ROW: tl.constexpr, ONE_COLUMN: tl.constexpr,  # whether a tile lies in one block
    NATIVE_FP8: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row_tiles, column_tiles = tl.cdiv(N, ROWS), tl.cdiv(K, COLS)
    row_tile = tl.program_id(0) // column_tiles  # of all matrices
    matrix = (row_tile // row_tiles).to(tl.int64)
    first_row = row_tile % row_tiles * ROWS
    first_column = tl.program_id(0) % column_tiles * COLS
    row = (first_row + tl.arange(0, ROWS)).to(tl.int64)
    column = first_column + tl.arange(0, COLS)
    inside = (row < N)[:, None] & (column < K)[None, :]
    q_tile = q_ptr + matrix * q_matrix + row[:, None] * q_row + column  # [ROWS, COLS]
    q = tl.load(q_tile, mask=inside, other=0.0)

    scaled_row = (first_row + tl.arange(0, 1 if ONE_ROW else ROWS)).to(tl.int64)
    scaled_column = (first_column + tl.arange(0, 1 if ONE_COLUMN else COLS)).to(tl.int64)
    known = (scaled_row < N)[:, None] & (scaled_column < K)[None, :]
    scale_tile = (scaled_row // rows * scale_row)[:, None] + scaled_column // cols * scale_column
    scale = tl.load(scale_ptr + matrix * scale_matrix + scale_tile, mask=known, other=0.0)

    out = (from_fp8(q, NATIVE_FP8) * scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (matrix * N + row)[:, None] * K + column, out, mask=inside)
