"""The row order of dispatch, and helpers of the kernels that copy rows.

    row      = start[e] + number of earlier assignments to e              for e = topk_idx[t, j]
    start[e] = Σ_{i<e} tokens_per_expert[i], each rounded up to a multiple of `alignment`

This is a stable counting sort by expert: rows of one expert are in the order of (token, slot).

Parallelization: three launches, none of which waits for the host. In
`expert_dispatch_count_kernel` one program counts a chunk of 128 assignments by expert. In
`expert_dispatch_scan_kernel` one program turns the counts of 16 experts into prefix sums over the
chunks. In `expert_dispatch_place_kernel` one program adds the rank within its chunk, which gives
the rows of its assignments. Ranks are counted and not drawn from atomics, so the order is the same
in every run.

Limit: launch latency. 4 or 8 bytes are read per assignment.

Kernels that copy rows process TOKENS rows x BLOCK_K columns per program (ZERO_ROWS x BLOCK_K for
zeros), so that each of 128 threads issues several 16-byte accesses.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv, next_power_of_2

TOKENS = 4
BLOCK_K = 1024
ZERO_ROWS = 64  # rows that one program clears
CHUNK = 128  # assignments per program
EXPERTS = 16  # experts per program of the prefix sums

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def as_integers(x: Tensor) -> Tensor:
    """The bits of `x` as integers, so that kernels that copy need no FP8 support."""
    return x.view(_BITS[x.element_size()])


def slots_in_flight(topk: int) -> int:
    """Slots of a token in an unrolled loop, so that their loads overlap: at most 8."""
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


def place_rows(
    topk_idx: Tensor,
    alignment: int,
    group_index: Tensor,
    tokens_per_expert: Tensor,
    handle: Tensor,
    group_bounds: Tensor | None = None,
) -> None:
    """Writes the outputs of `expert_dispatch` that depend on `topk_idx` alone.

    Args:
        topk_idx: int64 or int32 [T, topk].
        alignment: each expert's first row is a multiple of it.
        group_index: int32 [rows], written: the expert of each row, -1 for none.
        tokens_per_expert: int32 [E], written.
        handle: int32 [T, topk], written: the row of each assignment, -1 for none.
        group_bounds: int32 [2, E], written: each expert's row range, as `matmul/m_grouped.py`
            encodes it.
    """
    rows = len(group_index)
    if topk_idx.numel() == 0:
        tokens_per_expert.zero_()
        return
    counts = count_assignments(topk_idx, tokens_per_expert, group_index)
    idx = _kernel_arguments(topk_idx, tokens_per_expert)
    BINS = min(next_power_of_2(len(tokens_per_expert)), 1024)
    expert_dispatch_place_kernel[(len(counts),)](
        *idx, counts, tokens_per_expert, group_index, handle, group_bounds, rows, alignment,
        CHUNK=CHUNK, BINS=BINS, num_warps=4,
    )  # fmt: skip


def count_assignments(
    topk_idx: Tensor, tokens_per_expert: Tensor, group_index: Tensor | None = None
) -> Tensor:
    """Writes the number of assignments to each expert, int32 [E].

    Also writes -1 to all of `group_index`, if given.

    Returns int32 [chunks, E]: the assignments to each expert in all earlier chunks.
    """
    E, chunks = len(tokens_per_expert), cdiv(topk_idx.numel(), CHUNK)
    idx = _kernel_arguments(topk_idx, tokens_per_expert)
    counts = topk_idx.new_empty((chunks, E), dtype=torch.int32)
    rows = 0 if group_index is None else len(group_index)
    expert_dispatch_count_kernel[(max(chunks, cdiv(rows, CHUNK)),)](
        *idx, counts, group_index, rows, CHUNK=CHUNK, BINS=next_power_of_2(E), num_warps=4
    )
    # Up to 64 chunks take one step; more take half as many steps of 128.
    expert_dispatch_scan_kernel[(cdiv(E, EXPERTS),)](
        counts, tokens_per_expert, chunks, E, CHUNKS=64 if chunks <= 64 else 128, EXPERTS=EXPERTS
    )
    return counts


def _kernel_arguments(topk_idx: Tensor, tokens_per_expert: Tensor) -> tuple:
    """(idx_ptr, count, topk, idx_stride, E) of the kernels below."""
    T, topk = topk_idx.shape
    return topk_idx, T * topk, topk, topk_idx.stride(0), len(tokens_per_expert)


@triton.jit
def load_expert(idx_ptr, i, count, topk, idx_stride, E):
    """The expert of assignment `i` (token i // topk, slot i % topk), -1 if outside [0, E)."""
    expert = tl.load(
        idx_ptr + (i // topk).to(tl.int64) * idx_stride + i % topk, mask=i < count, other=-1
    )
    return tl.where((expert >= 0) & (expert < E), expert, -1).to(tl.int32)


@triton.jit(do_not_specialize=["count", "rows"])
def expert_dispatch_count_kernel(
    idx_ptr,  # int64 or int32 [T, topk]
    count,  # T * topk
    topk,
    idx_stride,  # elements between rows of idx
    E,  # experts
    counts_ptr,  # int32 [chunks, E], written: the assignments of each chunk to each expert
    group_index_ptr,  # int32 [rows], written: -1; or None
    rows,
    CHUNK: tl.constexpr,  # assignments per program, and rows
    BINS: tl.constexpr,  # E, rounded up to a power of two
):
    chunk = tl.program_id(0)
    i = chunk * CHUNK + tl.arange(0, CHUNK)  # the assignments, and also the rows, of this program
    if group_index_ptr is not None:
        tl.store(group_index_ptr + i, -1, mask=i < rows)
    if chunk * CHUNK < count:
        expert = load_expert(idx_ptr, i, count, topk, idx_stride, E)
        counts = tl.histogram(expert, BINS, mask=expert >= 0)
        bin = tl.arange(0, BINS)
        tl.store(counts_ptr + chunk.to(tl.int64) * E + bin, counts, mask=bin < E)


@triton.jit(do_not_specialize=["chunks"])
def expert_dispatch_scan_kernel(
    counts_ptr,  # int32 [chunks, E]: counts, replaced by their sums over the earlier chunks
    tokens_per_expert_ptr,  # int32 [E]: the sums over all chunks
    chunks,
    E,  # experts
    CHUNKS: tl.constexpr,  # chunks per step
    EXPERTS: tl.constexpr,  # experts per program
):
    expert = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    earlier = tl.zeros((EXPERTS,), tl.int32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        mask = (chunk < chunks)[:, None] & (expert < E)[None, :]
        pointers = counts_ptr + chunk.to(tl.int64)[:, None] * E + expert[None, :]
        counts = tl.load(pointers, mask=mask, other=0)  # [CHUNKS, EXPERTS]
        tl.store(pointers, earlier[None, :] + tl.cumsum(counts, 0) - counts, mask=mask)
        earlier += tl.sum(counts, 0)
    tl.store(tokens_per_expert_ptr + expert, earlier, mask=expert < E)


@triton.jit(do_not_specialize=["count", "rows"])
def expert_dispatch_place_kernel(
    idx_ptr,  # int64 or int32 [T, topk]
    count,  # T * topk
    topk,
    idx_stride,  # elements between rows of idx
    E,  # experts
    earlier_ptr,  # int32 [chunks, E]: assignments to each expert in earlier chunks
    tokens_per_expert_ptr,  # int32 [E]
    group_index_ptr,  # int32 [rows], -1; written: the expert of each row with a token
    handle_ptr,  # int32 [T, topk], written
    group_bounds_ptr,  # int32 [2, E], written: rows - first row, last row + 1; or None
    rows,  # of the output of dispatch
    alignment,  # rows
    CHUNK: tl.constexpr,  # assignments per program
    BINS: tl.constexpr,  # experts per step
):
    chunk = tl.program_id(0)
    position = tl.arange(0, CHUNK)
    i = chunk * CHUNK + position
    expert_of_i = load_expert(idx_ptr, i, count, topk, idx_stride, E)

    start = tl.zeros((CHUNK,), tl.int32)  # the first row of the assignment's expert
    first_row = 0
    for first in range(0, E, BINS):
        expert = first + tl.arange(0, BINS)
        tokens = tl.load(tokens_per_expert_ptr + expert, mask=expert < E, other=0)
        padded = tl.cdiv(tokens, alignment) * alignment
        starts = first_row + tl.cumsum(padded, 0) - padded  # [BINS]
        first_row += tl.sum(padded, 0)
        bin = expert_of_i - first
        in_step = (bin >= 0) & (bin < BINS)
        start = tl.where(in_step, tl.gather(starts, tl.where(in_step, bin, 0), 0), start)
        if group_bounds_ptr is not None:
            mask = (chunk == 0) & (expert < E)
            has_tokens = tokens > 0
            from_end = tl.where(has_tokens, rows - starts, 0)
            tl.store(group_bounds_ptr + expert, from_end, mask=mask)
            end = tl.where(has_tokens, starts + tokens, 0)
            tl.store(group_bounds_ptr + E + expert, end, mask=mask)

    # rank: earlier assignments to the same expert, in earlier chunks and then in this one.
    mask = expert_of_i >= 0
    rank = tl.load(earlier_ptr + chunk.to(tl.int64) * E + expert_of_i, mask=mask, other=0)
    same_expert = expert_of_i[:, None] == expert_of_i[None, :]
    is_earlier = position[:, None] < position[None, :]
    rank += tl.sum((same_expert & is_earlier).to(tl.int32), 0)

    row = tl.where(mask, start + rank, -1)
    row = tl.where(row < rows, row, -1)
    tl.store(handle_ptr + i, row, mask=i < count)
    tl.store(group_index_ptr + row, expert_of_i, mask=row >= 0)
