"""`hadamard_transform` and `cast_per_token` in one pass, for the indexer's queries and keys.

    y              = scale · H x                      in fp32, not rounded in between
    out_scale[, j] = max(|y[, 128j : 128j+128]|, 1e-4) / 448       (rounded up to 2^n for ue8m0)
    q[, i]         = e4m3(y[, i] * (1 / out_scale[, i // 128]))

Parallelization: one program transforms and casts ROWS whole rows.

Limit: memory bandwidth, 3 bytes per bf16 value; separate transform and cast take 7.

Source: DeepSeek-V3.2 (arXiv 2512.02556), section 2.1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv
from ..quant.fp8 import BLOCK, as_bits, block_scale, magnitude_bits, to_fp8
from ..runtime import arch
from ..runtime.contract import FP8, check_choice, check_that
from ..runtime.op import op
from .hadamard_transform import MAX_LENGTH, TILE, butterflies


@op(x="real [..., N]")
def hadamard_cast(
    x: Tensor, scale: float = 1.0, scale_format: str = "fp32"
) -> tuple[Tensor, Tensor]:
    """The Walsh-Hadamard transform over the last dimension, cast to FP8.

    Args:
        x: bf16, fp16 or fp32 [..., N], any strides with a contiguous last dimension. N is a power
            of two up to 2048.
        scale: multiplies the transform in fp32; with N**-0.5 it is a rotation.
        scale_format: "fp32", or "ue8m0" to round every scale up to a power of two.

    Returns:
        q: float8_e4m3fn [..., N].
        q_scale: fp32 [..., ceil(N / 128)], as from `cast_per_token`.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Example:
        >>> q, q_scale = deepkern.hadamard_cast(torch.randn(4, 64, 128), 128**-0.5)
        >>> q.shape, q_scale.shape
        (torch.Size([4, 64, 128]), torch.Size([4, 64, 1]))
    """
    N = x.shape[-1]
    check_that("hadamard_cast", "x", N <= MAX_LENGTH and N & (N - 1) == 0,
               f"a power of two up to {MAX_LENGTH} as last dimension",
               f"shape {tuple(x.shape)}")  # fmt: skip
    check_choice("hadamard_cast", "scale_format", scale_format, ("fp32", "ue8m0"))
    scale_shape = (*x.shape[:-1], cdiv(N, BLOCK))
    # Fake kernel: allocates the outputs; the launcher of a backend computes them.
    return x.new_empty(x.shape, dtype=FP8), x.new_empty(scale_shape, dtype=torch.float32)


@hadamard_cast.op.register_launcher("triton")
def _launch_triton(x: Tensor, scale: float, scale_format: str) -> tuple[Tensor, Tensor]:
    q, q_scale = hadamard_cast.op.allocate(x, scale, scale_format)
    if q.numel() == 0:
        return q, q_scale
    N = x.shape[-1]
    rows = x.reshape(-1, N)  # a view unless the leading dimensions cannot be merged
    native_fp8 = arch.of(x.device).native_fp8_cast
    ROWS = TILE // N
    hadamard_cast_kernel[(cdiv(len(rows), ROWS),)](
        rows, as_bits(q, native_fp8), q_scale, len(rows), rows.stride(0), scale,
        UE8M0=scale_format == "ue8m0", NATIVE_FP8=native_fp8, ROWS=ROWS, N=N,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return q, q_scale


@triton.jit(do_not_specialize=["M"])
def hadamard_cast_kernel(
    x_ptr,  # real [M, N]
    q_ptr,  # FP8 or its bytes [M, N]
    q_scale_ptr,  # fp32 [M, ceil(N / 128)]
    M,
    x_row_stride,  # elements
    scale,  # of the transform
    UE8M0: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    ROWS: tl.constexpr,  # per program
    N: tl.constexpr,
):
    BLOCK: tl.constexpr = min(N, 128)  # values per scale
    BLOCKS: tl.constexpr = N // BLOCK
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    row_mask = row < M
    column, block = tl.arange(0, N)[None, :], tl.arange(0, BLOCKS)[None, :]
    x = tl.load(x_ptr + row * x_row_stride + column, mask=row_mask, other=0.0)
    y = tl.reshape(butterflies(x.to(tl.float32)) * scale, (ROWS, BLOCKS, BLOCK))
    q_scale = block_scale(tl.max(magnitude_bits(y), 2), UE8M0)  # [ROWS, BLOCKS]
    q = to_fp8(y * tl.div_rn(1.0, q_scale)[:, :, None], NATIVE_FP8)
    tl.store(q_ptr + row * N + column, tl.reshape(q, (ROWS, N)), mask=row_mask)
    tl.store(q_scale_ptr + row * BLOCKS + block, q_scale, mask=row_mask)
