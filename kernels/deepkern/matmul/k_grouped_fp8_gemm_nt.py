"""FP8 products over groups of columns: what the gradients of grouped weights are.

    d[g] = a[:, group g] · b[:, group g]ᵀ  with block scales (+ c[g])

K is cut into groups whose lengths only the device knows, and each group into blocks of 128 from its
first column on: `cast_per_channel(..., group_offsets, transpose=True)` makes both operands so.

Cut: as `fp8_gemm_nt` with many rows, G times over. A program finds each tile's group in the offsets
by itself. The rest of a group, less than a block, is masked on both sides, so that nothing of the
next group gets in. A group that starts at a multiple of 16 is read through TMA or in blocks with
the next ones in flight; another in pieces of 32 columns, one after the other, which is slow: align
groups where speed counts. The tensor core limits the speed, and with short groups the writing of d.

Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.5.1; DeepGEMM's k-grouped form,
here with groups of any length.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quant.groups import check_offsets, group_spans
from ..runtime import arch
from ..runtime.contract import check_that
from ..runtime.integers import cdiv, next_power_of_2
from ..runtime.op import op
from ..runtime.tiles import GemmTile, gemm_tile
from .products import index_type, operand, products, tile_in_bands


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
    """Multiplies group by group of columns: `a[:, g] @ b[:, g].T`, plus `c[g]` if given.

    Args:
        a: float8_e4m3fn [M, K], K being the columns of all groups; as for `fp8_gemm_nt`.
        a_scale: fp32 [M, S], one per 1x128 of `a`, any strides; the blocks restart at each group,
            so group g's scales begin at column sum_{i<g} ceil(K_i / 128). What S has more is
            ignored; blocks that find no scale there count as zeros.
        b, b_scale: float8_e4m3fn [N, K], fp32 [N, S], as `a`.
        group_offsets: int32 [G + 1] on the device: group g is columns group_offsets[g] to
            group_offsets[g + 1]. They count as clamped to [0, K], then raised to the largest one
            before. Groups may be empty and need no alignment.
        c: fp32 [G, M, N], added in fp32.

    Returns:
        fp32 [G, M, N]; `c`, or zeros, for an empty group.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    name, offsets = "k_grouped_fp8_gemm_nt", group_offsets.shape[0]
    check_that(name, "group_offsets", offsets > 0, "at least 1 offset", "none")
    G = offsets - 1
    if c is not None:
        check_that(name, "c", c.shape[0] == G, f"{G} matrices", f"shape {tuple(c.shape)}")
    return a.new_empty((G, a.shape[0], b.shape[0]), dtype=torch.float32)


@k_grouped_fp8_gemm_nt.op.register_debug_check
def check_contents(a, a_scale, b, b_scale, group_offsets, c) -> None:
    """For DEEPKERN_DEBUG=1: offsets ascend within K."""
    check_offsets("k_grouped_fp8_gemm_nt", group_offsets, a.shape[1])


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
    target, t = arch.of(a.device), choose_tile(*args)
    x, y = operand(a, a_scale, target, t.BLOCK_M), operand(b, b_scale, target, t.BLOCK_N)
    tiles = G * cdiv(M, t.BLOCK_M) * cdiv(N, t.BLOCK_N)
    k_grouped_fp8_gemm_nt_kernel[(t.grid(target, tiles) if target.tma else tiles,)](
        x, y, None if c is None else c.contiguous(), out, group_offsets.contiguous(), M, N, K,
        a_scale.shape[1], G, GROUPS=max(8, next_power_of_2(G)),
        SWAPPED=t.swapped, NATIVE_FP8=target.native_fp8, INDEX=index_type(x, y),
        BLOCK_M=t.BLOCK_M, BLOCK_N=t.BLOCK_N, GROUP_M=t.GROUP_M,
        PERSISTENT=target.tma, **t.options(target),
    )  # fmt: skip
    return out


@k_grouped_fp8_gemm_nt.op.register_tile
def choose_tile(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, group_offsets: Tensor, c: Tensor | None
) -> GemmTile:
    """The tile that a launch with these arguments takes, as if all groups were as long."""
    G = max(group_offsets.shape[0] - 1, 1)
    (M, K), N = a.shape, b.shape[0]
    return gemm_tile(arch.of(a.device), M, N, cdiv(K, G), 1, groups=G, form="k_grouped")


@triton.jit(do_not_specialize=["K", "scale_blocks", "G"])
def k_grouped_fp8_gemm_nt_kernel(
    a, b, c_ptr, out_ptr, offsets_ptr, M, N, K, scale_blocks, G,
    GROUPS: tl.constexpr, SWAPPED: tl.constexpr, NATIVE_FP8: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr,
    PERSISTENT: tl.constexpr,
):  # fmt: skip
    first, last = group_spans(offsets_ptr, G, K, GROUPS)
    blocks_of = (last - first + 127) // 128  # [GROUPS]
    before = tl.cumsum(blocks_of, 0) - blocks_of
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first_tile, stop, step = tl.program_id(0), tl.program_id(0) + 1, 1
    if PERSISTENT:
        stop, step = rows * columns * G, tl.num_programs(0)
    for t in tl.range(first_tile, stop, step, flatten=PERSISTENT):
        group = t // (rows * columns)
        row_block, column_block = tile_in_bands(t % (rows * columns), rows, columns, GROUP_M)
        mine = tl.arange(0, GROUPS) == group
        k_first = tl.sum(tl.where(mine, first, 0), 0)
        block_first = tl.sum(tl.where(mine, before, 0), 0)
        length = tl.sum(tl.where(mine, last - first, 0), 0)
        length = tl.minimum(length, tl.maximum(scale_blocks - block_first, 0) * 128)
        blocks = tl.where(k_first % 16 == 0, length // 128, 0)
        part = (k_first, block_first, blocks, length, K, 0)
        first_row, first_column = row_block * BLOCK_M, column_block * BLOCK_N
        a_tile = (first_row, M - first_row, 0, 0)
        b_tile = (first_column, N - first_column, 0, 0)
        sum = products(a, a_tile, b, b_tile, part, BLOCK_M, BLOCK_N, 1, SWAPPED,
                       a.tiles is not None, True, False, NATIVE_FP8, INDEX)  # fmt: skip
        row = tl.cast(first_row, tl.int64) + tl.arange(0, BLOCK_M)
        column = tl.cast(first_column, tl.int64) + tl.arange(0, BLOCK_N)
        inside = (row < M)[:, None] & (column < N)[None, :]
        at = (tl.cast(group, tl.int64) * M + row)[:, None] * N + column[None, :]
        if c_ptr is not None:
            sum += tl.load(c_ptr + at, mask=inside, other=0.0)
        tl.store(out_ptr + at, sum, mask=inside)
