"""The Walsh-Hadamard transform of every row: the rotation before the indexer's FP8 cast.

    out[..., i] = scale · Σ_j (-1)^popcount(i & j) x[..., j]

log2(N) rounds of butterflies (a, b) -> (a + b, a - b) in fp32, the lowest bit of the place first,
and one rounding at the end. A round takes neighbours and puts the sums before the differences,
which turns the bits of the place by one: after all rounds they stand as they did, and no round
needs anything but neighbours ("constant geometry").

Cut: a program takes some rows; for N > 2048 first runs of 2048 values, and in a second pass, from
fp32 scratch, the remaining bits, some columns of the same. A pass reads and writes each value once.

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
RUN = 2048  # values that one pass transforms
TILE = 2048  # values of a program; of one that reads columns, whose addresses take registers, less
COLUMN_TILE = 1024


@op(x="real [..., N]")
def hadamard_transform(x: Tensor, scale: float = 1.0) -> Tensor:
    """The Walsh-Hadamard transform over the last dimension, in the natural order.

    Args:
        x: bf16, fp16 or fp32 [..., N], N a power of two up to 32768; pad others with zeros.
        scale: multiplies the result in fp32; N**-0.5 makes a rotation, which is its own inverse.

    Returns:
        [..., N] in the dtype of `x`, computed in fp32 and rounded once.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    N = x.shape[-1]
    check_that("hadamard_transform", "x", N <= MAX_N and N & (N - 1) == 0,
               f"a power of two up to {MAX_N} as last dimension",
               f"shape {tuple(x.shape)}")  # fmt: skip
    return x.new_empty(x.shape)


@hadamard_transform.op.register_launcher("triton")
def _launch_triton(x: Tensor, scale: float) -> Tensor:
    out = hadamard_transform.op.allocate(x, scale)
    if out.numel() == 0:
        return out
    N = x.shape[-1]
    run = min(N, RUN)
    rows = x.reshape(-1, N)  # a view unless the leading dimensions cannot be merged
    if run == N:
        transform(rows, out.view(-1, N), len(rows), run, 1, scale)
    else:
        scratch = torch.empty_like(rows, dtype=torch.float32)
        transform(rows, scratch, len(rows), run, 1, 1.0)
        transform(scratch, out.view(-1, N), len(rows), N // run, run, scale)
    return out


def transform(x: Tensor, out: Tensor, rows: int, length: int, inner: int, scale: float) -> None:
    """Transforms `length` values `inner` apart, wherever such begin in the rows of x [rows, N]."""
    N = x.shape[1]
    COLUMNS = (TILE if inner == 1 else COLUMN_TILE) // length
    hadamard_transform_kernel[(cdiv(rows * (N // length), COLUMNS),)](
        x, out, rows * (N // length), N, inner, scale, x.stride(0), out.stride(0),
        LENGTH=length, COLUMNS=COLUMNS, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def hadamard_transform_kernel(
    x_ptr, out_ptr, count, N, inner, scale, x_row, out_row,
    LENGTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """COLUMNS of the `count` transforms; those of a row begin at places whose bits of it are 0."""
    which = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    of_row = N // LENGTH
    row, place = which // of_row, which % of_row
    begin = place // inner * (inner * LENGTH) + place % inner
    step = (tl.arange(0, LENGTH) * inner)[None, :]
    inside = (which < count)[:, None]
    x = tl.load(x_ptr + (row * x_row + begin)[:, None] + step, mask=inside, other=0.0)
    y = butterflies(x.to(tl.float32)) * scale  # [COLUMNS, LENGTH]
    out = out_ptr + (row * out_row + begin)[:, None] + step
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def butterflies(x):
    """The transform of the rows of x [ROWS, 2^n]."""
    ROWS: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    for i in tl.static_range(0, 16):
        if (N >> i) > 1:
            a, b = tl.split(tl.reshape(x, (ROWS, N // 2, 2)))
            both = tl.join(a + b, a - b)  # [ROWS, N / 2, 2]
            x = tl.reshape(tl.permute(both, (0, 2, 1)), (ROWS, N))
    return x


@hadamard_transform.op.register_autograd
class HadamardTransform(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return hadamard_transform.op.overload(x, scale)

    @staticmethod
    def backward(ctx, grad):
        """The transform is symmetric."""
        return hadamard_transform(grad.contiguous(), ctx.scale), None
