"""Dispatch: copies each token's row once for each of its experts, sorted by expert.

    row      = start[e] + number of earlier assignments to e              for e = topk_idx[t, j]
    out[row] = x[t];  group_index[row] = e;  handle[t, j] = row
    start[e] = Σ_{i<e} tokens_per_expert[i], each rounded up to a multiple of `alignment`

With `cast`, q, scale = cast_per_token(x) replaces x.

Parallelization: three small launches compute the rows (`rows.py`). In
`expert_dispatch_copy_kernel` one program reads TOKENS tokens x BLOCK_K columns once, casts them if
`cast` is given, and writes them to their rows; further programs clear the rows without a token.
Nothing waits for the host.

Limit: memory bandwidth of the copy, (1 + topk) rows per token. With `cast` the written rows have
one byte per value.

Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 2.1.2, defines the layer.
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
from .checks import check_assignments, check_indices
from .expert_combine import sum_rows
from .rows import (
    BLOCK_K,
    TOKENS,
    ZERO_ROWS,
    as_integers,
    place_rows,
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
    """Sorts tokens by expert; each token's row is copied once for each of its experts.

        rows, scale, group_index, tokens_per_expert, handle = deepkern.expert_dispatch(
            x, topk_idx, num_experts=256, cast="fp32")
        y = ...                                                   # the experts, on `rows`
        out = deepkern.expert_combine(y, topk_weights, handle)

    Args:
        x: bf16, fp16, fp32 or float8_e4m3fn [T, K]; rows may be strided.
        topk_idx: int64 or int32 [T, topk], the experts of each token. Indices outside
            [0, num_experts) are ignored (use -1). Duplicates are allowed.
        num_experts: E.
        x_scale: fp32 [T, ceil(K / 128)], any strides: the scales of an FP8 `x`.
        alignment: each expert's first row is a multiple of it.
        cast: "fp32" or "ue8m0" casts a real `x` to FP8, with scales of that format. The bits are
            those of `cast_per_token` followed by dispatch.
        num_assigned: the number of valid indices in `topk_idx`, if available on the host; it
            bounds the number of rows. Further assignments get no row (-1 in `handle`).

    Returns:
        x: [rows, K] in the dtype of `x`, or FP8 with `cast`; rows of one expert are in the order
            of (token, slot). The host knows `rows`: N = T·topk (or `num_assigned`, if less)
            without alignment, otherwise the upper bound N + min(E, N)·(alignment - 1), rounded
            down to a multiple of `alignment`.
        scale: fp32 [rows, ceil(K / 128)], or None without `x_scale` and `cast` (an empty tensor
            from `torch.ops.deepkern`).
        group_index: int32 [rows], the expert of each row, ascending; -1 for rows without a token.
            These follow the rows of an expert (alignment) and the last expert. Their x and scale
            are 0.
        tokens_per_expert: int32 [E], without the rows for alignment.
        handle: int32 [T, topk], the row of each assignment, -1 for none; for `expert_combine`.

    The gradient goes to a real `x`, without `cast`. DEEPKERN_DEBUG=1 raises for an index outside
    [-1, E).

    Raises:
        TypeError, ValueError: an argument violates the rules above.
    """
    name = "expert_dispatch"
    check_that(name, "num_experts", num_experts >= 1, "at least 1", num_experts)
    check_that(name, "alignment", alignment >= 1, "at least 1", alignment)
    if cast is not None:
        check_choice(name, "cast", cast, ("fp32", "ue8m0"))
        is_castable = x.dtype != FP8 and x_scale is None
        check_that(name, "cast", is_castable, "None with FP8 rows or scales", repr(cast))
    N = check_assignments(name, "topk_idx", topk_idx)
    # The bound without num_assigned: kernels count rows in int32, also those not allocated.
    rows = max_rows(N, num_experts, alignment)
    check_that(name, "topk_idx", rows < 2**31, "fewer than 2^31 rows to write", rows)
    if num_assigned is not None:
        check_that(name, "num_assigned", num_assigned >= 0, "at least 0", num_assigned)
        rows = max_rows(min(N, num_assigned), num_experts, alignment)
    scale = (0,) if x_scale is None and cast is None else (rows, -(-x.shape[1] // 128))
    int32 = {"dtype": torch.int32, "device": x.device}
    # Fake kernel: allocates the outputs; the launcher of a backend computes them.
    return (
        x.new_empty((rows, x.shape[1]), dtype=x.dtype if cast is None else FP8),
        x.new_empty(scale, dtype=torch.float32),
        torch.empty(rows, **int32),
        torch.empty(num_experts, **int32),
        torch.empty(topk_idx.shape, **int32),
    )


def max_rows(N: int, E: int, alignment: int) -> int:
    """The most rows that N assignments to E experts need."""
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
    place_rows(topk_idx, alignment, group_index, tokens_per_expert, handle)
    copy_to_rows(x, x_scale, out, scale, group_index, handle, cast)
    return outputs


def copy_to_rows(
    x: Tensor,
    x_scale: Tensor | None,
    out: Tensor,
    scale: Tensor,
    group_index: Tensor,
    handle: Tensor,
    cast: str | None,
    clear: bool = True,
) -> None:
    """Copies each token of `x` [T, K] to its rows of `out` [rows, K], and its scales to `scale`.

    Rows whose `group_index` is -1 are zeroed if `clear`, and otherwise not written.
    """
    (T, topk), (rows, K) = handle.shape, out.shape
    if out.numel() == 0:
        return
    has_scale = x_scale is not None or cast is not None
    x_scale_strides = (0, 0) if x_scale is None else x_scale.stride()
    copy_programs = cdiv(T, TOKENS)
    clear_programs = cdiv(rows, ZERO_ROWS) if clear else 0
    expert_dispatch_copy_kernel[(copy_programs + clear_programs, cdiv(K, BLOCK_K))](
        as_integers(x) if cast is None else x, x_scale, as_integers(out),
        scale if has_scale else None, group_index, handle, T, topk, rows, K, cdiv(K, 128),
        copy_programs, x.stride(0), *x_scale_strides,
        TOKENS=TOKENS, BLOCK_K=BLOCK_K, ZERO_ROWS=ZERO_ROWS, SLOTS=slots_in_flight(topk),
        CAST=cast, NATIVE_FP8=cast is not None and arch.of(x.device).native_fp8_cast,
        num_warps=8 if cast is None else 4,  # the cast spills with 8
    )  # fmt: skip


@expert_dispatch.op.register_debug_check
def check_contents(x: Tensor, topk_idx: Tensor, num_experts: int, *_) -> None:
    """For DEEPKERN_DEBUG=1: every index is an expert or -1."""
    check_indices("expert_dispatch", "topk_idx", topk_idx, num_experts)


@triton.jit(do_not_specialize=["T", "rows", "copy_programs"])
def expert_dispatch_copy_kernel(
    x_ptr,  # [T, K], real with CAST, otherwise the bits as integers
    x_scale_ptr,  # fp32 [T, blocks], or None
    out_ptr,  # [rows, K], contiguous: FP8 with CAST, all as integers
    scale_ptr,  # fp32 [rows, blocks], contiguous, or None
    group_index_ptr,  # int32 [rows], -1 for rows to clear
    handle_ptr,  # int32 [T, topk], contiguous: the row of each assignment, -1 for none
    T,  # tokens
    topk,
    rows,
    K,  # columns
    blocks,  # scales per row, ceil(K / 128)
    copy_programs,  # programs of axis 0 that copy; the others clear rows
    x_stride,  # elements between rows of x
    x_scale_stride_row,
    x_scale_stride_block,
    TOKENS: tl.constexpr,  # tokens per copying program
    BLOCK_K: tl.constexpr,  # columns per program
    ZERO_ROWS: tl.constexpr,  # rows per clearing program
    SLOTS: tl.constexpr,  # slots unrolled
    CAST: tl.constexpr,  # scale format, or None to copy bits
    NATIVE_FP8: tl.constexpr,
):
    BLOCKS: tl.constexpr = BLOCK_K // 128
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    if tl.program_id(0) >= copy_programs:
        first = (tl.program_id(0) - copy_programs) * ZERO_ROWS
        zero_rows(out_ptr, group_index_ptr, rows, K, first, column, ZERO_ROWS, BLOCK_K)
        if scale_ptr is not None:
            zero_rows(scale_ptr, group_index_ptr, rows, blocks, first, block, ZERO_ROWS, BLOCKS)
    else:
        token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
        token64 = token.to(tl.int64)[:, None]
        x_mask = (token < T)[:, None] & (column < K)[None, :]
        scale_mask = (token < T)[:, None] & (block < blocks)[None, :]
        x_tile = x_ptr + token64 * x_stride + column[None, :]  # [TOKENS, BLOCK_K]
        if CAST is not None:
            x, scale = cast_rows(tl.load(x_tile, mask=x_mask, other=0.0), CAST, NATIVE_FP8)
        else:
            x = tl.load(x_tile, mask=x_mask)
            if scale_ptr is not None:
                scale_row = x_scale_ptr + token64 * x_scale_stride_row
                scale_tile = scale_row + block[None, :] * x_scale_stride_block
                scale = tl.load(scale_tile, mask=scale_mask)
        for first in range(0, topk, SLOTS):
            for j in tl.static_range(SLOTS):
                slot = first + j
                row = tl.load(
                    handle_ptr + token64 * topk + slot, mask=(token64 < T) & (slot < topk), other=-1
                ).to(tl.int64)  # [TOKENS, 1]
                has_row = row >= 0
                tl.store(out_ptr + row * K + column[None, :], x, mask=x_mask & has_row)
                if scale_ptr is not None:
                    out_tile = scale_ptr + row * blocks + block[None, :]
                    tl.store(out_tile, scale, mask=scale_mask & has_row)


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
    """The gradient of `expert_dispatch` with respect to `x`: grad_x[t] = Σ_j grad[handle[t, j]].

        grad_x = deepkern.expert_dispatch_backward(grad, handle)

    Args:
        grad: real [rows, K], of the dispatched rows.
        handle: int32 [T, topk] from the forward pass; rows outside [0, rows) are ignored.

    Returns:
        [T, K] in the dtype of `grad`: summed in fp32 in the order of the slots, rounded once.

    Raises:
        TypeError, ValueError: an argument violates the rules above.
    """
    check_assignments("expert_dispatch_backward", "handle", handle)
    # Fake kernel: allocates the outputs; the launcher of a backend computes them.
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
