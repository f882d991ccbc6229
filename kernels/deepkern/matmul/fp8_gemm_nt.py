"""FP8 matrix product with block scales, D = A·Bᵀ (+ C).

    d[m, n] = Σ_j a_scale[m, j] · b_scale[n or n // 128, j] · Σ_{k in block j} a[m, k] · b[n, k]

Cut: D is cut into tiles of BLOCK_M x BLOCK_N, and `products.py` says how one is computed. Where the
target has TMA as many programs run as fit on it, and each goes from tile to tile with the next
one's operands already in flight; elsewhere a program computes one tile. Tiles follow each other in
bands of GROUP_M row blocks, so that those which run together share rows of A and B in the L2 cache.

Few rows are bound by reading B. Then the tensor core takes B as its left operand where that needs
64 rows or more (SWAPPED), and where N alone makes too few tiles, the sum over K is cut into
`splits` runs of blocks, spread over as many programs. The cut depends on N and K only, and many
rows are summed by the same runs, one after the other (SPLIT): a row's bits do not depend on M. For
the same reason every tile of an architecture uses one family of tensor-core instruction
(docs/matmul.md). `runtime/tiles.py` chooses.

Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.2; DeepGEMM.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quant.fp8 import BLOCK
from ..runtime import arch
from ..runtime.contract import check_choice
from ..runtime.integers import cdiv
from ..runtime.op import op
from ..runtime.tiles import GemmTile, gemm_tile
from .products import (
    check_b_scale,
    index_type,
    operand,
    products,
    rows_of_a_scale,
    tile_in_bands,
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
        a: float8_e4m3fn [M, K], any strides. Rows of K that start at multiples of 16 bytes are
            read as they lie; a transposed view (`x.t()`, for the layouts tn and tt) too where the
            GPU widens FP8 in registers, and is transposed once elsewhere.
        a_scale: fp32 [M, ceil(K / 128)], one per 1x128 of `a`, any strides (row- or column-major).
        b: float8_e4m3fn [N, K], as `a` (`w.t()` for the layouts nn and tn).
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
    check_b_scale("fp8_gemm_nt", b, b_scale)
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


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
    target, t = arch.of(a.device), choose_tile(a, a_scale, b, b_scale)
    x, y = operand(a, a_scale, target, t.BLOCK_M), operand(b, b_scale, target, t.BLOCK_N)
    blocks = cdiv(K, BLOCK)
    # With K spread over programs each writes its share of the sum, and `add_shares` adds them.
    at_once = t.splits if t.spread else 1
    shares = out.new_empty((at_once, M, N), dtype=torch.float32) if t.spread else out
    programs = cdiv(M, t.BLOCK_M) * cdiv(N, t.BLOCK_N) * at_once
    fp8_gemm_nt_kernel[(t.grid(target, programs) if target.tma else programs,)](
        x, y, None if t.spread else c, shares, M, N, K, cdiv(blocks, t.splits), at_once,
        0 if c is None else c.stride(0), SPREAD=t.spread, SPLIT=t.splits > 1 and not t.spread,
        SWAPPED=t.swapped, B_BLOCK=rows_of_a_scale(b, b_scale),
        TAIL=K % BLOCK != 0 and x.tiles is None, NATIVE_FP8=target.native_fp8,
        INDEX=index_type(x, y), BLOCK_M=t.BLOCK_M, BLOCK_N=t.BLOCK_N, GROUP_M=t.GROUP_M,
        PERSISTENT=target.tma, **t.options(target),
    )  # fmt: skip
    if t.spread:
        add_shares[(cdiv(M * N, 1024),)](
            shares, c, out, t.splits, M * N, N, 0 if c is None else c.stride(0)
        )
    return out


@fp8_gemm_nt.op.register_tile
def choose_tile(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *_) -> GemmTile:
    """The tile that a launch with these arguments takes."""
    (M, K), N = a.shape, b.shape[0]
    return gemm_tile(arch.of(a.device), M, N, K, rows_of_a_scale(b, b_scale))


# M is masked, never specialised for: one compiled kernel serves every M.
@triton.jit(do_not_specialize=["M", "split", "shares"])
def fp8_gemm_nt_kernel(
    a, b, c_ptr, out_ptr, M, N, K, split, shares, c_row,
    SPREAD: tl.constexpr, SPLIT: tl.constexpr, SWAPPED: tl.constexpr, B_BLOCK: tl.constexpr,
    TAIL: tl.constexpr, NATIVE_FP8: tl.constexpr, INDEX: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    # A whole number of blocks, and what is left for masked loads; TMA fills a block up with zeros.
    whole = K // 128 if TAIL else tl.cdiv(K, 128)
    first, stop, step = tl.program_id(0), tl.program_id(0) + 1, 1
    if PERSISTENT:
        stop, step = rows * columns * shares, tl.num_programs(0)
    for t in tl.range(first, stop, step, flatten=PERSISTENT):
        row_block, column_block = tile_in_bands(t // shares, rows, columns, GROUP_M)
        first_row, first_column = row_block * BLOCK_M, column_block * BLOCK_N
        a_tile = (first_row, M - first_row, 0, 0)
        b_tile = (first_column, N - first_column, 0, 0)
        share, first_block, blocks, length = 0, 0, whole, K
        if SPREAD:
            share = t % shares
            first_block = share * split
            blocks = tl.maximum(tl.minimum(whole - first_block, split), 0)
            length = tl.minimum(K - first_block * 128, split * 128)
        part = (first_block * 128, first_block, blocks, length, K, split)
        sum = products(a, a_tile, b, b_tile, part, BLOCK_M, BLOCK_N, B_BLOCK, SWAPPED,
                       a.tiles is not None, TAIL, SPLIT, NATIVE_FP8, INDEX)  # fmt: skip
        row = tl.cast(first_row, tl.int64) + tl.arange(0, BLOCK_M)
        column = tl.cast(first_column, tl.int64) + tl.arange(0, BLOCK_N)
        inside = (row < M)[:, None] & (column < N)[None, :]
        if c_ptr is not None:
            c = tl.load(c_ptr + row[:, None] * c_row + column[None, :], mask=inside, other=0.0)
            sum += c.to(tl.float32)
        out_tile = out_ptr + (tl.cast(share, tl.int64) * M + row)[:, None] * N + column[None, :]
        tl.store(out_tile, sum.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["shares", "numel"])
def add_shares(shares_ptr, c_ptr, out_ptr, shares, numel, N, c_row):
    """out = Σ_s shares[s] + c, in the order that a program adds its own splits in."""
    i = tl.cast(tl.program_id(0), tl.int64) * 1024 + tl.arange(0, 1024)
    inside = i < numel
    sum = tl.zeros((1024,), tl.float32)
    for s in range(shares):
        sum += tl.load(shares_ptr + tl.cast(s, tl.int64) * numel + i, mask=inside, other=0.0)
    if c_ptr is not None:
        c = tl.load(c_ptr + i // N * c_row + i % N, mask=inside, other=0.0)
        sum += c.to(tl.float32)
    tl.store(out_ptr + i, sum.to(out_ptr.dtype.element_ty), mask=inside)
