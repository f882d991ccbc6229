"""What dispatch and combine share: limits, rows by expert, zeros for the rows of no token.

A block of memory work is TOKENS rows by BLOCK_K columns (ROWS by BLOCK_K for zeros): with 128
threads every one moves 16 bytes at a time, several times.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import next_power_of_2
from ..runtime.contract import check_that

TOKENS = 4
BLOCK_K = 1024
ZERO_ROWS = 64  # rows that one program clears

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def as_integers(x: Tensor) -> Tensor:
    """`x` for kernels that copy: the same bits as integers, whatever the target knows of FP8."""
    return x.view(_BITS[x.element_size()])


def check_assignments(op: str, argument: str, slots: Tensor) -> int:
    """How many slots [T, topk] there are: kernels count them in int32."""
    count = slots.numel()
    check_that(op, argument, count < 2**31, "fewer than 2^31 assignments", count)
    return count


def slots_in_flight(topk: int) -> int:
    """How many slots of a token are unrolled, so that their loads do not wait for each other."""
    return min(8, next_power_of_2(max(topk, 1)))


@triton.jit
def zero_rows(
    out_ptr, owner_ptr, rows, K, first, column, ZERO_ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """Zeros into the WIDTH columns `column` of those rows, `first` and on, that have no owner."""
    STEP: tl.constexpr = 16
    for start in range(first, first + ZERO_ROWS, STEP):
        row = start + tl.arange(0, STEP)
        unowned = tl.load(owner_ptr + row, mask=row < rows, other=0) < 0  # [STEP]
        if tl.max(unowned.to(tl.int32)) != 0:
            out = out_ptr + row.to(tl.int64)[:, None] * K + column[None, :]
            zero = tl.zeros((STEP, WIDTH), out_ptr.dtype.element_ty)
            tl.store(out, zero, mask=unowned[:, None] & (column < K)[None, :])
