"""Dispatch: every token's row, once for each of its experts, in the order of the experts.

    row      = start[e] + how many assignments before (t, j) go to e      for e = topk_idx[t, j]
    out[row] = x[t];  group_index[row] = e;  handle[t, j] = row
    start[e] = Σ_{i<e} tokens_per_expert[i], each rounded up to a multiple of `alignment`

Cut: four launches, none of which waits for the host. `count_kernel` counts the assignments to
each expert in chunks of 256; `scan_kernel` turns the counts into sums over the chunks before;
`place_kernel` adds the rank within the chunk, which gives the handle, and finds the expert of each
row; `copy_kernel` reads each token once and writes its rows, and clears the rows of no token.
Ranks are counted, not drawn from atomics, so the order is always the same. The copy is nearly all
of the time: (1 + topk) rows moved for a token, at the speed of memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.contract import FP8, check_that
from ..runtime.op import op
from .expert_combine import sum_rows
from .rows import BLOCK_K, TOKENS, ZERO_ROWS, as_integers, slots_in_flight, zero_rows

CHUNK = 256  # assignments (and rows) that one program counts and places
EXPERTS = 16  # experts that it looks at together


@op(x="real|fp8 [T, K]", topk_idx="int64|int32 [T, topk]", x_scale="fp32 [T, K/128] strided")
def expert_dispatch(
    x: Tensor,
    topk_idx: Tensor,
    num_experts: int,
    x_scale: Tensor | None = None,
    alignment: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sorts tokens by expert: each token's row comes once for each of its experts.

    Args:
        x: bf16, fp16, fp32 or float8_e4m3fn [T, K]; rows may be strided.
        topk_idx: int64 or int32 [T, topk], the experts of each token. Whatever is not in
            [0, num_experts) is no expert (-1 by convention). An expert may come twice.
        num_experts: E.
        x_scale: fp32 [T, ceil(K / 128)], any strides: the scales of an FP8 `x`.
        alignment: the rows of each expert start at a multiple of this.

    Returns:
        x: [rows, K] in the dtype of `x`; the rows of an expert are in the order of (token, slot).
            `rows` is known to the host: T·topk, or as many as alignment can ask for,
            T·topk + min(E, T·topk)·(alignment - 1) rounded down to a multiple of it.
        scale: fp32 [rows, ceil(K / 128)], or None without `x_scale` (from `torch.ops.deepkern`, an
            empty tensor).
        group_index: int32 [rows], the expert of each row, ascending; -1 for rows of no token, which
            come after those of an expert (alignment) and at the end, and whose x and scale are 0.
        tokens_per_expert: int32 [E], without the rows for alignment.
        handle: int32 [T, topk], the row of each assignment, -1 for none; for `expert_combine`.

    The gradient goes to a real `x`. DEEPKERN_DEBUG=1 raises for an index outside [-1, E).

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    name, (T, topk) = "expert_dispatch", topk_idx.shape
    check_that(name, "num_experts", num_experts >= 1, "at least 1", num_experts)
    check_that(name, "alignment", alignment >= 1, "at least 1", alignment)
    rows = T * topk + min(num_experts, T * topk) * (alignment - 1)
    rows = rows // alignment * alignment
    check_that(name, "topk_idx", rows < 2**31, "fewer than 2^31 rows to write", rows)
    scale = (rows, -(-x.shape[1] // 128)) if x_scale is not None else (0,)
    int32 = {"dtype": torch.int32, "device": x.device}
    return (
        x.new_empty((rows, x.shape[1])),
        x.new_empty(scale, dtype=torch.float32),
        torch.empty(rows, **int32),
        torch.empty(num_experts, **int32),
        torch.empty((T, topk), **int32),
    )


expert_dispatch.optional_output = (1, "x_scale")


@expert_dispatch.backend("triton")
def launch(
    x: Tensor, topk_idx: Tensor, num_experts: int, x_scale: Tensor | None, alignment: int
) -> tuple[Tensor, ...]:
    outputs = expert_dispatch.allocate(x, topk_idx, num_experts, x_scale, alignment)
    out, scale, group_index, tokens_per_expert, handle = outputs
    (T, topk), E, (rows, K) = topk_idx.shape, num_experts, out.shape
    if rows == 0:
        tokens_per_expert.zero_()
        return outputs
    idx = topk_idx, T * topk, topk, topk_idx.stride(0), E
    chunks = triton.cdiv(T * topk, CHUNK)
    counts = x.new_empty((chunks, E), dtype=torch.int32)
    count_kernel[(chunks,)](*idx, counts, CHUNK=CHUNK, BINS=triton.next_power_of_2(E))
    scan_kernel[(triton.cdiv(E, EXPERTS),)](
        counts, tokens_per_expert, chunks, E, CHUNKS=64, EXPERTS=EXPERTS,
    )  # fmt: skip
    place_kernel[(triton.cdiv(rows, CHUNK),)](
        *idx, counts, tokens_per_expert, group_index, handle, rows, alignment,
        CHUNK=CHUNK, EXPERTS=EXPERTS, num_warps=8,
    )  # fmt: skip
    if K == 0:
        return outputs
    blocks = triton.cdiv(K, 128)
    x_scale_row, x_scale_block = (0, 0) if x_scale is None else x_scale.stride()
    copies = triton.cdiv(T, TOKENS)
    copy_kernel[(copies + triton.cdiv(rows, ZERO_ROWS), triton.cdiv(K, BLOCK_K))](
        as_integers(x), x_scale, as_integers(out), None if x_scale is None else scale,
        group_index, handle, T, topk, rows, K, blocks, copies, x.stride(0), x_scale_row,
        x_scale_block, TOKENS=TOKENS, BLOCK_K=BLOCK_K, ZERO_ROWS=ZERO_ROWS,
        SLOTS=slots_in_flight(topk), num_warps=8,
    )  # fmt: skip
    return outputs


def check_contents(x: Tensor, topk_idx: Tensor, num_experts: int, *_) -> None:
    """For DEEPKERN_DEBUG=1: every index is an expert or -1."""
    wrong = ((topk_idx < -1) | (topk_idx >= num_experts)).nonzero().tolist()
    got = f"{topk_idx[tuple(wrong[0])].item()} at {tuple(wrong[0])}" if wrong else None
    check_that("expert_dispatch", "topk_idx", not wrong, f"values in [-1, {num_experts})", got)


expert_dispatch.check_contents = check_contents


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
    rows, alignment, CHUNK: tl.constexpr, EXPERTS: tl.constexpr,
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

    tl.store(handle_ptr + i, tl.where(mine >= 0, start + rank, -1), mask=i < count)
    tl.store(group_index_ptr + i, group, mask=i < rows)


@triton.jit(do_not_specialize=["T", "rows", "copies"])
def copy_kernel(
    x_ptr, x_scale_ptr, out_ptr, scale_ptr, group_index_ptr, handle_ptr,
    T, topk, rows, K, blocks, copies, x_row, x_scale_row, x_scale_block,
    TOKENS: tl.constexpr, BLOCK_K: tl.constexpr, ZERO_ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The first `copies` programs write the rows of TOKENS tokens each, the others clear rows."""
    BLOCKS: tl.constexpr = BLOCK_K // 128
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    if tl.program_id(0) >= copies:
        first = (tl.program_id(0) - copies) * ZERO_ROWS
        zero_rows(out_ptr, group_index_ptr, rows, K, first, column, ZERO_ROWS, BLOCK_K)
        if scale_ptr is not None:
            zero_rows(scale_ptr, group_index_ptr, rows, blocks, first, block, ZERO_ROWS, BLOCKS)
    else:
        token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
        token64 = token.to(tl.int64)[:, None]
        inside = (token < T)[:, None] & (column < K)[None, :]
        x = tl.load(x_ptr + token64 * x_row + column[None, :], mask=inside)  # [TOKENS, BLOCK_K]
        if scale_ptr is not None:
            has_scale = (token < T)[:, None] & (block < blocks)[None, :]
            scale_tile = x_scale_ptr + token64 * x_scale_row + block[None, :] * x_scale_block
            scale = tl.load(scale_tile, mask=has_scale)
        for first in range(0, topk, SLOTS):
            for j in tl.static_range(SLOTS):
                slot = first + j
                row = tl.load(
                    handle_ptr + token64 * topk + slot, mask=(token64 < T) & (slot < topk), other=-1
                ).to(tl.int64)  # [TOKENS, 1]
                there = row >= 0
                tl.store(out_ptr + row * K + column[None, :], x, mask=inside & there)
                if scale_ptr is not None:
                    out_tile = scale_ptr + row * blocks + block[None, :]
                    tl.store(out_tile, scale, mask=has_scale & there)


