"""Shared by the GEMMs of bf16, fp16 and fp32: tile choice and the mainloop of one tile.

    tile[r, c] = Σ_k x[r, k] · y[c, k]  in fp32

Parallelization: one call computes one [BLOCK_M, BLOCK_N] tile in one program.

Batch invariance. All tiles of one target and dtype add the same values of K in the same order with
one family of matrix instruction, so the choice of the tile, which depends on M, changes no bit. The
tiles are those of the FP8 GEMMs (`tiles.py`), whose step of 128 bytes of K is 64 values of 16 bits.
There is no split-K. fp32 operands are multiplied in three TF32 products with mma.sync, which all
tiles of less than 64 rows use.

Limit: the tensor core for large tiles, L2 bandwidth for small ones.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime import arch
from ..runtime.tiles import GemmTile, choose_gemm_tile


def choose_real_tile(a: Tensor, b: Tensor, rows: int, groups: int = 1) -> GemmTile:
    """The tile of `groups` products of `rows` rows of a [M, K] with b [..., N, K]."""
    target, (N, K) = arch.of(a.device), b.shape[-2:]
    if a.dtype == torch.float32:
        tile = GemmTile(16, 32, 4, 2) if rows <= 16 else GemmTile(32, 64, 4, 2)
    else:
        aligned = K % block_k(a) == 0 and is_aligned(a) and is_aligned(b)
        variant = "real" if aligned else "real, unaligned"
        rows, groups = max(rows, 1), max(groups, 1)
        tile = choose_gemm_tile(target, rows, N, a.element_size() * K, 128, groups, variant)
    # One stage on sm_100, as in mla_prefill.py: a product could read bytes before their copy.
    return replace(tile, num_stages=1) if target.name == "sm_100" else tile


def block_k(x: Tensor) -> int:
    """Values of K per step: 128 bytes."""
    return 128 // x.element_size()


def is_aligned(x: Tensor) -> bool:
    """Whether kernels can load 16 bytes of `x` at a time, along K or along its rows."""
    matrix = [stride for stride in x.stride() if stride != 1]
    return 1 in x.stride()[-2:] and all(s * x.element_size() % 16 == 0 for s in matrix)


def index_type(*tensors: Tensor) -> tl.dtype:
    """Integer type of offsets within a tile: int64 if a stride is 2^24 elements or more."""
    return tl.int64 if max(max(x.stride()) for x in tensors) >= 2**24 else tl.int32


@triton.jit
def multiply_real_tile(
    a_row_ptrs,  # [BLOCK_M, 1] pointers to the first value of each row
    a_mask,  # [BLOCK_M, 1]
    a_k_stride,  # elements
    b_row_ptrs,  # [BLOCK_N, 1]
    b_mask,  # [BLOCK_N, 1]
    b_k_stride,
    K,
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K
    SWAPPED: tl.constexpr,  # b is the left operand of the matrix instruction
    PRECISION: tl.constexpr,  # of fp32 products
    INDEX: tl.constexpr,  # type of offsets within a tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The float32 tile [BLOCK_M, BLOCK_N] of a·bᵀ; with SWAPPED computed as (b·aᵀ)ᵀ."""
    k = tl.arange(0, BLOCK_K)[None, :]
    a_ptrs, b_ptrs = a_row_ptrs + k.to(INDEX) * a_k_stride, b_row_ptrs + k.to(INDEX) * b_k_stride
    a_step = tl.cast(BLOCK_K, INDEX) * a_k_stride
    b_step = tl.cast(BLOCK_K, INDEX) * b_k_stride
    if SWAPPED:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_ptrs, mask=a_mask, other=0.0)
            b = tl.load(b_ptrs, mask=b_mask, other=0.0)
        else:
            a = tl.load(a_ptrs, mask=a_mask & (k < K - start), other=0.0)
            b = tl.load(b_ptrs, mask=b_mask & (k < K - start), other=0.0)
        if SWAPPED:
            acc = tl.dot(b, a.T, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
        a_ptrs += a_step
        b_ptrs += b_step
    if SWAPPED:
        return acc.T
    else:
        return acc
