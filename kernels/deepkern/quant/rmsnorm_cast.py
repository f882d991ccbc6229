"""RMSNorm with an optional residual, and the FP8 cast of its result, in one kernel.

    h        = x + residual                                          rounded to the dtype of x
    normed   = h / sqrt(mean(h^2) + eps) * weight                    in fp32, rounded once
    q, scale = cast_per_token(normed)                                one scale per row and block

Parallelization: one program computes whole rows. A row of up to 16384 values stays in registers
from the sum of squares to the cast. A longer row is read twice, 8192 columns at a time. So is a row
of more than 8192 values without 16-byte alignment, because scalar loads need more registers.

The sum of squares has a fixed order: pairwise within 8192 columns, starting with neighbours, then
over these sums from left to right. No multiplication is fused with an addition. So the result
equals the reference bit for bit.

Limit: memory bandwidth; per bf16 value 2 bytes read and 3 written, and 2 more of each with a
residual.

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

# Columns whose squares are added pairwise. Two chunks in one tile give the same sum.
CHUNK = 8192


@op(optional_output=("residual",), x="real [M, K]", weight="real [K]", residual="real [M, K]")
def rmsnorm_cast(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    scale_format: str = "fp32",
    scale_layout: str = "row",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Normalizes rows by their root mean square and casts them to FP8, one scale per 128 columns.

    Args:
        x: bf16, fp16 or fp32 [M, K]; rows may be strided, here and in `residual`.
        weight: real [K].
        eps: added to the mean of squares. Default 1e-6.
        residual: [M, K] in the dtype of `x`, added to it before the norm, or None (the default).
        scale_format: "fp32" (the default), or "ue8m0" to round every scale up to a power of two.
        scale_layout: "row" (the default), or "column" for a scale with strides (1, pitch), which a
            Hopper GEMM loads by TMA. `pitch` is M rounded up to a multiple of 4; the padding holds
            zeros.

    Returns:
        q: float8_e4m3fn [M, K].
        scale: fp32 [M, ceil(K / 128)]; q and scale are `cast_per_token(normed)`.
        normed: [M, K] in the dtype of `x`.
        new_residual: x + residual in their dtype, the input of the norm, or None without `residual`
            (an empty tensor from `torch.ops.deepkern`).

    NaN makes its row NaN. inf, or a mean of squares that overflows fp32, makes the finite values of
    its row 0 and the infinite ones NaN, as in torch's rms_norm.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Example:
        >>> x, weight = torch.randn(64, 7168), torch.ones(7168)
        >>> q, scale, normed, new_residual = deepkern.rmsnorm_cast(x, weight, residual=x)
        >>> q.shape, scale.shape
        (torch.Size([64, 7168]), torch.Size([64, 56]))
    """
    name, (M, K) = "rmsnorm_cast", x.shape
    if residual is not None and residual.dtype != x.dtype:
        raise TypeError(f"{name}: residual: expected {x.dtype} as x, got {residual.dtype}")
    check_choice(name, "scale_format", scale_format, ("fp32", "ue8m0"))
    check_choice(name, "scale_layout", scale_layout, LAYOUTS)
    # Fake kernel: allocates the outputs; the launcher of a backend computes them.
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
    aligned = has_aligned_rows(x) and has_aligned_rows(residual) and has_aligned_rows(q)
    in_registers = K <= CHUNK or (K <= 2 * CHUNK and aligned)
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


def has_aligned_rows(x: Tensor | None) -> bool:
    """Whether 16-byte accesses read and write the rows of `x`; true for None."""
    return x is None or (x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0)


@triton.jit(do_not_specialize=["M", "padded_M"])
def rmsnorm_cast_kernel(
    x_ptr,  # real [M, K]
    residual_ptr,  # [M, K] in the dtype of x, or None
    weight_ptr,  # real [K]
    q_ptr,  # FP8 or its bytes [M, K], contiguous
    scale_ptr,  # fp32 [padded_M, ceil(K / 128)]
    normed_ptr,  # [M, K] in the dtype of x, contiguous
    new_residual_ptr,  # [M, K] in the dtype of x, contiguous; not written without a residual
    M,
    padded_M,  # rows of the scale with its padding; the kernel writes zeros from row M on
    K,
    eps,
    x_row_stride,  # all strides in elements
    residual_row_stride,
    scale_row_stride,
    scale_block_stride,
    UE8M0: tl.constexpr,  # round scales up to powers of two
    NATIVE_FP8: tl.constexpr,
    IN_REGISTERS: tl.constexpr,  # a tile holds the whole row
    ROWS: tl.constexpr,
    TILE: tl.constexpr,  # columns per tile, a power of two of at least 128
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    row_mask = row < M
    x_ptr += row * x_row_stride
    if residual_ptr is not None:
        residual_ptr += row * residual_row_stride
    if IN_REGISTERS:
        h = load_and_add_residual(x_ptr, residual_ptr, row_mask, 0, K, TILE)
        squares = sum_pairwise(h * h)  # [ROWS]
    else:
        squares = tl.zeros((ROWS,), tl.float32)
        for start in range(0, K, TILE):
            h = load_and_add_residual(x_ptr, residual_ptr, row_mask, start, K, TILE)
            squares += sum_pairwise(h * h)
    inverse = inverse_rms(squares, K, eps)[:, None]

    for start in range(0, 1 if IN_REGISTERS else K, TILE):
        if not IN_REGISTERS:
            h = load_and_add_residual(x_ptr, residual_ptr, row_mask, start, K, TILE)
        column = (start + tl.arange(0, TILE))[None, :]
        mask = row_mask & (column < K)
        if residual_ptr is not None:
            tl.store(new_residual_ptr + row * K + column, h.to(x_ptr.dtype.element_ty), mask=mask)
        weight = tl.load(weight_ptr + column, mask=column < K, other=0.0).to(tl.float32)
        normed = (h * inverse * weight).to(x_ptr.dtype.element_ty)  # [ROWS, TILE]
        tl.store(normed_ptr + row * K + column, normed, mask=mask)

        blocks = tl.reshape(normed.to(tl.float32), (ROWS, TILE // 128, 128))
        scale = block_scale(tl.max(magnitude_bits(blocks), 2), UE8M0)  # [ROWS, TILE / 128]
        q = to_fp8(blocks * tl.div_rn(1.0, scale)[:, :, None], NATIVE_FP8)
        tl.store(q_ptr + row * K + column, tl.reshape(q, (ROWS, TILE)), mask=mask)
        block = (start // 128 + tl.arange(0, TILE // 128))[None, :]
        scale_ptrs = scale_ptr + row * scale_row_stride + block.to(tl.int64) * scale_block_stride
        scale_mask = (row < padded_M) & (block < tl.cdiv(K, 128))
        tl.store(scale_ptrs, tl.where(row_mask, scale, 0.0), mask=scale_mask)


@triton.jit
def load_and_add_residual(
    x_ptr,  # [ROWS, 1] pointers to the first value of each row
    residual_ptr,  # [ROWS, 1], or None
    row_mask,  # [ROWS, 1]
    start,  # first column of the tile
    K,
    TILE: tl.constexpr,
):
    """h of a tile as fp32 [ROWS, TILE]: x + residual, rounded to the dtype of x; 0 past K."""
    column = (start + tl.arange(0, TILE))[None, :]
    mask = row_mask & (column < K)
    h = tl.load(x_ptr + column, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        h += tl.load(residual_ptr + column, mask=mask, other=0.0).to(tl.float32)
        h = h.to(x_ptr.dtype.element_ty).to(tl.float32)
    return h
