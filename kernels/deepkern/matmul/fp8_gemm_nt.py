"""FP8 GEMM with block scales: D = A · Bᵀ (+ C).

    d[m, n] = Σ_j a_scale[m, j] · b_scale[n / 128, j] · Σ_{k in block j} a[m, k] · b[n, k] + c[m, n]

Parallelization: one program computes one BLOCK_M x BLOCK_N tile of D. On targets with TMA the
kernel is persistent: one program per resident slot loops over output tiles and prefetches the
operands of the next tile. Tiles are ordered in groups of GROUP_M tile rows, for reuse of B in L2.

Limit: large M is bound by the tensor core. Small M is bandwidth-bound on B. There we swap operands
(B becomes the 64-row operand of the matrix instruction), and use split-K when N gives too few
tiles. The split-K sums are added in a fixed order, and N and K alone decide the number of splits,
so the bits of a row do not depend on M. With few rows one program computes one split and a second
kernel reduces the partial sums. With many rows one program sums its splits in registers.

Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.2; DeepGEMM.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv
from ..quant.fp8 import BLOCK
from ..runtime import arch
from ..runtime.contract import check_choice
from ..runtime.op import op
from ..runtime.tiles import GemmTile, choose_gemm_tile
from .block_scaled_gemm import (
    KRange,
    TileRows,
    check_b_scale,
    compute_tile,
    gemm_operand,
    index_type,
    rows_per_scale,
    swizzle_tile,
)

REAL = (torch.bfloat16, torch.float16, torch.float32)


@op(
    a="fp8 [M, K] strided",
    a_scale="fp32 [M, K/128] strided",
    b="fp8 [N, K] strided",
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
        a: float8_e4m3fn [M, K], any strides. Rows that are contiguous along K, do not overlap and
            start at multiples of 16 bytes are read without a copy. So is a transposed view
            (`x.t()`, for the layouts tn and tt) on GPUs that widen FP8 in registers. Every other
            layout is copied once per call.
        a_scale: fp32 [M, ceil(K / 128)], one per 1x128 of `a`, any strides (row- or column-major).
        b: float8_e4m3fn [N, K], as `a` (`w.t()` for the layouts nn and tn).
        b_scale: fp32 [ceil(N / 128), ceil(K / 128)], one per 128x128 of `b`, or
            [N, ceil(K / 128)], one per 1x128; any strides.
        out_dtype: bfloat16, float16 or float32.
        c: bf16, fp16 or fp32 [M, N], added in fp32 before the only rounding.

    Returns:
        [M, N] of `out_dtype`. M, N and K may be 0.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Example:
        >>> a, a_scale = deepkern.cast_per_token(torch.randn(64, 7168))
        >>> b, b_scale = deepkern.cast_per_block(torch.randn(2048, 7168))
        >>> deepkern.fp8_gemm_nt(a, a_scale, b, b_scale).shape
        torch.Size([64, 2048])
    """
    check_choice("fp8_gemm_nt", "out_dtype", out_dtype, REAL)
    check_b_scale("fp8_gemm_nt", b, b_scale)
    # Fake kernel: allocates the output; the launcher of a backend computes it.
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


@fp8_gemm_nt.op.register_tile
def choose_tile(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *_) -> GemmTile:
    """The tile that the launcher uses for these arguments."""
    (M, K), N = a.shape, b.shape[0]
    return choose_gemm_tile(arch.of(a.device), M, N, K, rows_per_scale(b, b_scale))


@fp8_gemm_nt.op.register_launcher("triton")
def _launch_triton(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: torch.dtype, c: Tensor | None
) -> Tensor:
    out = fp8_gemm_nt.op.allocate(a, a_scale, b, b_scale, out_dtype, c)
    if out.numel() == 0:
        return out
    if a.shape[1] == 0:
        return out.zero_() if c is None else out.copy_(c)
    (M, K), N = a.shape, b.shape[0]
    target, tile = arch.of(a.device), choose_tile(a, a_scale, b, b_scale)
    a_operand, a_desc = gemm_operand(a, a_scale, target, tile.BLOCK_M)
    b_operand, b_desc = gemm_operand(b, b_scale, target, tile.BLOCK_N)
    c_row_stride = 0 if c is None else c.stride(0)
    # With parallel splits each program writes a partial sum, and reduce_split_k adds them and c.
    num_parallel_splits = tile.num_splits if tile.parallel_splits else 1
    result = out
    if tile.parallel_splits:
        result = out.new_empty((num_parallel_splits, M, N), dtype=torch.float32)
    num_tiles = cdiv(M, tile.BLOCK_M) * cdiv(N, tile.BLOCK_N) * num_parallel_splits
    fp8_gemm_nt_kernel[(tile.grid(target, num_tiles) if target.tma else num_tiles,)](
        a_operand, a_desc, b_operand, b_desc, None if tile.parallel_splits else c, result,
        M, N, K, cdiv(cdiv(K, BLOCK), tile.num_splits), num_parallel_splits, c_row_stride,
        PARALLEL_SPLITS=tile.parallel_splits,
        SPLIT=tile.num_splits > 1 and not tile.parallel_splits, SWAPPED=tile.swapped,
        B_ROWS_PER_SCALE=rows_per_scale(b, b_scale),
        TAIL=K % BLOCK != 0 and a_desc is None, NATIVE_FP8=target.native_fp8,
        INDEX=index_type(a_operand, b_operand), BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N,
        GROUP_M=tile.GROUP_M, PERSISTENT=target.tma, **tile.options(target),
    )  # fmt: skip
    if tile.parallel_splits:
        fp8_gemm_nt_reduce_split_k_kernel[(cdiv(M * N, 1024),)](
            result, c, out, num_parallel_splits, M * N, N, c_row_stride
        )
    return out


