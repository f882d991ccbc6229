"""FP8 cast of weights: one scale per block of 128 rows and 128 columns.

    scale[i, j] = max(|x[128i : 128i+128, 128j : 128j+128]|, 1e-4) / 448     (2^n for ue8m0)
    q[n, k]     = e4m3(x[n, k] * (1 / scale[n // 128, k // 128]))

Cut: a program takes one block and holds it in registers between finding its largest magnitude and
casting it, so each value is read once and written once: 3 bytes a value in bf16, and the speed is
that of memory.

Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.2, block-wise quantisation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv
from ..runtime import arch
from ..runtime.contract import FP8, check_choice, check_that
from ..runtime.op import op
from .fp8 import BLOCK, as_bits, block_scale, magnitude_bits, to_fp8


@op(x="real [..., N, K]")
def cast_per_block(x: Tensor, scale_format: str = "fp32") -> tuple[Tensor, Tensor]:
    """Casts `x` to FP8 with one scale per block of 128 rows and 128 columns.

    Args:
        x: bf16, fp16 or fp32 [N, K], or [G, N, K], whose G matrices are cast one by one; rows may
            be strided, the last dimension is contiguous.
        scale_format: "fp32", or "ue8m0" to round every scale up to a power of two.

    Returns:
        q: float8_e4m3fn, of the shape of `x`.
        scale: fp32 [..., ceil(N / 128), ceil(K / 128)]; `q * scale` gives back `x`.

    A block of zeros gets the scale 1e-4/448. inf or NaN makes its whole block NaN.

    Raises:
        TypeError, ValueError: `x` or `scale_format` is not as above.
    """
    check_that("cast_per_block", "x", x.dim() <= 3, "rank 2 or 3", f"rank {x.dim()}")
    check_choice("cast_per_block", "scale_format", scale_format, ("fp32", "ue8m0"))
    blocks = (*x.shape[:-2], -(-x.shape[-2] // BLOCK), -(-x.shape[-1] // BLOCK))
    return x.new_empty(x.shape, dtype=FP8), x.new_empty(blocks, dtype=torch.float32)


@cast_per_block.op.register_launcher("triton")
def _launch_triton(x: Tensor, scale_format: str) -> tuple[Tensor, Tensor]:
    q, scale = cast_per_block.op.allocate(x, scale_format)
    if q.numel() == 0:
        return q, scale
    matrices = x if x.dim() == 3 else x[None]
    G, N, K = matrices.shape
    native_fp8 = arch.of(x.device).native_fp8_cast
    cast_per_block_kernel[(G * cdiv(N, BLOCK) * cdiv(K, BLOCK),)](
        matrices, as_bits(q, native_fp8), scale, N, K, matrices.stride(0), matrices.stride(1),
        UE8M0=scale_format == "ue8m0", NATIVE_FP8=native_fp8, num_warps=8,
    )  # fmt: skip
    return q, scale


@triton.jit
def cast_per_block_kernel(
    x_ptr, q_ptr, scale_ptr, N, K, matrix_stride, row_stride,
    UE8M0: tl.constexpr, NATIVE_FP8: tl.constexpr,
):  # fmt: skip
    row_blocks, column_blocks = tl.cdiv(N, 128), tl.cdiv(K, 128)
    row_block = tl.program_id(0) // column_blocks  # of all matrices
    matrix = (row_block // row_blocks).to(tl.int64)
    row = (row_block % row_blocks * 128 + tl.arange(0, 128)).to(tl.int64)
    column = tl.program_id(0) % column_blocks * 128 + tl.arange(0, 128)
    inside = (row < N)[:, None] & (column < K)[None, :]
    x_tile = x_ptr + matrix * matrix_stride + row[:, None] * row_stride + column  # [128, 128]
    x = tl.load(x_tile, mask=inside, other=0.0).to(tl.float32)

    scale = block_scale(tl.max(tl.max(magnitude_bits(x), 1), 0), UE8M0)
    q = to_fp8(x * tl.div_rn(1.0, scale), NATIVE_FP8)

    tl.store(q_ptr + (matrix * N + row)[:, None] * K + column, q, mask=inside)
    tl.store(scale_ptr + tl.program_id(0), scale)
