"""What dispatch and combine share: rows by expert, and writing zeros to the rows of no token.

A block of memory work is TOKENS rows by BLOCK_K columns (ROWS by BLOCK_K for zeros): with 128
threads every one moves 16 bytes at a time, several times.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS = 4
BLOCK_K = 1024
ZERO_ROWS = 64  # rows that one program clears
SLOTS = 8  # slots of a token whose loads are in flight together

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def as_integers(x: Tensor) -> Tensor:
    """`x` for kernels that copy: the same bits as integers, whatever the target knows of FP8."""
    return x.view(_BITS[x.element_size()])


@triton.jit
def zero_rows(
    out_ptr, scale_ptr, owner_ptr, rows, K, blocks, first, column,
    ZERO_ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Zeros into columns `column` of those rows from `first` on that have no owner (-1)."""
    STEP: tl.constexpr = 16
    for start in range(first, first + ZERO_ROWS, STEP):
        row = start + tl.arange(0, STEP)
        unowned = (tl.load(owner_ptr + row, mask=row < rows, other=0) < 0)[:, None]  # [STEP, 1]
        if tl.max(unowned.to(tl.int32)) != 0:
            line = row.to(tl.int64)[:, None]
            zero = tl.zeros((STEP, BLOCK_K), out_ptr.dtype.element_ty)
            tl.store(out_ptr + line * K + column[None, :], zero, mask=unowned & (column < K)[None, :])
            if scale_ptr is not None:
                block = column // 128
                inside = unowned & (column % 128 == 0)[None, :] & (block < blocks)[None, :]
                tl.store(scale_ptr + line * blocks + block[None, :], 0.0, mask=inside)
