"""FP8 cast of activations: one scale per token and 128 channels.

    scale[m, j] = max(|x[m, 128j : 128j+128]|, 1e-4) / 448        (rounded up to 2^n for ue8m0)
    q[m, k]     = e4m3(x[m, k] * (1 / scale[m, k // 128]))

Cut: a program takes ROWS rows of one 128-wide block column, so a warp reads whole 256-byte lines
and reduces in registers. Each value is read once and written once: 3 bytes a value in bf16, and
the speed is that of memory. A column-major scale is laid out matrix by matrix, so no tile of rows
then reaches into the next matrix, and the last one of a matrix also writes the padding.

Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.2, tile-wise quantisation.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv
from ..runtime import arch
from ..runtime.contract import FP8, check_choice
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


@op(x="real [..., K]")
def cast_per_token(
    x: Tensor, scale_format: str = "fp32", scale_layout: str = "row"
) -> tuple[Tensor, Tensor]:
    """Casts `x` to FP8 with one scale per row and block of 128 columns.

    Args:
        x: bf16, fp16 or fp32 [..., K]; rows may be strided, the last dimension is contiguous.
        scale_format: "fp32", or "ue8m0" to round every scale up to a power of two.
        scale_layout: "row" for a contiguous scale; "column" for one of the same shape with strides
            (..., 1, pitch), as a Hopper GEMM loads it by TMA. `pitch` is the length of dimension
            -2 rounded up to a multiple of 4; the padding holds zeros. A scale of rank 1 is
            contiguous either way.

    Returns:
        q: float8_e4m3fn [..., K].
        scale: fp32 [..., ceil(K / 128)]; `q * scale` gives back `x`.

    A block of zeros gets the scale 1e-4/448. inf or NaN makes its whole block NaN.

    Raises:
        TypeError, ValueError: `x`, `scale_format` or `scale_layout` is not as above.
    """
    check_choice("cast_per_token", "scale_format", scale_format, ("fp32", "ue8m0"))
    check_choice("cast_per_token", "scale_layout", scale_layout, LAYOUTS)
    blocks = (*x.shape[:-1], -(-x.shape[-1] // BLOCK))
    return x.new_empty(x.shape, dtype=FP8), new_scale(x, blocks, scale_layout)


@cast_per_token.op.register_launcher("triton")
def _launch_triton(x: Tensor, scale_format: str, scale_layout: str) -> tuple[Tensor, Tensor]:
    q, scale = cast_per_token.op.allocate(x, scale_format, scale_layout)
    if q.numel() == 0:
        return q, scale
    K = x.shape[-1]
    # All rows are one matrix, but for a scale that is laid out matrix by matrix.
    M = x.shape[-2] if scale_layout == "column" and x.dim() > 1 else x.numel() // K
    matrices = x.reshape(-1, M, K)  # a view unless the leading dimensions cannot be merged
    scales = with_padding(scale, scale_layout)
    scales = scales.reshape(matrices.shape[0], -1, scales.shape[-1])
    native_fp8 = arch.of(x.device).native_fp8_cast
    ROWS = 32
    cast_per_token_kernel[(matrices.shape[0] * cdiv(M, ROWS) * cdiv(K, BLOCK),)](
        matrices, as_bits(q, native_fp8), scales, M, K, scales.shape[1],
        *matrices.stride()[:2], *scales.stride(),
        UE8M0=scale_format == "ue8m0", NATIVE_FP8=native_fp8, ROWS=ROWS,
        num_warps=4 if native_fp8 else 8,
    )  # fmt: skip
    return q, scale


@triton.jit
def cast_per_token_kernel(
    x_ptr, q_ptr, scale_ptr, M, K, scale_rows, x_matrix, x_row,
    scale_matrix, scale_row, scale_block,
    UE8M0: tl.constexpr, NATIVE_FP8: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    blocks, row_tiles = tl.cdiv(K, 128), tl.cdiv(M, ROWS)
    block = tl.program_id(0) % blocks
    row_tile = tl.program_id(0) // blocks  # of all matrices
    matrix = (row_tile // row_tiles).to(tl.int64)
    row = (row_tile % row_tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = block * 128 + tl.arange(0, 128)
    inside = (row < M)[:, None] & (column < K)[None, :]
    x_tile = x_ptr + matrix * x_matrix + row[:, None] * x_row + column  # [ROWS, 128]
    x = tl.load(x_tile, mask=inside, other=0.0).to(tl.float32)

    scale = block_scale(tl.max(magnitude_bits(x), 1), UE8M0)  # [ROWS]
    q = to_fp8(x * tl.div_rn(1.0, scale)[:, None], NATIVE_FP8)

    tl.store(q_ptr + (matrix * M + row)[:, None] * K + column, q, mask=inside)
    scale_tile = scale_ptr + matrix * scale_matrix + row * scale_row
    scale_tile += tl.cast(block, tl.int64) * scale_block
    tl.store(scale_tile, tl.where(row < M, scale, 0.0), mask=row < scale_rows)