@op(grad="real [rows, K]", handle="int32 [T, topk]")
def expert_dispatch_backward(grad: Tensor, handle: Tensor) -> Tensor:
    """The gradient of `expert_dispatch`'s `x`: grad_x[t] = Σ_j grad[handle[t, j]], [T, K].

    Args:
        grad: real [rows, K].
        handle: int32 [T, topk] from the forward pass; a row outside [0, rows) counts as none.

    Summed in fp32 in the order of the slots, rounded once to the dtype of `grad`.
    """
    return grad.new_empty((handle.shape[0], grad.shape[1]))


@expert_dispatch_backward.backend("triton")
def launch_backward(grad: Tensor, handle: Tensor) -> Tensor:
    return sum_rows(grad, None, handle, expert_dispatch_backward.allocate(grad, handle))


class ExpertDispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, topk_idx, num_experts, x_scale, alignment):
        outputs = expert_dispatch.overload(x, topk_idx, num_experts, x_scale, alignment)
        ctx.save_for_backward(outputs[4])
        has_gradient = ctx.needs_input_grad[0] and x.dtype != FP8
        ctx.mark_non_differentiable(*outputs[1 if has_gradient else 0 :])
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        (handle,) = ctx.saved_tensors
        return expert_dispatch_backward.overload(grad.contiguous(), handle), *[None] * 4


expert_dispatch.autograd = ExpertDispatch
