"""FP8 matrices in the layout that matrix instructions read: contiguous along K, 16-byte aligned.

    out[row, column] = x[row, column], contiguous along columns

FP8 matrix instructions (wgmma and mma.sync) need both operands contiguous along K. A matrix with
another layout (nn, tn, tt) is transposed once: 2 bytes of traffic per value. On targets that widen
FP8 to 16 bits in registers, a transposed matrix is read without a copy.

Parallelization: one program moves one tile of 128 x 64 bytes through shared memory, so that reads
and writes are both coalesced.

Limit: memory bandwidth.

Source: the tiled transpose of CUDA's samples.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv
from ..quant.fp8 import as_bits
from ..runtime.arch import Arch


def k_major(x: Tensor, target: Arch) -> Tensor:
    """`x` [..., rows, K] as [all rows, K] in a layout that kernels on `target` can read.

    Returns a view if possible. A copy has K rounded up to a multiple of 16, filled with zeros.
    """
    if x.dim() == 3 and (len(x) == 1 or x.stride(0) == x.stride(1) * x.shape[1]):
        x = x.flatten(0, 1) if len(x) > 1 else x[0]
    if x.dim() == 2 and is_k_major(x, target):
        return x
    rows, columns = x.shape[-2:]
    pitch = -(-columns // 16) * 16
    out = x.new_empty((*x.shape[:-1], pitch))
    if x.stride(-2) == 1 and rows > 1:
        matrices = x if x.dim() == 3 else x[None]
        grid = (cdiv(rows, 64) * cdiv(columns, 128), len(matrices))
        transpose_bytes_kernel[grid](
            as_bits(matrices, False), as_bits(out, False), rows, columns, matrices.stride(0),
            matrices.stride(2), pitch,
        )  # fmt: skip
    else:
        out[..., :columns].copy_(x)
        as_bits(out, False)[..., columns:].zero_()
    return out.view(-1, pitch)


def is_k_major(x: Tensor, target: Arch) -> bool:
    """Whether kernels for `target` can read `x` [rows, K] without a copy."""
    transposed = x.stride(0) == 1 and x.stride(1) != 1 and not target.native_fp8
    pitch, step = x.stride()[::-1] if transposed else x.stride()
    if step != 1 or x.shape[1] % 16 != 0 or x.data_ptr() % 16 != 0:
        return False
    if len(x) == 1:
        return True  # the pitch of a single row is never used
    # Rows overlap in expanded tensors and sliding windows; TMA does not support that.
    return pitch % 16 == 0 and (pitch >= x.shape[1] or not target.tma)


@triton.jit
def transpose_bytes_kernel(
    x_ptr,  # uint8 [matrices, rows, columns], contiguous along rows
    out_ptr,  # uint8 [matrices, rows, pitch], contiguous along columns
    rows,
    columns,
    x_matrix_stride,  # bytes
    x_column_stride,
    pitch,  # columns of out; those from `columns` on become 0
):
    matrix = tl.program_id(1).to(tl.int64)
    row_tiles = tl.cdiv(rows, 64)
    row = (tl.program_id(0) % row_tiles * 64 + tl.arange(0, 64)).to(tl.int64)
    column = (tl.program_id(0) // row_tiles * 128 + tl.arange(0, 128)).to(tl.int64)
    load_mask = (column < columns)[:, None] & (row < rows)[None, :]  # [128, 64]
    store_mask = (column < pitch)[None, :] & (row < rows)[:, None]  # [64, 128]
    x_ptrs = x_ptr + matrix * x_matrix_stride + column[:, None] * x_column_stride + row[None, :]
    out_ptrs = out_ptr + (matrix * rows + row[:, None]) * pitch + column[None, :]
    tl.store(out_ptrs, tl.load(x_ptrs, mask=load_mask, other=0).T, mask=store_mask)
