"""FP8 matrices in the layout that matrix instructions read: rows of K, 16-byte aligned.

Hopper's FP8 instructions, and mma.sync's, want both operands contiguous along K. A matrix that lies
the other way, as for the layouts nn, tn and tt, is transposed here once: 2 bytes of traffic a
value. Where FP8 is widened to 16 bits in registers anyway, either layout is read as it is.

Cut: a program moves a tile of 128 x 64 bytes through shared memory, so that both sides see whole
lines. The speed is that of memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..quant.fp8 import as_bits
from ..runtime.arch import Arch
from ..runtime.integers import cdiv


def k_major(x: Tensor, target: Arch) -> Tensor:
    """`x` [..., rows, K] as [rows of all, K], laid out for kernels on `target` to read it fast.

    A copy has K rounded up to a multiple of 16, and zeros there.
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
        transpose[grid](
            as_bits(matrices, False), as_bits(out, False), rows, columns, matrices.stride(0),
            matrices.stride(2), pitch,
        )  # fmt: skip
    else:
        out[..., :columns].copy_(x)
        as_bits(out, False)[..., columns:].zero_()
    return out.view(-1, pitch)


def is_k_major(x: Tensor, target: Arch) -> bool:
    """Whether kernels for `target` read `x` [rows, K] as it lies: lines start at 16-byte marks."""
    transposed = x.stride(0) == 1 and x.stride(1) != 1 and not target.native_fp8
    line, value = x.stride()[::-1] if transposed else x.stride()
    return value == 1 and line % 16 == 0 and x.shape[1] % 16 == 0 and x.data_ptr() % 16 == 0


@triton.jit
def transpose(x_ptr, out_ptr, rows, columns, x_matrix, x_column, pitch):
    """out[row, column] = x[row, column] of bytes; x is contiguous along rows, out along columns."""
    matrix = tl.program_id(1).to(tl.int64)
    row_tiles = tl.cdiv(rows, 64)
    row = (tl.program_id(0) % row_tiles * 64 + tl.arange(0, 64)).to(tl.int64)
    column = (tl.program_id(0) // row_tiles * 128 + tl.arange(0, 128)).to(tl.int64)
    inside = (column < columns)[:, None] & (row < rows)[None, :]  # [128, 64]
    written = (column < pitch)[None, :] & (row < rows)[:, None]
    x_tile = x_ptr + matrix * x_matrix + column[:, None] * x_column + row[None, :]
    out_tile = out_ptr + (matrix * rows + row[:, None]) * pitch + column[None, :]
    tl.store(out_tile, tl.load(x_tile, mask=inside, other=0).T, mask=written)
