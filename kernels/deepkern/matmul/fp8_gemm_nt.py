"""FP8 matrix product with block scales, D = A·Bᵀ (+ C).

    d[m, n] = Σ_j a_scale[m, j] · b_scale[n or n // 128, j] · Σ_{k in block j} a[m, k] · b[n, k]

The inner sums, over 128 values of K, are the tensor core's; each is scaled and added to a float32
accumulator by one fused multiply-add ("promotion": Hopper's tensor core keeps some 14 bits of an
FP8 sum, so a sum over all of K must not stay in it).

Cut: a program computes one BLOCK_M x BLOCK_N tile of D, and steps through K by 128 with the next
tiles of A and B in flight. Programs go through D in bands of GROUP_M row blocks, so that those
which run together share their rows of A and B in the L2 cache. `runtime/tiles.py` chooses the tile:
few rows are bound by reading B, many by the tensor core.

A row's bits do not depend on M: every tile of an architecture uses one family of tensor-core
instruction and the same order along K (docs/matmul.md).

Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.2; DeepGEMM.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quant.fp8 import BLOCK, as_bits, matrix_operand
from ..runtime import arch
from ..runtime.contract import check_choice, check_that
from ..runtime.op import op
from ..runtime.tiles import GemmTile, gemm_tile

REAL = (torch.bfloat16, torch.float16, torch.float32)


@op(
    a="fp8 [M, K]",
    a_scale="fp32 [M, K/128] strided",
    b="fp8 [N, K]",
    b_scale="fp32 [_, K/128] strided",
    c="real [M, N]",
)
def fp8_gemm_nt(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
    c: Tensor | None = None,
) -> Tensor:
    """Multiplies FP8 matrices with block scales: `a @ b.T`, plus `c` if given.

    Args:
        a: float8_e4m3fn [M, K]; rows may be strided, the last dimension is contiguous.
        a_scale: fp32 [M, ceil(K / 128)], one per 1x128 of `a`, any strides (row- or column-major).
        b: float8_e4m3fn [N, K], as `a`.
        b_scale: fp32 [ceil(N / 128), ceil(K / 128)], one per 128x128 of `b`, or
            [N, ceil(K / 128)], one per 1x128; any strides.
        out_dtype: bfloat16, float16 or float32.
        c: bf16, fp16 or fp32 [M, N], added in fp32 before the one rounding.

    Returns:
        [M, N] of `out_dtype`. Any M, N and K, 0 included.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    check_choice("fp8_gemm_nt", "out_dtype", out_dtype, REAL)
    N, per_block = b.shape[0], -(-b.shape[0] // BLOCK)
    expected = f"[N/128, K/128] or [N, K/128], so {per_block} or {N} rows"
    got = f"shape {tuple(b_scale.shape)}"
    check_that("fp8_gemm_nt", "b_scale", b_scale.shape[0] in (per_block, N), expected, got)
    return a.new_empty((a.shape[0], N), dtype=out_dtype)


@fp8_gemm_nt.backend("triton")
def launch(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: torch.dtype, c: Tensor | None
) -> Tensor:
    out = fp8_gemm_nt.allocate(a, a_scale, b, b_scale, out_dtype, c)
    if out.numel() == 0:
        return out
    (M, K), N = a.shape, b.shape[0]
    target = arch.of(a.device)
    t = tile(a, a_scale, b, b_scale)
    a, b = aligned(a), aligned(b)
    # Within a tile, offsets are 32-bit unless rows lie far apart.
    far = max(x.stride(0) for x in (a, a_scale, b, b_scale)) >= 2**24
    kernel[(triton.cdiv(M, t.BLOCK_M) * triton.cdiv(N, t.BLOCK_N),)](
        as_bits(a, target.native_fp8), a_scale, as_bits(b, target.native_fp8), b_scale, c, out,
        M, N, K, a.stride(0), *a_scale.stride(), b.stride(0), *b_scale.stride(),
        0 if c is None else c.stride(0), INDEX=tl.int64 if far else tl.int32,
        ONE_B_SCALE=b_scale.shape[0] != N, WHOLE_K=K % BLOCK == 0, NATIVE_FP8=target.native_fp8,
        BLOCK_M=t.BLOCK_M, BLOCK_N=t.BLOCK_N, GROUP_M=t.GROUP_M, **t.options(target),
    )  # fmt: skip
    return out


def tile(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *_) -> GemmTile:
    """The tile that a launch with these arguments takes."""
    (M, K), N = a.shape, b.shape[0]
    return gemm_tile(arch.of(a.device), M, N, K, b_rows=1 if b_scale.shape[0] == N else BLOCK)


fp8_gemm_nt.tile = tile


def aligned(x: Tensor) -> Tensor:
    """`x`, or a copy of it, with every row at a multiple of 16 bytes, as wide loads need it."""
    if x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0:
        return x
    rows, columns = x.shape
    return x.new_empty((rows, -(-columns // 16) * 16))[:, :columns].copy_(x)


# M is masked, never specialised for: one compiled kernel serves every M.
@triton.jit(do_not_specialize=["M"])
def kernel(
    a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, c_ptr, out_ptr, M, N, K,
    a_row, a_scale_row, a_scale_block, b_row, b_scale_row, b_scale_block, c_row,
    INDEX: tl.constexpr, ONE_B_SCALE: tl.constexpr, WHOLE_K: tl.constexpr, NATIVE_FP8: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    row_block, column_block = tile_in_bands(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    first_row = (row_block * BLOCK_M).to(tl.int64)
    first_column = (column_block * BLOCK_N).to(tl.int64)
    m, n, k = tl.arange(0, BLOCK_M).to(INDEX), tl.arange(0, BLOCK_N).to(INDEX), tl.arange(0, 128)
    a_tile = a_ptr + first_row * a_row + (m[:, None] * a_row + k[None, :])  # [BLOCK_M, 128]
    b_tile = b_ptr + first_column * b_row + (n[None, :] * b_row + k[:, None])  # [128, BLOCK_N]
    a_scale_tile = a_scale_ptr + first_row * a_scale_row + m * a_scale_row  # [BLOCK_M]
    if ONE_B_SCALE:
        b_scale_tile = b_scale_ptr + first_column // 128 * b_scale_row
    else:
        b_scale_tile = b_scale_ptr + first_column * b_scale_row + n * b_scale_row  # [BLOCK_N]

    rows_inside, columns_inside = m < M - row_block * BLOCK_M, n < N - column_block * BLOCK_N
    sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for j in range(0, tl.cdiv(K, 128)):
        a_inside = rows_inside[:, None]
        b_inside = columns_inside[None, :]
        if not WHOLE_K:
            a_inside &= (k < K - j * 128)[None, :]
            b_inside &= (k < K - j * 128)[:, None]
        a = tl.load(a_tile + j * 128, mask=a_inside, other=0.0)
        b = tl.load(b_tile + j * 128, mask=b_inside, other=0.0)
        # Not `a_scale_tile += a_scale_block`, which Triton 3.6 fails to compile for gfx942.
        a_scale_at = a_scale_tile + tl.cast(j, tl.int64) * a_scale_block
        b_scale_at = b_scale_tile + tl.cast(j, tl.int64) * b_scale_block
        a_scale = tl.load(a_scale_at, mask=rows_inside, other=0.0)
        if ONE_B_SCALE:
            b_scale = tl.load(b_scale_at)
        else:
            b_scale = tl.load(b_scale_at, mask=columns_inside, other=0.0)[None, :]
        block_sum = tl.dot(matrix_operand(a, NATIVE_FP8), matrix_operand(b, NATIVE_FP8))
        sum = tl.fma(block_sum, a_scale[:, None] * b_scale, sum)

    row, column = first_row + m, first_column + n
    inside = (row < M)[:, None] & (column < N)[None, :]
    if c_ptr is not None:
        c = tl.load(c_ptr + row[:, None] * c_row + column[None, :], mask=inside, other=0.0)
        sum += c.to(tl.float32)
    out_tile = out_ptr + row[:, None] * N + column[None, :]
    tl.store(out_tile, sum.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def tile_in_bands(rows, columns, GROUP_M: tl.constexpr):
    """This program's row block and column block: down a band of GROUP_M row blocks, then right."""
    band = tl.program_id(0) // (GROUP_M * columns)
    first = band * GROUP_M
    height = min(rows - first, GROUP_M)
    within = tl.program_id(0) % (GROUP_M * columns)
    return first + within % height, within // height
