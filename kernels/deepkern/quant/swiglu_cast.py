"""SwiGLU and the FP8 cast of its result in one kernel, and the backward pass.

    y[m, i]  = silu(gate[m, i]) * up[m, i] * weights[m]      [gate | up] = gate_up, silu(g) = g·σ(g)
    q, scale = cast_per_token(y)                             y in fp32: one scale per row and block

With a limit, gate = min(gate, limit) and up = clamp(up, -limit, limit) come first. The factors are
multiplied from left to right and each product is rounded to fp32. σ is that of `arithmetic.py`. So
the bits equal those of the reference.

The backward pass reads the input of the forward pass, optionally stored in FP8, and recomputes y.

Parallelization: forward, one program computes ROWS rows of one 128-wide block of y from two blocks
of gate_up. Backward, one program computes ROWS rows in steps of 128 columns, because the gradient
of a weight is a sum over its row. That sum has a fixed order: over the steps first, one partial sum
per column of the block, then pairwise over these 128 partial sums.

Limit: memory bandwidth; forward, 5 bytes per value of y in bf16 (4 read, 1 written).

Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.3: the inputs of SwiGLU are
stored in FP8 and its output is recomputed in the backward pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv, sigmoid, sum_pairwise
from ..runtime import arch
from ..runtime.contract import FP8, check_choice, check_that
from ..runtime.op import op
from .fp8 import (
    BLOCK,
    LAYOUTS,
    as_bits,
    block_scale,
    from_fp8,
    magnitude_bits,
    new_scale,
    to_fp8,
    with_padding,
)


@op(gate_up="real [M, _]", weights="fp32 [M]")
def swiglu_cast(
    gate_up: Tensor,
    weights: Tensor | None = None,
    limit: float | None = None,
    scale_format: str = "fp32",
    scale_layout: str = "row",
) -> tuple[Tensor, Tensor]:
    """Applies SwiGLU and casts the result to FP8 with one scale per row and block of 128 columns.

    Args:
        gate_up: bf16, fp16 or fp32 [M, 2I]: I columns of gate, then I columns of up; rows may be
            strided.
        weights: fp32 [M], a factor per row (an expert's routing weight), or None (the default).
        limit: at least 0, or None (the default). Clamps gate to at most `limit` and up to
            [-limit, limit]; NaN stays NaN.
        scale_format: "fp32" (the default), or "ue8m0" to round every scale up to a power of two.
        scale_layout: "row" (the default), or "column" for a scale with strides (1, pitch), which a
            Hopper GEMM loads by TMA. `pitch` is M rounded up to a multiple of 4; the padding holds
            zeros.

    Returns:
        q: float8_e4m3fn [M, I].
        scale: fp32 [M, ceil(I / 128)]; q times scale approximates silu(gate) * up * weights.

    All operations between `gate_up` and `q` are in fp32. Blocks of zeros, inf and NaN are as in
    `cast_per_token`; a gate of -inf gives NaN.

    There is no autograd: torch would cast the gradient of an FP8 output to FP8. Use
    `swiglu_cast_backward`.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Example:
        >>> q, scale = deepkern.swiglu_cast(torch.randn(64, 2 * 2048))
        >>> q.shape, scale.shape
        (torch.Size([64, 2048]), torch.Size([64, 16]))
    """
    name, (M, columns) = "swiglu_cast", gate_up.shape
    check_gate_up(name, gate_up)
    check_limit(name, limit)
    check_choice(name, "scale_format", scale_format, ("fp32", "ue8m0"))
    check_choice(name, "scale_layout", scale_layout, LAYOUTS)
    scale = new_scale(gate_up, (M, -(-columns // 2 // BLOCK)), scale_layout)
    # Fake kernel: allocates the outputs; the launcher of a backend computes them.
    return gate_up.new_empty((M, columns // 2), dtype=FP8), scale


def check_gate_up(name: str, gate_up: Tensor) -> None:
    """Raises ValueError for an odd number of columns; `name` is the op."""
    expected, got = "an even number of columns, [gate | up]", f"shape {tuple(gate_up.shape)}"
    check_that(name, "gate_up", gate_up.shape[1] % 2 == 0, expected, got)


def check_limit(name: str, limit: float | None) -> None:
    """Raises ValueError for a negative limit or NaN; `name` is the op."""
    check_that(name, "limit", limit is None or limit >= 0, "a number >= 0, or None", limit)


@swiglu_cast.op.register_launcher("triton")
def _launch_triton(
    gate_up: Tensor,
    weights: Tensor | None,
    limit: float | None,
    scale_format: str,
    scale_layout: str,
) -> tuple[Tensor, Tensor]:
    q, scale = swiglu_cast.op.allocate(gate_up, weights, limit, scale_format, scale_layout)
    launch_swiglu_cast(gate_up, weights, limit, q, scale, scale_format, scale_layout)
    return q, scale


def launch_swiglu_cast(
    gate_up: Tensor,
    weights: Tensor | None,
    limit: float | None,
    q: Tensor,
    scale: Tensor,
    scale_format: str = "fp32",
    scale_layout: str = "row",
    group_index: Tensor | None = None,
) -> None:
    """Writes q and scale, except in rows whose `group_index` (int32 [M]) is negative."""
    if q.numel() == 0:
        return
    M, I = q.shape
    padded = with_padding(scale, scale_layout)
    native_fp8 = arch.of(q.device).native_fp8_cast
    ROWS = 16  # a multiple of 4, so that the last program also writes the padding of the scale
    swiglu_cast_kernel[(cdiv(M, ROWS) * cdiv(I, BLOCK),)](
        gate_up, weights, group_index, limit, as_bits(q, native_fp8), padded, M, padded.shape[0], I,
        gate_up.stride(0), *scale.stride(),
        UE8M0=scale_format == "ue8m0", NATIVE_FP8=native_fp8, ROWS=ROWS,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "padded_M"])
def swiglu_cast_kernel(
    gate_up_ptr,  # real [M, 2I]
    weights_ptr,  # fp32 [M], or None
    group_index_ptr,  # int32 [M], or None; rows with a negative index are not written
    limit,  # number, or None
    q_ptr,  # FP8 or its bytes [M, I], contiguous
    scale_ptr,  # fp32 [padded_M, ceil(I / 128)]
    M,
    padded_M,  # rows of the scale with its padding; the kernel writes zeros from row M on
    I,
    gate_up_row_stride,  # all strides in elements
    scale_row_stride,
    scale_block_stride,
    UE8M0: tl.constexpr,  # round scales up to powers of two
    NATIVE_FP8: tl.constexpr,
    ROWS: tl.constexpr,
):
    num_blocks = tl.cdiv(I, 128)
    block = tl.program_id(0) % num_blocks
    row = (tl.program_id(0) // num_blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = block * 128 + tl.arange(0, 128)
    row_mask, scale_mask = row < M, row < padded_M
    if group_index_ptr is not None:
        row_mask &= tl.load(group_index_ptr + row, mask=row_mask, other=-1) >= 0
        scale_mask &= row_mask
    mask = row_mask[:, None] & (column < I)[None, :]
    gate, up = gate_and_up(gate_up_ptr + row[:, None] * gate_up_row_stride, column, I, mask)
    gate, up = clamp_gate_up(gate, up, limit)

    y = multiply_gate_up(gate, up)
    if weights_ptr is not None:
        y *= tl.load(weights_ptr + row, mask=row_mask, other=0.0)[:, None]
    scale = block_scale(tl.max(magnitude_bits(y), 1), UE8M0)  # [ROWS]
    q = to_fp8(y * tl.div_rn(1.0, scale)[:, None], NATIVE_FP8)

    tl.store(q_ptr + row[:, None] * I + column, q, mask=mask)
    scale_ptrs = scale_ptr + row * scale_row_stride + block.to(tl.int64) * scale_block_stride
    tl.store(scale_ptrs, tl.where(row_mask, scale, 0.0), mask=scale_mask)


@triton.jit
def gate_and_up(
    row_ptrs,  # [ROWS, 1] pointers to the first value of each row of gate_up
    column,  # [128]
    I,
    mask,  # [ROWS, 128]
):
    """(gate, up) of these columns in fp32, both [ROWS, 128]."""
    gate = tl.load(row_ptrs + column, mask=mask, other=0.0).to(tl.float32)
    return gate, tl.load(row_ptrs + I + column, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def multiply_gate_up(gate, up):
    """silu(gate) * up in fp32, multiplied from left to right."""
    return gate * sigmoid(gate) * up


@triton.jit
def clamp_gate_up(gate, up, limit):
    """(min(gate, limit), clamp(up, -limit, limit)) in fp32; NaN stays NaN. No-op without limit."""
    if limit is not None:
        gate = tl.where(gate > limit, limit, gate)
        lowest = 0.0 - limit  # +0 for a limit of 0; -limit would be -0
        up = tl.where(up > limit, limit, tl.where(up < lowest, lowest, up))
    return gate, up


@op(
    optional_output=("weights",),
    grad="real [M, I]",
    gate_up="real|fp8 [M, J]",
    gate_up_scale="fp32 [M, J/128] strided",
    weights="fp32 [M]",
)
def swiglu_cast_backward(
    grad: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor | None = None,
    weights: Tensor | None = None,
    limit: float | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Computes the gradients of SwiGLU and recomputes its result.

    Args:
        grad: bf16, fp16 or fp32 [M, I], the gradient of y = silu(gate) * up * weights; rows may be
            strided, here and in `gate_up`.
        gate_up: [M, 2I]: the real input of `swiglu_cast`, or its float8_e4m3fn cast by
            `cast_per_token`.
        gate_up_scale: fp32 [M, ceil(2I / 128)], any strides, with an FP8 `gate_up`; else None (the
            default).
        weights, limit: as in the forward pass.

    Returns:
        grad_gate_up: [M, 2I] in the dtype of `grad`. The gradient of a clamped value is 0. A
            value equal to the limit and NaN are not clamped.
        y: [M, I] in the dtype of `grad`; the gradient of the next layer's weight needs it.
        grad_weights: fp32 [M], or None without `weights` (an empty tensor from
            `torch.ops.deepkern`).

    Raises:
        TypeError, ValueError: an argument is not as above.

    Example:
        >>> grad, gate_up = torch.randn(64, 2048), torch.randn(64, 2 * 2048)
        >>> grad_gate_up, y, grad_weights = deepkern.swiglu_cast_backward(grad, gate_up)
        >>> grad_gate_up.shape, y.shape, grad_weights
        (torch.Size([64, 4096]), torch.Size([64, 2048]), None)
    """
    name, (M, I) = "swiglu_cast_backward", grad.shape
    expected, got = f"2I = {2 * I} columns, [gate | up]", f"shape {tuple(gate_up.shape)}"
    check_that(name, "gate_up", gate_up.shape[1] == 2 * I, expected, got)
    valid = (gate_up.dtype == FP8) == (gate_up_scale is not None)
    got = f"{'None' if gate_up_scale is None else 'a scale'} for {gate_up.dtype}"
    check_that(name, "gate_up_scale", valid, "a scale for gate_up in FP8, None otherwise", got)
    check_limit(name, limit)
    # Fake kernel: allocates the outputs; the launcher of a backend computes them.
    return (
        grad.new_empty(gate_up.shape),
        grad.new_empty(grad.shape),
        grad.new_empty(0 if weights is None else M, dtype=torch.float32),
    )


@swiglu_cast_backward.op.register_launcher("triton")
def _launch_backward_triton(
    grad: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor | None,
    weights: Tensor | None,
    limit: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = swiglu_cast_backward.op.allocate(grad, gate_up, gate_up_scale, weights, limit)
    launch_swiglu_cast_backward(grad, gate_up, gate_up_scale, weights, limit, outputs)
    return outputs


def launch_swiglu_cast_backward(
    grad: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor | None,
    weights: Tensor | None,
    limit: float | None,
    outputs: tuple,
    group_index: Tensor | None = None,
) -> None:
    """Writes the outputs (grad_gate_up, y, grad_weights), of which y may be None.

    Rows whose `group_index` (int32 [M]) is negative are not written.
    """
    M, I = grad.shape
    if M == 0:
        return
    native_fp8 = arch.of(grad.device).native_fp8
    scale_strides = (0, 0)
    if gate_up_scale is not None:
        gate_up, scale_strides = as_bits(gate_up, native_fp8), gate_up_scale.stride()
    ROWS = 4  # 8 rows spill registers where rows are not aligned to 16 bytes
    swiglu_cast_backward_kernel[(cdiv(M, ROWS),)](
        grad, gate_up, gate_up_scale, weights, group_index, limit, *outputs, M, I,
        grad.stride(0), gate_up.stride(0), *scale_strides,
        ONE_SCALE=I % BLOCK == 0, NATIVE_FP8=native_fp8, ROWS=ROWS,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def swiglu_cast_backward_kernel(
    grad_ptr,  # real [M, I]
    gate_up_ptr,  # real, or FP8 or its bytes [M, 2I]
    scale_ptr,  # fp32 [M, ceil(2I / 128)], or None: the scales of gate_up
    weights_ptr,  # fp32 [M], or None
    group_index_ptr,  # int32 [M], or None; rows with a negative index are not written
    limit,  # number, or None
    grad_gate_up_ptr,  # [M, 2I] in the dtype of grad, contiguous
    y_ptr,  # [M, I] in the dtype of grad, contiguous, or None
    grad_weights_ptr,  # fp32 [M]; not written without weights
    M,
    I,
    grad_row_stride,  # all strides in elements
    gate_up_row_stride,
    scale_row_stride,
    scale_block_stride,
    ONE_SCALE: tl.constexpr,  # no tile of `up` crosses a block boundary
    NATIVE_FP8: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    row_mask = row < M
    if group_index_ptr is not None:
        row_mask &= tl.load(group_index_ptr + row, mask=row_mask, other=-1) >= 0
    gate_up_ptr += row * gate_up_row_stride  # [ROWS]
    if scale_ptr is not None:
        scale_ptr += row * scale_row_stride
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + row, mask=row_mask, other=0.0)[:, None]
    grad_weight_sums = tl.zeros((ROWS, 128), tl.float32)
    for start in range(0, I, 128):
        column = start + tl.arange(0, 128)
        mask = row_mask[:, None] & (column < I)[None, :]
        grad_ptrs = grad_ptr + row[:, None] * grad_row_stride + column  # [ROWS, 128]
        grad = tl.load(grad_ptrs, mask=mask, other=0.0).to(tl.float32)
        raw_gate = load_dequantized(
            gate_up_ptr, scale_ptr, scale_block_stride, row_mask, start, I, ONE_SCALE, NATIVE_FP8
        )
        raw_up = load_dequantized(
            gate_up_ptr, scale_ptr, scale_block_stride, row_mask, I + start, 2 * I,
            ONE_SCALE, NATIVE_FP8,
        )  # fmt: skip
        gate, up = clamp_gate_up(raw_gate, raw_up, limit)

        s = sigmoid(gate)
        silu = gate * s
        y = silu * up
        if weights_ptr is not None:
            grad_weight_sums += grad * y
            y *= weight
            grad *= weight
        grad_gate = grad * up * (s * (gate * (1.0 - s) + 1.0))
        grad_up = grad * silu
        if limit is not None:
            grad_gate = tl.where(raw_gate > limit, 0.0, grad_gate)
            grad_up = tl.where(tl.abs(raw_up) > limit, 0.0, grad_up)

        out_ptrs = grad_gate_up_ptr + row[:, None] * (2 * I) + column
        tl.store(out_ptrs, grad_gate.to(grad_gate_up_ptr.dtype.element_ty), mask=mask)
        tl.store(out_ptrs + I, grad_up.to(grad_gate_up_ptr.dtype.element_ty), mask=mask)
        if y_ptr is not None:
            tl.store(y_ptr + row[:, None] * I + column, y.to(y_ptr.dtype.element_ty), mask=mask)
    if weights_ptr is not None:
        tl.store(grad_weights_ptr + row, sum_pairwise(grad_weight_sums), mask=row_mask)


@triton.jit
def load_dequantized(
    x_ptr,  # [ROWS] pointers to the first value of each row
    scale_ptr,  # [ROWS] pointers to the first scale of each row, or None
    scale_block_stride,  # elements
    row_mask,  # [ROWS]
    first,  # first column of the tile
    end,  # columns from `end` on are masked
    ONE_SCALE: tl.constexpr,  # the tile does not cross a block boundary
    NATIVE_FP8: tl.constexpr,
):
    """Loads 128 columns as fp32 [ROWS, 128], multiplied by their scales if there are any."""
    column = first + tl.arange(0, 128)
    mask = row_mask[:, None] & (column < end)[None, :]
    x = tl.load(x_ptr[:, None] + column, mask=mask, other=0.0)
    if scale_ptr is None:
        x = x.to(tl.float32)
    elif ONE_SCALE:
        block = tl.cast(first // 128, tl.int64)
        scale = tl.load(scale_ptr + block * scale_block_stride, mask=row_mask, other=0.0)
        x = from_fp8(x, NATIVE_FP8) * scale[:, None]
    else:
        scale_ptrs = scale_ptr[:, None] + (column // 128).to(tl.int64) * scale_block_stride
        x = from_fp8(x, NATIVE_FP8) * tl.load(scale_ptrs, mask=mask, other=0.0)
    return x
