"""Dispatch: every token's row, once for each of its experts, in the order of the experts.

    row      = start[e] + how many assignments before (t, j) go to e      for e = topk_idx[t, j]
    out[row] = x[t];  group_index[row] = e;  handle[t, j] = row
    start[e] = Σ_{i<e} tokens_per_expert[i], each rounded up to a multiple of `alignment`

With `cast`, q, scale = cast_per_token(x) takes the place of x.

Cut: `placement.py` finds the rows, in three small launches. `copy_kernel` then reads each token
once, casts it if asked, writes its rows, and clears the rows of no token. Nothing waits for the
host. The copy is nearly all of the time: (1 + topk) rows moved for a token, at the speed of memory;
with `cast`, what is written is a byte a value.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv
from ..quant.fp8 import block_scale, magnitude_bits, to_fp8
from ..runtime import arch
from ..runtime.contract import FP8, check_choice, check_that
from ..runtime.op import op
from .expert_combine import sum_rows
from .placement import place
from .rows import (
    BLOCK_K,
    TOKENS,
    ZERO_ROWS,
    as_integers,
    check_assignments,
    slots_in_flight,
    zero_rows,
)


@op(
    optional_output=("x_scale", "cast"),
    x="real|fp8 [T, K]",
    topk_idx="int64|int32 [T, topk]",
    x_scale="fp32 [T, K/128] strided",
)
def expert_dispatch(
    x: Tensor,
    topk_idx: Tensor,
    num_experts: int,
    x_scale: Tensor | None = None,
    alignment: int = 1,
    cast: str | None = None,
    num_assigned: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """Sorts tokens by expert: each token's row comes once for each of its experts.

    Args:
        x: bf16, fp16, fp32 or float8_e4m3fn [T, K]; rows may be strided.
        topk_idx: int64 or int32 [T, topk], the experts of each token. Whatever is not in
            [0, num_experts) is no expert (-1 by convention). An expert may come twice.
        num_experts: E.
        x_scale: fp32 [T, ceil(K / 128)], any strides: the scales of an FP8 `x`.
        alignment: the rows of each expert start at a multiple of this.
        cast: "fp32" or "ue8m0" to cast a real `x` to FP8 on the way, with scales of that format;
            the bits are those of `cast_per_token`, then dispatch.
        num_assigned: how many of the T·topk assignments name an expert, if the host knows, so that
            no more rows are made than those need. Assignments beyond find no row (-1 in `handle`).

    Returns:
        x: [rows, K] in the dtype of `x`, or FP8 with `cast`; the rows of an expert are in the order
            of (token, slot). `rows` is known to the host: N = T·topk (or `num_assigned`, if less),
            or as many as alignment can ask for, N + min(E, N)·(alignment - 1) rounded down to a
            multiple of it.
        scale: fp32 [rows, ceil(K / 128)], or None without `x_scale` and `cast` (from
            `torch.ops.deepkern`, an empty tensor).
        group_index: int32 [rows], the expert of each row, ascending; -1 for rows of no token, which
            come after those of an expert (alignment) and at the end, and whose x and scale are 0.
        tokens_per_expert: int32 [E], without the rows for alignment.
        handle: int32 [T, topk], the row of each assignment, -1 for none; for `expert_combine`.

    The gradient goes to a real `x`, without `cast`. DEEPKERN_DEBUG=1 raises for an index outside
    [-1, E).

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    name = "expert_dispatch"
    check_that(name, "num_experts", num_experts >= 1, "at least 1", num_experts)
    check_that(name, "alignment", alignment >= 1, "at least 1", alignment)
    if cast is not None:
        check_choice(name, "cast", cast, ("fp32", "ue8m0"))
        check_that(name, "cast", x.dtype != FP8 and x_scale is None, "None with FP8 rows or scales",
                   repr(cast))  # fmt: skip
    N = check_assignments(name, "topk_idx", topk_idx)
    # Of all assignments: kernels count rows in int32, those too that are not made.
    rows = most_rows(N, num_experts, alignment)
    check_that(name, "topk_idx", rows < 2**31, "fewer than 2^31 rows to write", rows)
    if num_assigned is not None:
        check_that(name, "num_assigned", num_assigned >= 0, "at least 0", num_assigned)
        rows = most_rows(min(N, num_assigned), num_experts, alignment)
    scale = (0,) if x_scale is None and cast is None else (rows, -(-x.shape[1] // 128))
    int32 = {"dtype": torch.int32, "device": x.device}
    return (
        x.new_empty((rows, x.shape[1]), dtype=x.dtype if cast is None else FP8),
        x.new_empty(scale, dtype=torch.float32),
        torch.empty(rows, **int32),
        torch.empty(num_experts, **int32),
        torch.empty(topk_idx.shape, **int32),
    )


def most_rows(N: int, E: int, alignment: int) -> int:
    """The rows that N assignments to E experts can need."""
    return (N + min(E, N) * (alignment - 1)) // alignment * alignment


@expert_dispatch.op.register_launcher("triton")
def _launch_triton(
    x: Tensor,
    topk_idx: Tensor,
    num_experts: int,
    x_scale: Tensor | None,
    alignment: int,
    cast: str | None,
    num_assigned: int | None,
) -> tuple[Tensor, ...]:
    outputs = expert_dispatch.op.allocate(
        x, topk_idx, num_experts, x_scale, alignment, cast, num_assigned
    )
    out, scale, group_index, tokens_per_expert, handle = outputs
    place(topk_idx, alignment, group_index, tokens_per_expert, handle)
    copy(x, x_scale, out, scale, group_index, handle, cast)
    return outputs


def copy(
    x: Tensor, x_scale: Tensor | None, out: Tensor, scale: Tensor, group_index: Tensor,
    handle: Tensor, cast: str | None, clear: bool = True,
) -> None:  # fmt: skip
    """Writes the rows that `handle` names to out [rows, K], and their scales to `scale`.

    The rows that `group_index` gives to no expert are cleared, or left as they are.
    """
    (T, topk), (rows, K) = handle.shape, out.shape
    if out.numel() == 0:
        return
    has_scale = x_scale is not None or cast is not None
    x_scale_row, x_scale_block = (0, 0) if x_scale is None else x_scale.stride()
    copies = cdiv(T, TOKENS)
    clears = cdiv(rows, ZERO_ROWS) if clear else 0
    copy_kernel[(copies + clears, cdiv(K, BLOCK_K))](
        as_integers(x) if cast is None else x, x_scale, as_integers(out),
        scale if has_scale else None, group_index, handle, T, topk, rows, K, cdiv(K, 128),
        copies, x.stride(0), x_scale_row, x_scale_block,
        TOKENS=TOKENS, BLOCK_K=BLOCK_K, ZERO_ROWS=ZERO_ROWS, SLOTS=slots_in_flight(topk),
        CAST=cast, NATIVE_FP8=cast is not None and arch.of(x.device).native_fp8_cast,
        num_warps=8 if cast is None else 4,  # 8 spill
    )  # fmt: skip


@expert_dispatch.op.register_debug_check
def check_contents(
    x: Tensor, topk_idx: Tensor, num_experts: int, *_, name: str = "expert_dispatch"
) -> None:
    """For DEEPKERN_DEBUG=1: every index is an expert or -1."""
    wrong = ((topk_idx < -1) | (topk_idx >= num_experts)).nonzero().tolist()
    got = f"{topk_idx[tuple(wrong[0])].item()} at {tuple(wrong[0])}" if wrong else None
    check_that(name, "topk_idx", not wrong, f"values in [-1, {num_experts})", got)


@triton.jit(do_not_specialize=["T", "rows", "copies"])
def copy_kernel(
    x_ptr, x_scale_ptr, out_ptr, scale_ptr, group_index_ptr, handle_ptr,
    T, topk, rows, K, blocks, copies, x_row, x_scale_row, x_scale_block,
    TOKENS: tl.constexpr, BLOCK_K: tl.constexpr, ZERO_ROWS: tl.constexpr, SLOTS: tl.constexpr,
    CAST: tl.constexpr, NATIVE_FP8: tl.constexpr,
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
        has_scale = (token < T)[:, None] & (block < blocks)[None, :]
        x_tile = x_ptr + token64 * x_row + column[None, :]  # [TOKENS, BLOCK_K]
        if CAST is not None:
            x, scale = cast_rows(tl.load(x_tile, mask=inside, other=0.0), CAST, NATIVE_FP8)
        else:
            x = tl.load(x_tile, mask=inside)
            if scale_ptr is not None:
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


@triton.jit
def cast_rows(x, FORMAT: tl.constexpr, NATIVE_FP8: tl.constexpr):
    """`cast_per_token` of x [ROWS, COLUMNS]: e4m3 as bytes, and [ROWS, COLUMNS / 128] scales."""
    ROWS: tl.constexpr = x.shape[0]
    BLOCKS: tl.constexpr = x.shape[1] // 128
    x = tl.reshape(x.to(tl.float32), (ROWS, BLOCKS, 128))
    scale = block_scale(tl.max(magnitude_bits(x), 2), FORMAT == "ue8m0")
    q = to_fp8(x * tl.div_rn(1.0, scale)[:, :, None], NATIVE_FP8).to(tl.uint8, bitcast=True)
    return tl.reshape(q, (ROWS, BLOCKS * 128)), scale


@op(grad="real [rows, K]", handle="int32 [T, topk]")
def expert_dispatch_backward(grad: Tensor, handle: Tensor) -> Tensor:
    """The gradient of `expert_dispatch`'s `x`: grad_x[t] = Σ_j grad[handle[t, j]], [T, K].

    Args:
        grad: real [rows, K].
        handle: int32 [T, topk] from the forward pass; a row outside [0, rows) counts as none.

    Summed in fp32 in the order of the slots, rounded once to the dtype of `grad`.
    """
    check_assignments("expert_dispatch_backward", "handle", handle)
    return grad.new_empty((handle.shape[0], grad.shape[1]))


@expert_dispatch_backward.op.register_launcher("triton")
def _launch_backward_triton(grad: Tensor, handle: Tensor) -> Tensor:
    return sum_rows(grad, None, handle, expert_dispatch_backward.op.allocate(grad, handle))


@expert_dispatch.op.register_autograd
class ExpertDispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *args):
        outputs = expert_dispatch.op.overload(x, *args)
        ctx.save_for_backward(outputs[4])
        has_gradient = ctx.needs_input_grad[0] and outputs[0].dtype != FP8
        ctx.mark_non_differentiable(*outputs[1 if has_gradient else 0 :])
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        (handle,) = ctx.saved_tensors
        return expert_dispatch_backward.op.overload(grad.contiguous(), handle), *[None] * 6
