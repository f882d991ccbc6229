"""FP8 cast of weights with one scale per block of 128 rows and 128 columns.

    scale[i, j] = max(|x[128i : 128i+128, 128j : 128j+128]|, 1e-4) / 448     (2^n for ue8m0)
    q[n, k]     = e4m3(x[n, k] * (1 / scale[n // 128, k // 128]))

Parallelization: one program casts one block. It keeps the block in registers from the search for
the largest magnitude to the cast.

Limit: memory bandwidth; 3 bytes per bf16 value (2 read, 1 written).

Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.2, block-wise quantization.
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
        x: bf16, fp16 or fp32 [N, K], or [G, N, K] for G matrices that are cast separately; rows may
            be strided, the last dimension is contiguous.
        scale_format: "fp32" (the default), or "ue8m0" to round every scale up to a power of two.

    Returns:
        q: float8_e4m3fn, of the shape of `x`.
        scale: fp32 [..., ceil(N / 128), ceil(K / 128)]; q times scale approximates `x`.

    A block of zeros has the scale 1e-4/448. inf or NaN makes its whole block NaN.

    Raises:
        TypeError, ValueError: `x` or `scale_format` is not as above.

    Example:
        >>> q, scale = deepkern.cast_per_block(torch.randn(2112, 7168))
        >>> q.shape, scale.shape
        (torch.Size([2112, 7168]), torch.Size([17, 56]))
    """
    check_that("cast_per_block", "x", x.dim() <= 3, "rank 2 or 3", f"rank {x.dim()}")
    check_choice("cast_per_block", "scale_format", scale_format, ("fp32", "ue8m0"))
    blocks = (*x.shape[:-2], -(-x.shape[-2] // BLOCK), -(-x.shape[-1] // BLOCK))
    # Fake kernel: allocates the outputs; the launcher of a backend computes them.
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
    x_ptr,  # real [G, N, K]
    q_ptr,  # FP8 or its bytes [G, N, K], contiguous
    scale_ptr,  # fp32 [G, ceil(N / 128), ceil(K / 128)], contiguous
    N,  # rows of a matrix
    K,  # columns
    x_matrix_stride,  # elements
    x_row_stride,  # elements
    UE8M0: tl.constexpr,  # round scales up to powers of two
    NATIVE_FP8: tl.constexpr,
):
    row_blocks, column_blocks = tl.cdiv(N, 128), tl.cdiv(K, 128)
    row_block = tl.program_id(0) // column_blocks  # counted over all matrices
    matrix = (row_block // row_blocks).to(tl.int64)
    row = (row_block % row_blocks * 128 + tl.arange(0, 128)).to(tl.int64)
    column = tl.program_id(0) % column_blocks * 128 + tl.arange(0, 128)
    mask = (row < N)[:, None] & (column < K)[None, :]
    x_ptrs = x_ptr + matrix * x_matrix_stride + row[:, None] * x_row_stride + column  # [128, 128]
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)

    scale = block_scale(tl.max(tl.max(magnitude_bits(x), 1), 0), UE8M0)
    q = to_fp8(x * tl.div_rn(1.0, scale), NATIVE_FP8)

    tl.store(q_ptr + (matrix * N + row)[:, None] * K + column, q, mask=mask)
    tl.store(scale_ptr + tl.program_id(0), scale)
