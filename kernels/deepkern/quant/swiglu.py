"""SwiGLU, with the same bits for a row in every batch.

    y[m, i] = silu(gate[m, i]) * up[m, i]      [gate | up] = gate_up, silu(g) = g·σ(g)

The factors are multiplied from left to right in fp32, each product is rounded to fp32, and the
result is rounded once to the dtype of gate_up. σ is that of `arithmetic.py`. So the bits equal
those of the reference. `F.silu` has other bits in the elements after the last whole vector.

Parallelization: one program computes ROWS rows of one 128-wide block of y.

Limit: memory bandwidth; 6 bytes per value of y in bf16 (4 read, 2 written).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv
from ..runtime.op import op
from .fp8 import BLOCK
from .swiglu_cast import check_gate_up, gate_and_up, multiply_gate_up, swiglu_cast_backward


@op(gate_up="real [M, _]")
def swiglu(gate_up: Tensor) -> Tensor:
    """Applies SwiGLU: silu(gate) * up.

    Args:
        gate_up: bf16, fp16 or fp32 [M, 2I]: I columns of gate, then I columns of up; rows may be
            strided.

    Returns:
        [M, I] in the dtype of `gate_up`, computed in fp32 and rounded once. A gate of -inf gives
        NaN.

    Differentiable in gate_up.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Example:
        >>> deepkern.swiglu(torch.randn(64, 2 * 2048)).shape
        torch.Size([64, 2048])
    """
    check_gate_up("swiglu", gate_up)
    # Fake kernel: allocates the output; the launcher of a backend computes it.
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))


@swiglu.op.register_launcher("triton")
def _launch_triton(gate_up: Tensor) -> Tensor:
    y = swiglu.op.allocate(gate_up)
    if y.numel() == 0:
        return y
    (M, I), ROWS = y.shape, 16
    swiglu_kernel[(cdiv(M, ROWS) * cdiv(I, BLOCK),)](
        gate_up, y, M, I, gate_up.stride(0), ROWS=ROWS, num_warps=4, enable_fp_fusion=False
    )
    return y


@triton.jit(do_not_specialize=["M"])
def swiglu_kernel(
    gate_up_ptr,  # real [M, 2I]
    y_ptr,  # [M, I] in the dtype of gate_up, contiguous
    M,
    I,
    gate_up_row_stride,  # elements
    ROWS: tl.constexpr,
):
    num_blocks = tl.cdiv(I, 128)
    row = (tl.program_id(0) // num_blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(0) % num_blocks * 128 + tl.arange(0, 128)
    mask = (row < M)[:, None] & (column < I)[None, :]
    gate, up = gate_and_up(gate_up_ptr + row[:, None] * gate_up_row_stride, column, I, mask)
    y = multiply_gate_up(gate, up)
    tl.store(y_ptr + row[:, None] * I + column, y.to(y_ptr.dtype.element_ty), mask=mask)


@swiglu.op.register_autograd
class Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        return swiglu.op.overload(gate_up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (gate_up,) = ctx.saved_tensors
        return swiglu_cast_backward.op.overload(grad.contiguous(), gate_up)[0]
