"""RMSNorm and the FP8 cast of its result, with the residual added before, in one pass over memory.

    h        = x + residual                                          rounded to the dtype of x
    normed   = h / sqrt(mean(h^2) + eps) * weight                    in fp32, rounded once
    q, scale = cast_per_token(normed)                                one scale per row and block

Cut: a program takes whole rows, so that a row of up to 16384 stays in registers between the sum of
its squares and the cast; a longer one (or one of over 8192 that cannot be read 16 bytes at a time,
which takes more registers) is read twice, 8192 columns at a time. Per value in bf16, 2 bytes are
read and 3 written, and 2 more each with a residual: the speed is that of memory.

The result is the reference's bit for bit: of every 8192 columns squares are added pairwise,
neighbours first, then these sums in their order, and no multiplication is fused with an addition.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization (arXiv 1910.07467).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv, inverse_rms, next_power_of_2, sum_pairwise
from ..runtime import arch
from ..runtime.contract import FP8, check_choice
from ..runtime.op import op
from .fp8 import (
    BLOCK,
    LAYOUTS,
    as_bits,
    block_scale,
    magnitude_bits,
    new_scale,
    to_fp8,
    with_padding,
)

CHUNK = 8192  # columns whose squares are added pairwise; two chunks are so, too, if in one tile


@op(optional_output=("residual",), x="real [M, K]", weight="real [K]", residual="real [M, K]")
def rmsnorm_cast(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    scale_format: str = "fp32",
    scale_layout: str = "row",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Normalises rows by their root mean square and casts them to FP8, one scale per 128 columns.

    Args:
        x: bf16, fp16 or fp32 [M, K]; rows may be strided, here and in `residual`.
        weight: real [K].
        eps: what is added to the mean of squares.
        residual: [M, K] in the dtype of `x`, added to it before the norm, or None.
        scale_format: "fp32", or "ue8m0" to round every scale up to a power of two.
        scale_layout: "row", or "column" for a scale whose strides are (1, M rounded up to a
            multiple of 4), as Hopper's TMA takes it; what lies between its columns is 0.

    Returns:
        q: float8_e4m3fn [M, K].
        scale: fp32 [M, ceil(K / 128)]; q and scale are `cast_per_token(normed)`.
        normed: [M, K] in the dtype of `x`.
        new_residual: x + residual in their dtype, which is what is normalised, or None without
            `residual` (from `torch.ops.deepkern`, an empty tensor).

    NaN makes its row NaN. inf, or a mean of squares beyond fp32, makes the finite values of its
    row 0 and infinite ones NaN, as in torch's rms_norm.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    name, (M, K) = "rmsnorm_cast", x.shape
    if residual is not None and residual.dtype != x.dtype:
        raise TypeError(f"{name}: residual: expected {x.dtype} as x, got {residual.dtype}")
    check_choice(name, "scale_format", scale_format, ("fp32", "ue8m0"))
    check_choice(name, "scale_layout", scale_layout, LAYOUTS)
    return (
        x.new_empty((M, K), dtype=FP8),
        new_scale(x, (M, -(-K // BLOCK)), scale_layout),
        x.new_empty((M, K)),
        x.new_empty(0 if residual is None else (M, K)),
    )


@rmsnorm_cast.op.register_launcher("triton")
def _launch_triton(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None,
    scale_format: str,
    scale_layout: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = rmsnorm_cast.op.allocate(x, weight, eps, residual, scale_format, scale_layout)
    q, scale, normed, new_residual = outputs
    if q.numel() == 0:
        return outputs
    M, K = x.shape
    padded = with_padding(scale, scale_layout)
    native_fp8 = arch.of(x.device).native_fp8_cast
    all_wide = is_wide(x) and is_wide(residual) and is_wide(q)
    in_registers = K <= CHUNK or (K <= 2 * CHUNK and all_wide)
    TILE = max(next_power_of_2(K), BLOCK) if in_registers else CHUNK
    ROWS = max(512 // TILE, 1)
    rmsnorm_cast_kernel[(cdiv(padded.shape[0], ROWS),)](
        x, residual, weight, as_bits(q, native_fp8), padded, normed, new_residual,
        M, padded.shape[0], K, eps,
        x.stride(0), 0 if residual is None else residual.stride(0), *scale.stride(),
        UE8M0=scale_format == "ue8m0", NATIVE_FP8=native_fp8, IN_REGISTERS=in_registers,
        ROWS=ROWS, TILE=TILE, num_warps=min(16, max(4, TILE // 512)), enable_fp_fusion=False,
    )  # fmt: skip
    return outputs


def is_wide(x: Tensor | None) -> bool:
    """Whether the rows of `x`, if it is given, are read and written 16 bytes at a time."""
    return x is None or (x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0)


@triton.jit(do_not_specialize=["M", "padded_M"])
def rmsnorm_cast_kernel(
    x_ptr, residual_ptr, weight_ptr, q_ptr, scale_ptr, normed_ptr, new_residual_ptr,
    M, padded_M, K, eps, x_row, residual_row, scale_row, scale_column,
    UE8M0: tl.constexpr, NATIVE_FP8: tl.constexpr,
    IN_REGISTERS: tl.constexpr,  # whether a tile holds the whole row
    ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    x_ptr += row * x_row
    if residual_ptr is not None:
        residual_ptr += row * residual_row
    if IN_REGISTERS:
        h = hidden(x_ptr, residual_ptr, row < M, 0, K, TILE)
        squares = sum_pairwise(h * h)  # [ROWS]
    else:
        squares = tl.zeros((ROWS,), tl.float32)
        for start in range(0, K, TILE):
            h = hidden(x_ptr, residual_ptr, row < M, start, K, TILE)
            squares += sum_pairwise(h * h)
    inverse = inverse_rms(squares, K, eps)[:, None]

    for start in range(0, 1 if IN_REGISTERS else K, TILE):
        if not IN_REGISTERS:
            h = hidden(x_ptr, residual_ptr, row < M, start, K, TILE)
        column = (start + tl.arange(0, TILE))[None, :]
        inside = (row < M) & (column < K)
        if residual_ptr is not None:
            tl.store(new_residual_ptr + row * K + column, h.to(x_ptr.dtype.element_ty), mask=inside)
        weight = tl.load(weight_ptr + column, mask=column < K, other=0.0).to(tl.float32)
        normed = (h * inverse * weight).to(x_ptr.dtype.element_ty)  # [ROWS, TILE]
        tl.store(normed_ptr + row * K + column, normed, mask=inside)

        blocked = tl.reshape(normed.to(tl.float32), (ROWS, TILE // 128, 128))
        scale = block_scale(tl.max(magnitude_bits(blocked), 2), UE8M0)  # [ROWS, TILE / 128]
        q = to_fp8(blocked * tl.div_rn(1.0, scale)[:, :, None], NATIVE_FP8)
        tl.store(q_ptr + row * K + column, tl.reshape(q, (ROWS, TILE)), mask=inside)
        block = (start // 128 + tl.arange(0, TILE // 128))[None, :]
        scale_tile = scale_ptr + row * scale_row + block.to(tl.int64) * scale_column
        inside = (row < padded_M) & (block < tl.cdiv(K, 128))
        tl.store(scale_tile, tl.where(row < M, scale, 0.0), mask=inside)


@triton.jit
def hidden(x_ptr, residual_ptr, has_row, start, K, TILE: tl.constexpr):
    """What is normalised, as fp32 [ROWS, TILE]: columns from `start` on of the rows at `x_ptr`."""
    column = (start + tl.arange(0, TILE))[None, :]
    inside = has_row & (column < K)
    h = tl.load(x_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        h += tl.load(residual_ptr + column, mask=inside, other=0.0).to(tl.float32)
        h = h.to(x_ptr.dtype.element_ty).to(tl.float32)
    return h
