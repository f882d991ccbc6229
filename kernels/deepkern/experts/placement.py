"""Where each assignment of a token to an expert goes: the order that dispatch gives to rows.

    row      = start[e] + how many assignments before (t, j) go to e      for e = topk_idx[t, j]
    start[e] = Σ_{i<e} tokens_per_expert[i], each rounded up to a multiple of `alignment`

Cut: three launches, none of which waits for the host. `count_kernel` counts the assignments to
each expert in chunks of 256; `scan_kernel` turns the counts into sums over the chunks before;
`place_kernel` adds the rank within the chunk, which gives the row, and finds the expert of each
row. Ranks are counted, not drawn from atomics, so the order is always the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv, next_power_of_2

CHUNK = 256  # assignments (and rows) that one program counts and places
EXPERTS = 16  # experts that it looks at together


def place(
    topk_idx: Tensor, alignment: int, group_index: Tensor, tokens_per_expert: Tensor,
    handle: Tensor, extent: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes what `expert_dispatch` returns by these names, from int [T, topk].

    extent: int32 [2, E], where each expert's rows lie, as `m_grouped.multiply` takes it.
    """
    rows = len(group_index)
    if topk_idx.numel() == 0:
        tokens_per_expert.zero_()
        return
    counts = count(topk_idx, tokens_per_expert)
    idx = _assignments(topk_idx, tokens_per_expert)
    place_kernel[(cdiv(max(rows, topk_idx.numel()), CHUNK),)](
        *idx, counts, tokens_per_expert, group_index, handle, extent, rows, alignment,
        CHUNK=CHUNK, EXPERTS=EXPERTS, num_warps=8,
    )  # fmt: skip


def count(topk_idx: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """Writes the number of assignments to each expert; returns those before each chunk of them."""
    E, chunks = len(tokens_per_expert), cdiv(topk_idx.numel(), CHUNK)
    idx = _assignments(topk_idx, tokens_per_expert)
    counts = topk_idx.new_empty((chunks, E), dtype=torch.int32)
    count_kernel[(chunks,)](*idx, counts, CHUNK=CHUNK, BINS=next_power_of_2(E))
    scan_kernel[(cdiv(E, EXPERTS),)](
        counts, tokens_per_expert, chunks, E, CHUNKS=64, EXPERTS=EXPERTS,
    )  # fmt: skip
    return counts


def _assignments(topk_idx: Tensor, tokens_per_expert: Tensor) -> tuple:
    """What the kernels need to read them: (idx, count, topk, idx_row, E)."""
    T, topk = topk_idx.shape
    return topk_idx, T * topk, topk, topk_idx.stride(0), len(tokens_per_expert)


@triton.jit
def expert_of(idx_ptr, i, count, topk, idx_row, E):
    """The expert of assignment `i` (token i // topk, slot i % topk); -1 for none."""
    expert = tl.load(
        idx_ptr + (i // topk).to(tl.int64) * idx_row + i % topk, mask=i < count, other=-1
    )
    return tl.where((expert >= 0) & (expert < E), expert, -1).to(tl.int32)


@triton.jit(do_not_specialize=["count"])
def count_kernel(
    idx_ptr, count, topk, idx_row, E, counts_ptr, CHUNK: tl.constexpr, BINS: tl.constexpr
):
    chunk = tl.program_id(0)
    expert = expert_of(idx_ptr, chunk * CHUNK + tl.arange(0, CHUNK), count, topk, idx_row, E)
    counts = tl.histogram(expert, BINS, mask=expert >= 0)
    bin = tl.arange(0, BINS)
    tl.store(counts_ptr + chunk.to(tl.int64) * E + bin, counts, mask=bin < E)


@triton.jit(do_not_specialize=["chunks"])
def scan_kernel(counts_ptr, total_ptr, chunks, E, CHUNKS: tl.constexpr, EXPERTS: tl.constexpr):
    """counts[c, e] becomes the sum over the chunks before c; total[e] is the sum over all."""
    expert = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    before = tl.zeros((EXPERTS,), tl.int32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        inside = (chunk < chunks)[:, None] & (expert < E)[None, :]
        pointers = counts_ptr + chunk.to(tl.int64)[:, None] * E + expert[None, :]
        counts = tl.load(pointers, mask=inside, other=0)  # [CHUNKS, EXPERTS]
        tl.store(pointers, before[None, :] + tl.cumsum(counts, 0) - counts, mask=inside)
        before += tl.sum(counts, 0)
    tl.store(total_ptr + expert, before, mask=expert < E)


@triton.jit(do_not_specialize=["count", "rows"])
def place_kernel(
    idx_ptr, count, topk, idx_row, E, before_ptr, total_ptr, group_index_ptr, handle_ptr,
    extent_ptr, rows, alignment, CHUNK: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """The row of each assignment of a chunk, and the expert of as many rows."""
    chunk = tl.program_id(0)
    place = tl.arange(0, CHUNK)
    i = chunk * CHUNK + place  # assignments, and also rows
    mine = expert_of(idx_ptr, i, count, topk, idx_row, E)

    # Tiles are [EXPERTS, CHUNK], so that a thread holds whole columns and sums without the others.
    # The expert's first row, and the expert that row i belongs to.
    start = tl.zeros((CHUNK,), tl.int32)
    group = tl.full((CHUNK,), -1, tl.int32)
    begin = 0
    for first in range(0, E, EXPERTS):
        expert = first + tl.arange(0, EXPERTS)
        total = tl.load(total_ptr + expert, mask=expert < E, other=0)
        padded = tl.cdiv(total, alignment) * alignment
        starts = begin + tl.cumsum(padded, 0) - padded  # [EXPERTS]
        if extent_ptr is not None:
            writes = (chunk == 0) & (expert < E)
            there = total > 0
            tl.store(extent_ptr + expert, tl.where(there, rows - starts, 0), mask=writes)
            tl.store(extent_ptr + E + expert, tl.where(there, starts + total, 0), mask=writes)
        begin += tl.sum(padded, 0)
        start += tl.sum(tl.where(expert[:, None] == mine[None, :], starts[:, None], 0), 0)
        owns = (i[None, :] >= starts[:, None]) & (i[None, :] < (starts + total)[:, None])
        group = tl.maximum(group, tl.max(tl.where(owns, expert[:, None], -1), 0))

    # Assignments to the same expert that come before: in earlier chunks, then in this one.
    rank = tl.load(before_ptr + chunk.to(tl.int64) * E + mine, mask=mine >= 0, other=0)
    for first in range(0, CHUNK, EXPERTS):
        other = first + tl.arange(0, EXPERTS)
        theirs = expert_of(idx_ptr, chunk * CHUNK + other, count, topk, idx_row, E)
        same = (theirs[:, None] == mine[None, :]) & (other[:, None] < place[None, :])
        rank += tl.sum(same.to(tl.int32), 0)

    row = tl.where(mine >= 0, start + rank, -1)
    tl.store(handle_ptr + i, tl.where(row < rows, row, -1), mask=i < count)
    tl.store(group_index_ptr + i, group, mask=i < rows)
