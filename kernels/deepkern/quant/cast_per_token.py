"""FP8 cast of activations with one scale per token and 128 channels.

    scale[m, j] = max(|x[m, 128j : 128j+128]|, 1e-4) / 448        (rounded up to 2^n for ue8m0)
    q[m, k]     = e4m3(x[m, k] * (1 / scale[m, k // 128]))

Parallelization: one program casts ROWS rows of one 128-wide block column. A warp reads whole
256-byte lines and reduces in registers. With a column-major scale a tile of rows never crosses from
one matrix into the next, and the last tile of a matrix also writes the padding of its scale.

Limit: memory bandwidth; 3 bytes per bf16 value (2 read, 1 written).

Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.2, tile-wise quantization.
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
        scale_format: "fp32" (the default), or "ue8m0" to round every scale up to a power of two.
        scale_layout: "row" (the default) for a contiguous scale. "column" for a scale of the same
            shape with strides (..., 1, pitch), which a Hopper GEMM loads by TMA. `pitch` is the
            length of dimension -2 rounded up to a multiple of 4; the padding holds zeros. A scale
            of rank 1 is contiguous with both.

    Returns:
        q: float8_e4m3fn [..., K].
        scale: fp32 [..., ceil(K / 128)]; q times scale approximates `x`.

    A block of zeros has the scale 1e-4/448. inf or NaN makes its whole block NaN.

    Raises:
        TypeError, ValueError: `x`, `scale_format` or `scale_layout` is not as above.

    Example:
        >>> q, scale = deepkern.cast_per_token(torch.randn(64, 7168, dtype=torch.bfloat16))
        >>> q.shape, scale.shape
        (torch.Size([64, 7168]), torch.Size([64, 56]))
    """
    check_choice("cast_per_token", "scale_format", scale_format, ("fp32", "ue8m0"))
    check_choice("cast_per_token", "scale_layout", scale_layout, LAYOUTS)
    blocks = (*x.shape[:-1], -(-x.shape[-1] // BLOCK))
    # Fake kernel: allocates the outputs; the launcher of a backend computes them.
    return x.new_empty(x.shape, dtype=FP8), new_scale(x, blocks, scale_layout)


@cast_per_token.op.register_launcher("triton")
def _launch_triton(x: Tensor, scale_format: str, scale_layout: str) -> tuple[Tensor, Tensor]:
    q, scale = cast_per_token.op.allocate(x, scale_format, scale_layout)
    if q.numel() == 0:
        return q, scale
    K = x.shape[-1]
    # All rows are one matrix, except with a column-major scale: that has padding per matrix.
    M = x.shape[-2] if scale_layout == "column" and x.dim() > 1 else x.numel() // K
    matrices = x.reshape(-1, M, K)  # a view, unless the leading dimensions cannot be merged
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
    x_ptr,  # real [G, M, K]
    q_ptr,  # FP8 or its bytes [G, M, K], contiguous
    scale_ptr,  # fp32 [G, padded_M, ceil(K / 128)]
    M,  # rows of a matrix
    K,  # columns
    padded_M,  # rows of a scale with its padding; the kernel writes zeros from row M on
    x_matrix_stride,  # all strides in elements
    x_row_stride,
    scale_matrix_stride,
    scale_row_stride,
    scale_block_stride,
    UE8M0: tl.constexpr,  # round scales up to powers of two
    NATIVE_FP8: tl.constexpr,
    ROWS: tl.constexpr,  # a multiple of 4, so that the last tile covers the padding
):
    num_blocks, row_tiles = tl.cdiv(K, 128), tl.cdiv(M, ROWS)
    block = tl.program_id(0) % num_blocks
    row_tile = tl.program_id(0) // num_blocks  # counted over all matrices
    matrix = (row_tile // row_tiles).to(tl.int64)
    row = (row_tile % row_tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = block * 128 + tl.arange(0, 128)
    mask = (row < M)[:, None] & (column < K)[None, :]
    x_ptrs = x_ptr + matrix * x_matrix_stride + row[:, None] * x_row_stride + column  # [ROWS, 128]
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)

    scale = block_scale(tl.max(magnitude_bits(x), 1), UE8M0)  # [ROWS]
    q = to_fp8(x * tl.div_rn(1.0, scale)[:, None], NATIVE_FP8)

    tl.store(q_ptr + (matrix * M + row)[:, None] * K + column, q, mask=mask)
    scale_ptrs = scale_ptr + matrix * scale_matrix_stride + row * scale_row_stride
    scale_ptrs += tl.cast(block, tl.int64) * scale_block_stride
    tl.store(scale_ptrs, tl.where(row < M, scale, 0.0), mask=row < padded_M)
