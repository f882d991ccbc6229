"""Groups of consecutive rows whose offsets only the device has.

Group g is the rows offsets[g] to offsets[g + 1]. Each group is divided into blocks of 128 rows that
start at the first row of the group. Blocks are numbered through all groups: the first block of
group g is sum_{i<g} ceil(M_i / 128), and there are at most ceil(M / 128) + G blocks.

Invalid offsets are corrected: an offset is clamped to [0, M], then raised to the largest offset
before it. So the groups are inside the tensor, in order and disjoint for any input.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..runtime.contract import check_that


def check_offsets(op: str, offsets: Tensor | None, limit: int) -> None:
    """For DEEPKERN_DEBUG=1: offsets ascend and are in [0, limit]."""
    found = [] if offsets is None else offsets.tolist()
    valid = found == sorted(found) and all(0 <= o <= limit for o in found)
    check_that(op, "group_offsets", valid, f"ascending values in [0, {limit}]", found)


@triton.jit
def larger(a, b):
    """The larger of two values, as the combine function of a scan."""
    return tl.maximum(a, b)


@triton.jit
def group_spans(
    offsets_ptr,  # int32 [G + 1]
    G,  # number of groups
    limit,  # rows of the tensor
    GROUPS: tl.constexpr,  # power of two, at least G
):
    """(first row, row after the last one) of each group, corrected: two int32 [GROUPS].

    Entries from G on are empty groups at the end of group G - 1.
    """
    group = tl.arange(0, GROUPS)
    first = tl.load(offsets_ptr + tl.minimum(group, G))
    end = tl.load(offsets_ptr + tl.minimum(group + 1, G))
    first = tl.associative_scan(tl.minimum(tl.maximum(first, 0), limit), 0, larger)
    return first, tl.maximum(first, tl.minimum(end, limit))


@triton.jit
def find_block(
    group_first,  # int32 [GROUPS], from group_spans
    group_end,  # int32 [GROUPS]
    block,  # number of the block, counted through all groups
):
    """(first row, number of rows) of `block`; (0, 0) past the last block."""
    num_blocks = (group_end - group_first + 127) // 128  # [GROUPS]
    first_block = tl.cumsum(num_blocks, 0) - num_blocks
    start = group_first + (block - first_block) * 128
    is_in_group = (block >= first_block) & (start < group_end)
    rows = tl.minimum(group_end - start, 128)
    return tl.sum(tl.where(is_in_group, start, 0), 0), tl.sum(tl.where(is_in_group, rows, 0), 0)
