"""Grouped FP8 GEMM over groups of columns: the weight gradients of grouped linear layers.

    d[g] = a[:, group g] · b[:, group g]ᵀ  with block scales (+ c[g])

K is divided into groups whose lengths are on the device, and each group into blocks of 128 that
restart at its first column. `cast_per_channel(..., group_offsets, transpose=True)` produces both
operands in this layout.

Parallelization: as in `fp8_gemm_nt` with many rows, once per group. A program finds the group of
its tile from the offsets. The last, partial block of a group is masked on both sides, so no value
of the next group enters the sum. A group that starts at a multiple of 16 columns is read through
TMA, or with pipelined loads. Any other group is read in pieces of 32 columns without a pipeline,
which is slow: align groups to 16 where speed matters.

Limit: the tensor core; for short groups, the writes of d.

Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.5.1; DeepGEMM's k-grouped layout,
here with groups of any length.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv, next_power_of_2
from ..quant.groups import check_offsets, group_spans
from ..runtime import arch
from ..runtime.contract import check_that
from ..runtime.op import op
from ..runtime.tiles import GemmTile, choose_gemm_tile
from .block_scaled_gemm import (
    KRange,
    TileRows,
    compute_tile,
    gemm_operand,
    index_type,
    swizzle_tile,
)


@op(
    a="fp8 [M, K] strided",
    a_scale="fp32 [M, S] strided",
    b="fp8 [N, K] strided",
    b_scale="fp32 [N, S] strided",
    group_offsets="int32 [_]",
    c="fp32 [_, M, N]",
)
def k_grouped_fp8_gemm_nt(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    group_offsets: Tensor,
    c: Tensor | None = None,
) -> Tensor:
    """Multiplies the columns of each group: `a[:, g] @ b[:, g].T`, plus `c[g]` if given.

    Args:
        a: float8_e4m3fn [M, K], the columns of all groups; layout as for `fp8_gemm_nt`.
        a_scale: fp32 [M, S], one per 1x128 of `a`, any strides. The blocks restart at each group:
            the scales of group g start at column sum_{i<g} ceil(K_i / 128). Further columns are
            ignored; blocks without a scale count as zeros.
        b, b_scale: float8_e4m3fn [N, K], fp32 [N, S], as `a`.
        group_offsets: int32 [G + 1] on the device: group g is columns group_offsets[g] to
            group_offsets[g + 1]. Offsets are clamped to [0, K] and to the largest offset before
            them. Groups may be empty and need no alignment.
        c: fp32 [G, M, N], added in fp32.

    Returns:
        fp32 [G, M, N]; `c`, or zeros, for an empty group.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Example:
        >>> x, dy = torch.randn(384, 256), torch.randn(384, 512)
        >>> offsets = torch.tensor([0, 128, 384], dtype=torch.int32)
        >>> a, a_scale = deepkern.cast_per_channel(dy, group_offsets=offsets, transpose=True)
        >>> b, b_scale = deepkern.cast_per_channel(x, group_offsets=offsets, transpose=True)
        >>> deepkern.k_grouped_fp8_gemm_nt(a, a_scale, b, b_scale, offsets).shape
        torch.Size([2, 512, 256])
    """
    name, offsets = "k_grouped_fp8_gemm_nt", group_offsets.shape[0]
    check_that(name, "group_offsets", offsets > 0, "at least 1 offset", "none")
    G = offsets - 1
    if c is not None:
        check_that(name, "c", c.shape[0] == G, f"{G} matrices", f"shape {tuple(c.shape)}")
    # Fake kernel: allocates the output; the launcher of a backend computes it.
    return a.new_empty((G, a.shape[0], b.shape[0]), dtype=torch.float32)


@k_grouped_fp8_gemm_nt.op.register_debug_check
def check_contents(a, a_scale, b, b_scale, group_offsets, c) -> None:
    """For DEEPKERN_DEBUG=1: group_offsets ascend and are in [0, K]."""
    check_offsets("k_grouped_fp8_gemm_nt", group_offsets, a.shape[1])


@k_grouped_fp8_gemm_nt.op.register_tile
def choose_tile(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, group_offsets: Tensor, c: Tensor | None
) -> GemmTile:
    """The tile that the launcher uses for these arguments: that of groups of equal length."""
    G = max(group_offsets.shape[0] - 1, 1)
    (M, K), N = a.shape, b.shape[0]
    return choose_gemm_tile(arch.of(a.device), M, N, cdiv(K, G), 1, groups=G, variant="k_grouped")


@k_grouped_fp8_gemm_nt.op.register_launcher("triton")
def _launch_triton(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, group_offsets: Tensor, c: Tensor | None
) -> Tensor:
    args = (a, a_scale, b, b_scale, group_offsets, c)
    out = k_grouped_fp8_gemm_nt.op.allocate(*args)
    if out.numel() == 0:
        return out
    if a.shape[1] == 0:
        return out.zero_() if c is None else out.copy_(c)
    (G, M, N), K = out.shape, a.shape[1]
    target, tile = arch.of(a.device), choose_tile(*args)
    a_operand, a_desc = gemm_operand(a, a_scale, target, tile.BLOCK_M)
    b_operand, b_desc = gemm_operand(b, b_scale, target, tile.BLOCK_N)
    num_tiles = G * cdiv(M, tile.BLOCK_M) * cdiv(N, tile.BLOCK_N)
    k_grouped_fp8_gemm_nt_kernel[(tile.grid(target, num_tiles) if target.tma else num_tiles,)](
        a_operand, a_desc, b_operand, b_desc, None if c is None else c.contiguous(), out,
        group_offsets.contiguous(), M, N, K, a_scale.shape[1], G,
        GROUPS=max(8, next_power_of_2(G)), SWAPPED=tile.swapped, NATIVE_FP8=target.native_fp8,
        INDEX=index_type(a_operand, b_operand), BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N,
        GROUP_M=tile.GROUP_M, PERSISTENT=target.tma, **tile.options(target),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["K", "scale_blocks", "G"])
def k_grouped_fp8_gemm_nt_kernel(
    a,  # Operand [M, K]
    a_desc,  # its TMA descriptor, or None
    b,  # Operand [N, K]
    b_desc,
    c_ptr,  # fp32 [G, M, N], or None
    out_ptr,  # fp32 [G, M, N]
    offsets_ptr,  # int32 [G + 1]
    M,
    N,
    K,
    scale_blocks,  # columns of a's and b's scales
    G,
    GROUPS: tl.constexpr,  # power of two, at least G
    SWAPPED: tl.constexpr,  # b is the left operand of the matrix instruction
    NATIVE_FP8: tl.constexpr,
    INDEX: tl.constexpr,  # type of offsets within a tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,  # tile rows per L2 group
    PERSISTENT: tl.constexpr,
):
    first, end = group_spans(offsets_ptr, G, K, GROUPS)
    blocks = (end - first + 127) // 128  # [GROUPS]
    first_blocks = tl.cumsum(blocks, 0) - blocks
    tile_rows, tile_columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first_tile, stop, step = tl.program_id(0), tl.program_id(0) + 1, 1
    if PERSISTENT:
        stop, step = tile_rows * tile_columns * G, tl.num_programs(0)
    for t in tl.range(first_tile, stop, step, flatten=PERSISTENT):
        group = t // (tile_rows * tile_columns)
        row_block, column_block = swizzle_tile(
            t % (tile_rows * tile_columns), tile_rows, tile_columns, GROUP_M
        )
        is_group = tl.arange(0, GROUPS) == group
        start = tl.sum(tl.where(is_group, first, 0), 0)
        first_block = tl.sum(tl.where(is_group, first_blocks, 0), 0)
        length = tl.sum(tl.where(is_group, end - first, 0), 0)
        length = tl.minimum(length, tl.maximum(scale_blocks - first_block, 0) * 128)
        num_blocks = tl.where(start % 16 == 0, length // 128, 0)
        k_range = KRange(start, first_block, num_blocks, length, K, 0)
        first_row, first_column = row_block * BLOCK_M, column_block * BLOCK_N
        a_rows = TileRows(first_row, M - first_row, 0, 0)
        b_rows = TileRows(first_column, N - first_column, 0, 0)
        acc = compute_tile(
            a, a_desc, a_rows, b, b_desc, b_rows, k_range, BLOCK_M, BLOCK_N, 1,
            SWAPPED, True, False, NATIVE_FP8, INDEX,
        )  # fmt: skip
        # Epilogue: add c and store.
        row = tl.cast(first_row, tl.int64) + tl.arange(0, BLOCK_M)
        column = tl.cast(first_column, tl.int64) + tl.arange(0, BLOCK_N)
        mask = (row < M)[:, None] & (column < N)[None, :]
        offset = (tl.cast(group, tl.int64) * M + row)[:, None] * N + column[None, :]
        if c_ptr is not None:
            acc += tl.load(c_ptr + offset, mask=mask, other=0.0)
        tl.store(out_ptr + offset, acc, mask=mask)