# M is masked and never specialized: one compiled kernel serves every M.
@triton.jit(do_not_specialize=["M", "blocks_per_split", "num_splits"])
def fp8_gemm_nt_kernel(
    a,  # Operand [M, K]
    a_desc,  # its TMA descriptor, or None
    b,  # Operand [N, K]
    b_desc,
    c_ptr,  # real [M, N], or None
    out_ptr,  # [M, N]; with PARALLEL_SPLITS fp32 [num_splits, M, N]
    M,
    N,
    K,
    blocks_per_split,  # blocks of 128 along K that one split sums
    num_splits,  # splits that programs compute in parallel; else 1
    c_row_stride,  # elements
    PARALLEL_SPLITS: tl.constexpr,  # one program computes one split of one tile
    SPLIT: tl.constexpr,  # one program sums the splits of a tile one after another
    SWAPPED: tl.constexpr,  # b is the left operand of the matrix instruction
    B_ROWS_PER_SCALE: tl.constexpr,  # 1 or 128
    TAIL: tl.constexpr,  # K may end within a block; TMA fills it up with zeros instead
    NATIVE_FP8: tl.constexpr,
    INDEX: tl.constexpr,  # type of offsets within a tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,  # tile rows per L2 group
    PERSISTENT: tl.constexpr,
):
    tile_rows, tile_columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    num_blocks = K // 128 if TAIL else tl.cdiv(K, 128)
    first, stop, step = tl.program_id(0), tl.program_id(0) + 1, 1
    if PERSISTENT:
        stop, step = tile_rows * tile_columns * num_splits, tl.num_programs(0)
    for t in tl.range(first, stop, step, flatten=PERSISTENT):
        row_block, column_block = swizzle_tile(t // num_splits, tile_rows, tile_columns, GROUP_M)
        first_row, first_column = row_block * BLOCK_M, column_block * BLOCK_N
        a_rows = TileRows(first_row, M - first_row, 0, 0)
        b_rows = TileRows(first_column, N - first_column, 0, 0)
        split, first_block, blocks, length = 0, 0, num_blocks, K
        if PARALLEL_SPLITS:
            split = t % num_splits
            first_block = split * blocks_per_split
            blocks = tl.maximum(tl.minimum(num_blocks - first_block, blocks_per_split), 0)
            length = tl.minimum(K - first_block * 128, blocks_per_split * 128)
        k_range = KRange(first_block * 128, first_block, blocks, length, K, blocks_per_split)
        acc = compute_tile(
            a, a_desc, a_rows, b, b_desc, b_rows, k_range, BLOCK_M, BLOCK_N, B_ROWS_PER_SCALE,
            SWAPPED, TAIL, SPLIT, NATIVE_FP8, INDEX,
        )  # fmt: skip
        # Epilogue: add c and store.
        row = tl.cast(first_row, tl.int64) + tl.arange(0, BLOCK_M)
        column = tl.cast(first_column, tl.int64) + tl.arange(0, BLOCK_N)
        mask = (row < M)[:, None] & (column < N)[None, :]
        if c_ptr is not None:
            c_ptrs = c_ptr + row[:, None] * c_row_stride + column[None, :]
            acc += tl.load(c_ptrs, mask=mask, other=0.0).to(tl.float32)
        out_row = tl.cast(split, tl.int64) * M + row
        out_ptrs = out_ptr + out_row[:, None] * N + column[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_splits", "numel"])
def fp8_gemm_nt_reduce_split_k_kernel(
    partial_ptr,  # fp32 [num_splits, M, N]
    c_ptr,  # real [M, N], or None
    out_ptr,  # [M, N]
    num_splits,
    numel,  # M · N
    N,
    c_row_stride,  # elements
):
    """out = Σ_s partial[s] + c, in the order in which one program adds its own splits."""
    i = tl.cast(tl.program_id(0), tl.int64) * 1024 + tl.arange(0, 1024)
    mask = i < numel
    acc = tl.zeros((1024,), tl.float32)
    for s in range(num_splits):
        acc += tl.load(partial_ptr + tl.cast(s, tl.int64) * numel + i, mask=mask, other=0.0)
    if c_ptr is not None:
        c = tl.load(c_ptr + i // N * c_row_stride + i % N, mask=mask, other=0.0)
        acc += c.to(tl.float32)
    tl.store(out_ptr + i, acc.to(out_ptr.dtype.element_ty), mask=mask)
