"""Groups of consecutive rows, given by offsets that only the device knows.

Group g is the rows offsets[g] to offsets[g + 1] of a dimension that is cut into blocks of 128, and
the blocks begin anew at each group's first row. Block numbers run on from group to group: group g's
first is sum_{i<g} ceil(M_i / 128), and there are at most ceil(M / 128) + G.

Offsets are not trusted. They count as clamped to [0, M] and then raised to the largest one before,
so that whatever they hold, the groups lie in the tensor, in order, and apart.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..runtime.contract import check_that


def check_offsets(op: str, offsets: Tensor | None, limit: int) -> None:
    """For DEEPKERN_DEBUG=1: offsets ascend and stay in [0, limit]."""
    found = [] if offsets is None else offsets.tolist()
    fits = found == sorted(found) and all(0 <= o <= limit for o in found)
    check_that(op, "group_offsets", fits, f"ascending values in [0, {limit}]", found)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def group_spans(offsets_ptr, G, limit, GROUPS: tl.constexpr):
    """First row of each group and the row after its last, repaired: two of int32 [GROUPS].

    GROUPS is a power of two, at least G; what comes after group G - 1 is empty groups at its end.
    """
    group = tl.arange(0, GROUPS)
    first = tl.load(offsets_ptr + tl.minimum(group, G))
    last = tl.load(offsets_ptr + tl.minimum(group + 1, G))
    first = tl.associative_scan(tl.minimum(tl.maximum(first, 0), limit), 0, larger)
    return first, tl.maximum(first, tl.minimum(last, limit))


@triton.jit
def block_at(first, last, block):
    """First row and number of rows of `block`; (0, 0) past the last block."""
    blocks = (last - first + 127) // 128  # [GROUPS]
    before = tl.cumsum(blocks, 0) - blocks
    start = first + (block - before) * 128
    owns = (block >= before) & (start < last)
    rows = tl.minimum(last - start, 128)
    return tl.sum(tl.where(owns, start, 0), 0), tl.sum(tl.where(owns, rows, 0), 0)
