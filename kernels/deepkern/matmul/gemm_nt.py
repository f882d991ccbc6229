"""GEMM of bf16, fp16 or fp32 matrices whose rows do not depend on each other: D = A · Bᵀ.

    d[m, n] = Σ_k a[m, k] · b[n, k]  in fp32, rounded once

`F.linear` chooses its kernel, and with it the order of the sum, by the number of rows. Here the
order depends on K and on the target only, so a row has the same bits in every batch.

Parallelization: one program computes one BLOCK_M x BLOCK_N tile of D. Tiles are ordered in groups
of GROUP_M tile rows, for reuse of B in L2.

Limit: large M is bound by the tensor core. Small M is bandwidth-bound on B. There B is the 64-row
operand of the 16-bit matrix instruction (`swapped`), because A has too few rows for it.

Source: the batch-invariant matmul of "Defeating Nondeterminism in LLM Inference" (Thinking Machines
Lab, 2025): one order of summation for every number of rows, and no split of K that depends on it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv
from ..runtime import arch
from ..runtime.contract import check_choice
from ..runtime.op import op
from ..runtime.tiles import GemmTile
from .block_scaled_gemm import swizzle_tile
from .fp8_gemm_nt import REAL
from .real_gemm import block_k, choose_real_tile, index_type, multiply_real_tile


@op(a="real [M, K] strided", b="real [N, K] strided")
def gemm_nt(a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """Multiplies matrices, `a @ b.T`, with the same bits for a row in every batch.

    Args:
        a: bf16, fp16 or fp32 [M, K], any strides.
        b: [N, K] in a's dtype, any strides (`w.t()` for a weight [K, N]).
        out_dtype: bfloat16, float16 or float32; None (the default) for a's dtype.

    Returns:
        [M, N] of `out_dtype`, summed in fp32 in an order that depends on K and the target only, and
        rounded once. fp32 operands are multiplied in fp32, or in three TF32 products. M, N and K
        may be 0.

    Differentiable in a and b.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Example:
        >>> deepkern.gemm_nt(torch.randn(3, 512), torch.randn(256, 512)).shape
        torch.Size([3, 256])
    """
    dtype = check_real_dtypes("gemm_nt", a, b, out_dtype)
    # Fake kernel: allocates the output; the launcher of a backend computes it.
    return a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)


def check_real_dtypes(op: str, a: Tensor, b: Tensor, out_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of the result. Checks that b has a's dtype, and `out_dtype`."""
    if b.dtype != a.dtype:
        raise TypeError(f"{op}: b: expected dtype {a.dtype} (that of a), got {b.dtype}")
    check_choice(op, "out_dtype", out_dtype, (*REAL, None))
    return a.dtype if out_dtype is None else out_dtype


@gemm_nt.op.register_tile
def choose_tile(a: Tensor, b: Tensor, *_) -> GemmTile:
    """The tile that the launcher uses for these arguments."""
    return choose_real_tile(a, b, len(a))


@gemm_nt.op.register_launcher("triton")
def _launch_triton(a: Tensor, b: Tensor, out_dtype: torch.dtype | None) -> Tensor:
    out = gemm_nt.op.allocate(a, b, out_dtype)
    if out.numel() == 0:
        return out
    (M, K), N = a.shape, b.shape[0]
    if K == 0:
        return out.zero_()
    target, tile, BLOCK_K = arch.of(a.device), choose_tile(a, b), block_k(a)
    gemm_nt_kernel[(cdiv(M, tile.BLOCK_M) * cdiv(N, tile.BLOCK_N),)](
        a, b, out, M, N, K, *a.stride(), *b.stride(),
        EVEN_K=K % BLOCK_K == 0, SWAPPED=tile.swapped, PRECISION=target.input_precision,
        INDEX=index_type(a, b), BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, BLOCK_K=BLOCK_K,
        GROUP_M=tile.GROUP_M, **tile.options(target),
    )  # fmt: skip
    return out


# M is masked and never specialized: one compiled kernel serves every M.
@triton.jit(do_not_specialize=["M"])
def gemm_nt_kernel(
    a_ptr,  # real [M, K]
    b_ptr,  # [N, K]
    out_ptr,  # [M, N], contiguous
    M,
    N,
    K,
    a_row_stride,  # all strides in elements
    a_k_stride,
    b_row_stride,
    b_k_stride,
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K
    SWAPPED: tl.constexpr,  # b is the left operand of the matrix instruction
    PRECISION: tl.constexpr,  # of fp32 products
    INDEX: tl.constexpr,  # type of offsets within a tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,  # tile rows per L2 group
):
    row_block, column_block = swizzle_tile(
        tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M
    )
    row = tl.cast(row_block * BLOCK_M, tl.int64) + tl.arange(0, BLOCK_M)
    column = tl.cast(column_block * BLOCK_N, tl.int64) + tl.arange(0, BLOCK_N)
    row_mask, column_mask = row < M, column < N
    acc = multiply_real_tile(
        a_ptr + row[:, None] * a_row_stride, row_mask[:, None], a_k_stride,
        b_ptr + column[:, None] * b_row_stride, column_mask[:, None], b_k_stride, K,
        EVEN_K, SWAPPED, PRECISION, INDEX, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    out_ptrs = out_ptr + row[:, None] * N + column[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@gemm_nt.op.register_autograd
class GemmNt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, out_dtype):
        ctx.save_for_backward(a, b)
        return gemm_nt.op.overload(a, b, out_dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        grad = grad.to(a.dtype)
        grad_a = gemm_nt.op.overload(grad, b.t()) if ctx.needs_input_grad[0] else None
        grad_b = gemm_nt.op.overload(grad.t(), a.t()) if ctx.needs_input_grad[1] else None
        return grad_a, grad_b, None
