"""The Walsh-Hadamard transform of every row: the rotation before the indexer's FP8 cast.

    out[..., i] = scale · Σ_j (-1)^popcount(i & j) x[..., j]

The transform is log2(N) rounds of butterflies (a, b) -> (a + b, a - b) in fp32, one per bit of the
index, lowest bit first, and one rounding at the end. Each round pairs neighbours and stores all
sums before all differences, which rotates the bits of the index by one. After all rounds the order
is the original one, and no round accesses anything but neighbours ("constant geometry").

Parallelization: one program transforms a few rows. For N > 2048 there are two passes: the first
transforms segments of 2048 values into fp32 scratch, the second the remaining bits, that is columns
of the segments.

Limit: memory bandwidth; a pass reads and writes each value once. At N = 128 the exchange through
shared memory between rounds may take longer (17 barriers on sm_90).

Source: Fino and Algazi, "Unified matrix treatment of the fast Walsh-Hadamard transform" (1976).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv
from ..runtime.contract import check_that
from ..runtime.op import op

MAX_N = 32768
MAX_LENGTH = 2048  # values per transform of one pass
TILE = 2048  # values per program
STRIDED_TILE = 1024  # the same where a transform is strided: its addresses need registers


@op(x="real [..., N]")
def hadamard_transform(x: Tensor, scale: float = 1.0) -> Tensor:
    """The Walsh-Hadamard transform over the last dimension, in natural order.

    Args:
        x: bf16, fp16 or fp32 [..., N], any strides with a contiguous last dimension. N is a power
            of two up to 32768; pad other widths with zeros.
        scale: multiplies the result in fp32. With N**-0.5 the transform is a rotation, and its own
            inverse.

    Returns:
        [..., N] in the dtype of `x`, computed in fp32 and rounded once.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Example:
        >>> x = torch.randn(4, 64, 128)
        >>> deepkern.hadamard_transform(x, 128**-0.5).shape
        torch.Size([4, 64, 128])
    """
    N = x.shape[-1]
    check_that("hadamard_transform", "x", N <= MAX_N and N & (N - 1) == 0,
               f"a power of two up to {MAX_N} as last dimension",
               f"shape {tuple(x.shape)}")  # fmt: skip
    # Fake kernel: allocates the output; the launcher of a backend computes it.
    return x.new_empty(x.shape)


@hadamard_transform.op.register_launcher("triton")
def _launch_triton(x: Tensor, scale: float) -> Tensor:
    out = hadamard_transform.op.allocate(x, scale)
    if out.numel() == 0:
        return out
    N = x.shape[-1]
    rows = x.reshape(-1, N)  # a view unless the leading dimensions cannot be merged
    if N <= MAX_LENGTH:
        _launch_pass(rows, out.view(-1, N), length=N, stride=1, scale=scale)
    else:
        scratch = torch.empty_like(rows, dtype=torch.float32)
        _launch_pass(rows, scratch, length=MAX_LENGTH, stride=1, scale=1.0)
        _launch_pass(
            scratch, out.view(-1, N), length=N // MAX_LENGTH, stride=MAX_LENGTH, scale=scale
        )
    return out


def _launch_pass(x: Tensor, out: Tensor, length: int, stride: int, scale: float) -> None:
    """Transforms each group of `length` values, `stride` apart, in the rows of x [rows, N]."""
    rows, N = x.shape
    count = rows * (N // length)
    PER_PROGRAM = (TILE if stride == 1 else STRIDED_TILE) // length
    hadamard_transform_kernel[(cdiv(count, PER_PROGRAM),)](
        x, out, count, N, stride, scale, x.stride(0), out.stride(0),
        LENGTH=length, PER_PROGRAM=PER_PROGRAM, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def hadamard_transform_kernel(
    x_ptr,  # real [rows, N]
    out_ptr,  # real [rows, N]
    count,  # transforms: rows · N / LENGTH
    N,
    stride,  # elements between the values of a transform
    scale,
    x_row_stride,  # elements
    out_row_stride,  # elements
    LENGTH: tl.constexpr,  # values of a transform
    PER_PROGRAM: tl.constexpr,  # transforms
):
    index = tl.program_id(0).to(tl.int64) * PER_PROGRAM + tl.arange(0, PER_PROGRAM)
    per_row = N // LENGTH
    row, i = index // per_row, index % per_row
    first = i // stride * (stride * LENGTH) + i % stride  # column of the first value
    offset = (tl.arange(0, LENGTH) * stride)[None, :]
    mask = (index < count)[:, None]
    x = tl.load(x_ptr + (row * x_row_stride + first)[:, None] + offset, mask=mask, other=0.0)
    y = butterflies(x.to(tl.float32)) * scale  # [PER_PROGRAM, LENGTH]
    out_ptrs = out_ptr + (row * out_row_stride + first)[:, None] + offset
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def butterflies(x):
    """The transform of each row of x: fp32 [ROWS, N], N a power of two up to 2^16."""
    ROWS: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    for i in tl.static_range(0, 16):
        if (N >> i) > 1:
            a, b = tl.split(tl.reshape(x, (ROWS, N // 2, 2)))
            pairs = tl.join(a + b, a - b)  # [ROWS, N / 2, 2]
            x = tl.reshape(tl.permute(pairs, (0, 2, 1)), (ROWS, N))
    return x


@hadamard_transform.op.register_autograd
class HadamardTransform(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return hadamard_transform.op.overload(x, scale)

    @staticmethod
    def backward(ctx, grad):
        # The matrix of the transform is symmetric.
        return hadamard_transform(grad.contiguous(), ctx.scale), None
