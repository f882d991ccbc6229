"""SwiGLU and the FP8 cast of its result, in one pass over memory.

    y[m, i]  = silu(gate[m, i]) * up[m, i] * weights[m]      [gate | up] = gate_up, silu(g) = g·σ(g)
    q, scale = cast_per_token(y)                             y in fp32: one scale per row and block

With a limit, gate = min(gate, limit) and up = clamp(up, -limit, limit) come first. The products are
taken from left to right, each rounded, and σ is `arithmetic.py`'s, so the bits are the
reference's.

Cut: a program takes ROWS rows of one 128-wide block of y, which are two blocks of gate_up. Each
value is read once and written once: 5 bytes a value of y in bf16, and the speed is that of memory.

The backward pass needs only what the forward pass read, in FP8 if need be, and recomputes the rest.
A program takes ROWS rows and goes along them 128 columns at a time, because the gradient of a
weight is a sum over its row: column by column of the block, then these pairwise.

Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.3: the inputs of SwiGLU are
kept in FP8 and its output is recomputed in the backward pass.
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
        gate_up: bf16, fp16 or fp32 [M, 2I], the gates and then the values they let through; rows
            may be strided.
        weights: fp32 [M], what each row is multiplied by (an expert's routing weight), or None.
        limit: at least 0, or None. Gates above it count as `limit`, values beyond +-limit as that;
            NaN stays NaN.
        scale_format: "fp32", or "ue8m0" to round every scale up to a power of two.
        scale_layout: "row", or "column" for a scale whose strides are (1, M rounded up to a
            multiple of 4), as Hopper's TMA takes it; what lies between its columns is 0.

    Returns:
        q: float8_e4m3fn [M, I].
        scale: fp32 [M, ceil(I / 128)]; `q * scale` gives back silu(gate) * up * weights.

    Nothing is rounded between `gate_up` and `q` but each operation to fp32. Blocks of zeros, inf
    and NaN are as in `cast_per_token`; a gate of -inf gives NaN.

    There is no autograd: torch would cast the gradient of an FP8 output to FP8. Use
    `swiglu_cast_backward`.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    name, (M, columns) = "swiglu_cast", gate_up.shape
    check_that(name, "gate_up", columns % 2 == 0, "an even number of columns, [gate | up]",
               f"shape {tuple(gate_up.shape)}")  # fmt: skip
    check_limit(name, limit)
    check_choice(name, "scale_format", scale_format, ("fp32", "ue8m0"))
    check_choice(name, "scale_layout", scale_layout, LAYOUTS)
    scale = new_scale(gate_up, (M, -(-columns // 2 // BLOCK)), scale_layout)
    return gate_up.new_empty((M, columns // 2), dtype=FP8), scale


def check_limit(name: str, limit: float | None) -> None:
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
    write(gate_up, weights, limit, q, scale, scale_format, scale_layout)
    return q, scale


def write(
    gate_up: Tensor, weights: Tensor | None, limit: float | None, q: Tensor, scale: Tensor,
    scale_format: str = "fp32", scale_layout: str = "row", group_index: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes q and scale, but not the rows that `group_index` (int32 [M]) says are in no group."""
    if q.numel() == 0:
        return
    M, I = q.shape
    padded = with_padding(scale, scale_layout)
    native_fp8 = arch.of(q.device).native_fp8_cast
    ROWS = 16  # of which the padding of the scale, to a multiple of 4, takes no more
    swiglu_cast_kernel[(cdiv(M, ROWS) * cdiv(I, BLOCK),)](
        gate_up, weights, group_index, limit, as_bits(q, native_fp8), padded, M, padded.shape[0], I,
        gate_up.stride(0), *scale.stride(),
        UE8M0=scale_format == "ue8m0", NATIVE_FP8=native_fp8, ROWS=ROWS,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "padded_M"])
