"""Shapes and operands of the FP8 GEMM ops, and what their baselines have in common."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Generator, Tensor

from .. import reference
from ..runtime import tuned
from ..runtime.arch import ARCHS
from ..runtime.tiles import choose_gemm_tile
from .ops import cast_back
from .random_inputs import values

BF16, F32 = torch.bfloat16, torch.float32
GROUPED_MM = "F.grouped_mm in bf16, operands dequantized before"
# N x K of DeepSeek-V3's linear layers for which others have published figures.
V3 = [
    (2112, 7168),
    (576, 7168),
    (24576, 1536),
    (32768, 512),
    (7168, 16384),
    (4096, 7168),
    (7168, 2048),
]
# N x K at which tiles and splits of K differ.
LAYERS = [*V3, (64, 16384), (256, 16384), (576, 128), (16384, 128), (512, 7168), (576, 2048)]
LAYERS += [(1024, 4096), (1536, 7168), (3072, 1536), (4096, 4096)]
EXPERTS = [(4096, 7168), (7168, 2048), (512, 1024), (1408, 128)]
ROWS = (1, 24, 96, 192, 384, 768, 1024, 2048, 4096)
# M rows in each of G groups; G is large where the matrices are small.
EXPERT_SIZES = [{"M": M, "N": N, "K": K, "G": 8} for M in ROWS for N, K in EXPERTS]
EXPERT_SIZES += [
    {"M": M, "N": N, "K": K, "G": G}
    for M in (1, 16, 48, 65, 160, 300)
    for N, K, G in ((64, 512, 256), (576, 64, 256), (64, 128, 1))
]


def v3_expert_sizes(groups_and_rows: tuple[tuple[int, int], ...]) -> list[dict]:
    """V3's two expert layers at each (G, M)."""
    return [{"G": G, "M": M, "N": N, "K": K} for N, K in EXPERTS[:2] for G, M in groups_and_rows]


def grouped_sizes_for_every_tile() -> list[dict]:
    """Sizes that between them choose every tile of the M-grouped ops on any architecture.

    M is the rows of one group. K ends in a partial block, which takes the most registers.
    """
    return [
        {**size, "K": size["K"] + 16, "b_rows": b_rows}
        for b_rows in (128, 1)
        for size in sizes_with_a_new_tile(EXPERT_SIZES, b_rows, "m_grouped")
    ]


def real_sizes_for_every_tile(sizes: list[dict]) -> list[dict]:
    """Those of `sizes` that between them choose every tile of the GEMMs of real dtypes.

    The tile is chosen by the bytes of a row, and by whether rows are aligned. Then the tiles of
    fp32, for few and for many rows, with a whole and with a partial last block of K.
    """
    aligned = sizes_with_a_new_tile(sizes, 128, "real")
    unaligned = sizes_with_a_new_tile(sizes, 128, "real, unaligned")
    tiles = [{**size, "K": size["K"] // 2} for size in aligned]
    tiles += [{**size, "K": size["K"] // 2 + 3} for size in unaligned]
    return tiles + [
        {**size, "K": size["K"] + tail, "dtype": F32}
        for size in (sizes[0], sizes[-1])
        for tail in (0, 3)
    ]


def sizes_with_a_new_tile(sizes: list[dict], b_rows: int, variant: str = "dense") -> list[dict]:
    """Those of `sizes` at which some architecture chooses a tile that no earlier one chose."""
    chosen, tiles_so_far = [], set()
    for size in [*sizes, *_tuned_sizes(b_rows, variant)]:
        shape, groups = (size["M"], size["N"], size["K"]), size.get("G", 1)
        tiles = [
            (n, choose_gemm_tile(arch, *shape, b_rows, groups, variant))
            for n, arch in ARCHS.items()
        ]
        tiles = {(name, replace(tile, num_splits=min(tile.num_splits, 2))) for name, tile in tiles}
        if not tiles <= tiles_so_far:
            tiles_so_far |= tiles
            chosen.append(size)
    return chosen


def _tuned_sizes(b_rows: int, variant: str) -> list[dict]:
    """The shapes with a committed tile, which the cost model may choose at no other shape."""
    lines = [line for name in ARCHS for line in tuned.load(name)]
    lines = [x for x in lines if (x.variant, x.b_rows) == (variant, b_rows)]
    groups = [{} if variant == "dense" else {"G": x.groups} for x in lines]
    return [{"M": x.M, "N": x.N, "K": x.K, **G} for x, G in zip(lines, groups, strict=True)]


def random_groups(generator: Generator, M: int, G: int, skipped: float) -> Tensor:
    """group_index int32 [M], ascending; a row has no group with the probability `skipped`."""
    device = generator.device
    group = torch.randint(max(G, 1), (M,), generator=generator, device=device).sort().values
    none = torch.rand(M, generator=generator, device=device) < skipped
    return torch.where(none, -1, group).int()


def group_weights(
    generator: Generator, G: int, N: int, K: int, b_rows: int
) -> tuple[Tensor, Tensor]:
    """b [G, N, K] and its scales, one per 128 x 128 or, with `b_rows` 1, per 1 x 128."""
    cast = reference.cast_per_block if b_rows == 128 else reference.cast_per_token
    return cast(values(generator, G, N, K))


def rows_per_scale(b: Tensor, b_scale: Tensor) -> int:
    """How many rows of b one scale covers."""
    return 1 if b_scale.shape[-2] == b.shape[-2] else 128


def dequantize(a, a_scale, b, b_scale, dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor]:
    """Both operands in `dtype`."""
    block = (rows_per_scale(b, b_scale), 128)
    return (
        cast_back.baseline(a, a_scale, (1, 128), dtype),
        cast_back.baseline(b, b_scale, block, dtype),
    )


def sorted_rows(group_index: Tensor, G: int) -> tuple[Tensor, Tensor]:
    """The rows that have a group, sorted by group, and the end of each group among them."""
    row = ((group_index >= 0) & (group_index < G)).nonzero()[:, 0]
    row = row[group_index[row].sort(stable=True).indices]
    ends = torch.bincount(group_index[row].long(), minlength=G).cumsum(0)
    return row, ends.int()


def original_rows(rows: Tensor, group_index: Tensor, G: int) -> Tensor:
    """[M, N] with the product's `rows`, which are in the order of `sorted_rows`; others are 0."""
    out = rows.new_zeros(len(group_index), rows.shape[1])
    out[sorted_rows(group_index, G)[0]] = rows
    return out


def aligned_rows(group_index: Tensor, G: int) -> tuple[Tensor, Tensor, Tensor]:
    """The layout of DeepGEMM, in which each group starts at a multiple of 128 rows.

    Returns the rows as `sorted_rows`, the place of each in the layout, and the group of each place,
    -1 for padding.
    """
    row, ends = sorted_rows(group_index, G)
    counts = ends.diff(prepend=ends.new_zeros(1))
    padded = -(-counts // 128) * 128
    group = group_index[row].long()
    at = torch.arange(len(row), device=row.device) - (ends - counts)[group]
    at = at + (padded.cumsum(0) - padded)[group]
    index = group_index.new_full((int(padded.sum()),), -1)
    index[at] = group_index[row]
    return row, at, index
