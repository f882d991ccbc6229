"""FP8 cast of activations: one scale per token and 128 channels.

    scale[m, j] = max(|x[m, 128j : 128j+128]|, 1e-4) / 448        (rounded up to 2^n for ue8m0)
    q[m, k]     = e4m3(x[m, k] * (1 / scale[m, k // 128]))

Cut: a program takes ROWS rows of one 128-wide block column, so a warp reads whole 256-byte lines
and reduces in registers. Each value is read once and written once: 3 bytes a value in bf16, and
the speed is that of memory.

Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.2, tile-wise quantisation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime import arch
from ..runtime.contract import FP8, check_choice
from ..runtime.op import op
from .fp8 import BLOCK, as_bits, block_scale, magnitude_bits, to_fp8


@op(x="real [..., K]")
def cast_per_token(x: Tensor, scale_format: str = "fp32") -> tuple[Tensor, Tensor]:
    """Casts `x` to FP8 with one scale per row and block of 128 columns.

    Args:
        x: bf16, fp16 or fp32 [..., K]; rows may be strided, the last dimension is contiguous.
        scale_format: "fp32", or "ue8m0" to round every scale up to a power of two.

    Returns:
        q: float8_e4m3fn [..., K].
        scale: fp32 [..., ceil(K / 128)]; `q * scale` gives back `x`.

    A block of zeros gets the scale 1e-4/448. inf or NaN makes its whole block NaN.

    Raises:
        TypeError, ValueError: `x` or `scale_format` is not as above.
    """
    check_choice("cast_per_token", "scale_format", scale_format, ("fp32", "ue8m0"))
    blocks = (*x.shape[:-1], -(-x.shape[-1] // BLOCK))
    return x.new_empty(x.shape, dtype=FP8), x.new_empty(blocks, dtype=torch.float32)


@cast_per_token.backend("triton")
def launch(x: Tensor, scale_format: str) -> tuple[Tensor, Tensor]:
    q, scale = cast_per_token.allocate(x, scale_format)
    if q.numel() == 0:
        return q, scale
    rows = x.reshape(-1, x.shape[-1])  # a view unless the leading dimensions cannot be merged
    M, K = rows.shape
    native_fp8 = arch.of(x.device).native_fp8_cast
    ROWS = 32
    kernel[(triton.cdiv(M, ROWS) * triton.cdiv(K, BLOCK),)](
        rows, as_bits(q, native_fp8), scale, M, K, rows.stride(0),
        UE8M0=scale_format == "ue8m0", NATIVE_FP8=native_fp8, ROWS=ROWS,
        num_warps=4 if native_fp8 else 8,
    )  # fmt: skip
    return q, scale


@triton.jit
def kernel(
    x_ptr, q_ptr, scale_ptr, M, K, x_stride,
    UE8M0: tl.constexpr, NATIVE_FP8: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(K, 128)
    block = tl.program_id(0) % blocks
    row = (tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = block * 128 + tl.arange(0, 128)
    inside = (row < M)[:, None] & (column < K)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + column, mask=inside, other=0.0)  # [ROWS, 128]
    x = x.to(tl.float32)

    scale = block_scale(tl.max(magnitude_bits(x), 1), UE8M0)  # [ROWS]
    q = to_fp8(x * tl.div_rn(1.0, scale)[:, None], NATIVE_FP8)

    tl.store(q_ptr + row[:, None] * K + column, q, mask=inside)
    tl.store(scale_ptr + row * blocks + block, scale, mask=row < M)