def swiglu_cast_kernel(
    gate_up_ptr, weights_ptr, group_index_ptr, limit, q_ptr, scale_ptr, M, padded_M, I,
    gate_up_row, scale_row, scale_column,
    UE8M0: tl.constexpr, NATIVE_FP8: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(I, 128)
    block = tl.program_id(0) % blocks
    row = (tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = block * 128 + tl.arange(0, 128)
    has_row, has_scale = row < M, row < padded_M
    if group_index_ptr is not None:
        has_row &= tl.load(group_index_ptr + row, mask=has_row, other=-1) >= 0
        has_scale &= has_row
    inside = has_row[:, None] & (column < I)[None, :]
    gate_tile = gate_up_ptr + row[:, None] * gate_up_row + column  # [ROWS, 128]
    gate = tl.load(gate_tile, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_tile + I, mask=inside, other=0.0).to(tl.float32)
    gate, up = limited(gate, up, limit)

    y = gate * sigmoid(gate) * up
    if weights_ptr is not None:
        y *= tl.load(weights_ptr + row, mask=has_row, other=0.0)[:, None]
    scale = block_scale(tl.max(magnitude_bits(y), 1), UE8M0)  # [ROWS]
    q = to_fp8(y * tl.div_rn(1.0, scale)[:, None], NATIVE_FP8)

    tl.store(q_ptr + row[:, None] * I + column, q, mask=inside)
    scale_tile = scale_ptr + row * scale_row + block.to(tl.int64) * scale_column
    tl.store(scale_tile, tl.where(has_row, scale, 0.0), mask=has_scale)


@triton.jit
def limited(gate, up, limit):
    if limit is not None:
        gate = tl.where(gate > limit, limit, gate)
        lowest = 0.0 - limit  # 0 for a limit of 0, never -0
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
    """The gradients of SwiGLU, and its result again, from what was kept of its input.

    Args:
        grad: bf16, fp16 or fp32 [M, I], the gradient of y = silu(gate) * up * weights; rows may be
            strided, here and in `gate_up`.
        gate_up: [M, 2I], real as it went into `swiglu_cast`, or float8_e4m3fn as `cast_per_token`
            makes it.
        gate_up_scale: fp32 [M, ceil(2I / 128)], any strides, with an FP8 `gate_up` and only then.
        weights, limit: as in the forward pass.

    Returns:
        grad_gate_up: [M, 2I] in the dtype of `grad`. A value beyond the limit has gradient 0, one
            at the limit or NaN has its own.
        y: [M, I] in the dtype of `grad`, which the gradient of the next layer's weight needs.
        grad_weights: fp32 [M], or None without `weights` (from `torch.ops.deepkern`, an empty
            tensor).

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    name, (M, I) = "swiglu_cast_backward", grad.shape
    check_that(name, "gate_up", gate_up.shape[1] == 2 * I, f"2I = {2 * I} columns, [gate | up]",
               f"shape {tuple(gate_up.shape)}")  # fmt: skip
    check_that(name, "gate_up_scale", (gate_up.dtype == FP8) == (gate_up_scale is not None),
               "a scale for gate_up in FP8, None otherwise",
               f"{'None' if gate_up_scale is None else 'a scale'} for {gate_up.dtype}")  # fmt: skip
    check_limit(name, limit)
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
    write_backward(grad, gate_up, gate_up_scale, weights, limit, outputs)
    return outputs


def write_backward(
    grad: Tensor, gate_up: Tensor, gate_up_scale: Tensor | None, weights: Tensor | None,
    limit: float | None, outputs: tuple, group_index: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes the outputs (y may be None), but not the rows that `group_index` puts in no group."""
    M, I = grad.shape
    if M == 0:
        return
    native_fp8 = arch.of(grad.device).native_fp8
    scale_strides = (0, 0)
    if gate_up_scale is not None:
        gate_up, scale_strides = as_bits(gate_up, native_fp8), gate_up_scale.stride()
    ROWS = 4  # twice as many spill where rows cannot be read 16 bytes at a time
    swiglu_cast_backward_kernel[(cdiv(M, ROWS),)](
        grad, gate_up, gate_up_scale, weights, group_index, limit, *outputs, M, I,
        grad.stride(0), gate_up.stride(0), *scale_strides,
        ONE_SCALE=I % BLOCK == 0, NATIVE_FP8=native_fp8, ROWS=ROWS,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def swiglu_cast_backward_kernel(
    grad_ptr, gate_up_ptr, scale_ptr, weights_ptr, group_index_ptr, limit,
    grad_gate_up_ptr, y_ptr, grad_weights_ptr, M, I, grad_row, gate_up_row, scale_row, scale_column,
    ONE_SCALE: tl.constexpr,  # whether a tile of `up` lies in one block of the scale
    NATIVE_FP8: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    has_row = row < M
    if group_index_ptr is not None:
        has_row &= tl.load(group_index_ptr + row, mask=has_row, other=-1) >= 0
    gate_up_ptr += row * gate_up_row  # [ROWS]
    if scale_ptr is not None:
        scale_ptr += row * scale_row
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + row, mask=has_row, other=0.0)[:, None]
    products = tl.zeros((ROWS, 128), tl.float32)
    for start in range(0, I, 128):
        column = start + tl.arange(0, 128)
        inside = has_row[:, None] & (column < I)[None, :]
        grad_tile = grad_ptr + row[:, None] * grad_row + column  # [ROWS, 128]
        grad = tl.load(grad_tile, mask=inside, other=0.0).to(tl.float32)
        raw_gate = kept(
            gate_up_ptr, scale_ptr, scale_column, has_row, start, I, ONE_SCALE, NATIVE_FP8
        )
        raw_up = kept(
            gate_up_ptr, scale_ptr, scale_column, has_row, I + start, 2 * I, ONE_SCALE, NATIVE_FP8
        )
        gate, up = limited(raw_gate, raw_up, limit)

        s = sigmoid(gate)
        silu = gate * s
        y = silu * up
        if weights_ptr is not None:
            products += grad * y
            y *= weight
            grad *= weight
        grad_gate = grad * up * (s * (gate * (1.0 - s) + 1.0))
        grad_up = grad * silu
        if limit is not None:
            grad_gate = tl.where(raw_gate > limit, 0.0, grad_gate)
            grad_up = tl.where(tl.abs(raw_up) > limit, 0.0, grad_up)

        out = grad_gate_up_ptr + row[:, None] * (2 * I) + column
        tl.store(out, grad_gate.to(grad_gate_up_ptr.dtype.element_ty), mask=inside)
        tl.store(out + I, grad_up.to(grad_gate_up_ptr.dtype.element_ty), mask=inside)
        if y_ptr is not None:
            tl.store(y_ptr + row[:, None] * I + column, y.to(y_ptr.dtype.element_ty), mask=inside)
    if weights_ptr is not None:
        tl.store(grad_weights_ptr + row, sum_pairwise(products), mask=has_row)


@triton.jit
def kept(
    x_ptr, scale_ptr, scale_column, has_row, first, last,
    ONE_SCALE: tl.constexpr, NATIVE_FP8: tl.constexpr,
):  # fmt: skip
    """128 columns from `first` on, before `last`, of the rows at `x_ptr`, times any scales."""
    column = first + tl.arange(0, 128)
    inside = has_row[:, None] & (column < last)[None, :]
    x = tl.load(x_ptr[:, None] + column, mask=inside, other=0.0)  # [ROWS, 128]
    if scale_ptr is None:
        x = x.to(tl.float32)
    elif ONE_SCALE:
        scale = tl.load(
            scale_ptr + tl.cast(first // 128, tl.int64) * scale_column, has_row, other=0.0
        )
        x = from_fp8(x, NATIVE_FP8) * scale[:, None]
    else:
        scale_tile = scale_ptr[:, None] + (column // 128).to(tl.int64) * scale_column
        x = from_fp8(x, NATIVE_FP8) * tl.load(scale_tile, mask=inside, other=0.0)
    return x
