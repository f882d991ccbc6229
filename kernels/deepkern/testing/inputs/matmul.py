"""Inputs of the matmul ops."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Generator

from ... import reference
from ...reference.quant import to_e4m3
from ...runtime import tuned
from ...runtime.arch import ARCHS
from ...runtime.tiles import choose_gemm_tile
from . import Sizes
from .quant import BF16, values

F32 = torch.float32


def fp8_gemm_nt(
    generator: Generator,
    M: int,
    N: int,
    K: int,
    out_dtype: torch.dtype = BF16,
    c: torch.dtype | None = None,
    b_rows: int = 128,
) -> tuple:
    """`b_rows`: how many rows of b one scale covers, 128 or 1; `c`: the dtype of c, if given."""
    a, a_scale = reference.cast_per_token(values(generator, M, K))
    cast = reference.cast_per_block if b_rows == 128 else reference.cast_per_token
    b, b_scale = cast(values(generator, N, K))
    addend = None if c is None else values(generator, M, N, dtype=c)
    return a, a_scale, b, b_scale, out_dtype, addend


def m_grouped_fp8_gemm_nt_contiguous(
    generator: Generator,
    M: int,
    N: int,
    K: int,
    G: int,
    out_dtype: torch.dtype = BF16,
    b_rows: int = 128,
    skipped: float = 0.1,
) -> tuple:
    """Groups of random size; a row is in none with the probability `skipped`."""
    a, a_scale = reference.cast_per_token(values(generator, M, K))
    device = generator.device
    group = torch.randint(max(G, 1), (M,), generator=generator, device=device).sort().values
    none = torch.rand(M, generator=generator, device=device) < skipped
    group_index = torch.where(none, -1, group).int()
    return a, a_scale, *_weights(generator, G, N, K, b_rows), group_index, out_dtype


def m_grouped_fp8_gemm_nt_masked(
    generator: Generator,
    M: int,
    N: int,
    K: int,
    G: int,
    out_dtype: torch.dtype = BF16,
    b_rows: int = 128,
    expected_m: int | None = None,
) -> tuple:
    """Up to M rows in use in each group, or as many that `expected_m` is their average."""
    a, a_scale = reference.cast_per_token(values(generator, G, M, K))
    most = M if expected_m is None else min(M, 2 * expected_m)
    used = torch.randint(most + 1, (G,), generator=generator, device=generator.device)
    weights = _weights(generator, G, N, K, b_rows)
    return a, a_scale, *weights, used.int(), out_dtype, expected_m


def k_grouped_fp8_gemm_nt(
    generator: Generator, M: int, N: int, K: int, G: int, c: bool = False, equal: bool = False
) -> tuple:
    """Groups of random length, or `equal` ones, which together have the K columns."""
    offsets = torch.randint(K + 1, (max(G - 1, 0),), generator=generator, device=generator.device)
    if equal:
        offsets = torch.arange(1, G, device=generator.device) * (K // G)
    offsets = torch.cat([offsets.new_zeros(1), offsets.sort().values, offsets.new_full((1,), K)])
    operands = []
    for rows in (M, N):
        q = to_e4m3(values(generator, rows, K, dtype=F32) * 16)
        scale = torch.rand(rows, -(-K // 128) + G, generator=generator, device=generator.device)
        operands += [q, scale + 2**-10]
    addend = values(generator, G, M, N, dtype=F32) if c else None
    return *operands, offsets[: G + 1].int(), addend


def _weights(generator: Generator, G: int, N: int, K: int, b_rows: int) -> tuple:
    cast = reference.cast_per_block if b_rows == 128 else reference.cast_per_token
    return cast(values(generator, G, N, K))


# The N x K of DeepSeek-V3's linear layers that published figures are for.
V3 = [
    (2112, 7168),
    (576, 7168),
    (24576, 1536),
    (32768, 512),
    (7168, 16384),
    (4096, 7168),
    (7168, 2048),
]
# Widths at which tiles and splits of K differ.
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


def _one_of_each_tile() -> list[dict]:
    """Shapes that between them take every tile that a launch may choose, on any architecture.

    Each as it is common, and as it takes the most registers: part of a block of K, c in fp32.
    """
    worst = {"c": F32, "out_dtype": F32}
    sizes = [{"M": M, "N": N, "K": K} for M in ROWS for N, K in LAYERS]
    few = _with_a_new_tile(sizes, 128) + [
        {**size, "K": size["K"] + 16, **worst, "b_rows": b_rows}
        for b_rows in (128, 1)
        for size in _with_a_new_tile(sizes, b_rows)
    ]
    return few


def _one_of_each_tile_of_groups() -> list[dict]:
    """The same for groups, M being the rows of one."""
    return [
        {**size, "K": size["K"] + 16, "b_rows": b_rows}
        for b_rows in (128, 1)
        for size in _with_a_new_tile(EXPERT_SIZES, b_rows, "m_grouped")
    ]


def _with_a_new_tile(sizes: list[dict], b_rows: int, form: str = "dense") -> list[dict]:
    """Those of `sizes` at which some architecture takes a tile that it took at none before."""
    few, seen = [], set()
    for size in [*sizes, *_tuned_sizes(b_rows, form)]:
        shape, groups = (size["M"], size["N"], size["K"]), size.get("G", 1)
        tiles = [
            (n, choose_gemm_tile(arch, *shape, b_rows, groups, form)) for n, arch in ARCHS.items()
        ]
        forms = {(name, replace(tile, num_splits=min(tile.num_splits, 2))) for name, tile in tiles}
        if not forms <= seen:
            seen |= forms
            few.append(size)
    return few


def _tuned_sizes(b_rows: int, form: str) -> list[dict]:
    """The shapes that have a committed tile, which the model might choose at no other."""
    lines = [line for name in ARCHS for line in tuned.load(name)]
    alike = [x for x in lines if (x.form, x.b_rows) == (form, b_rows)]
    groups = [{} if form == "dense" else {"G": x.groups} for x in alike]
    return [{"M": x.M, "N": x.N, "K": x.K, **G} for x, G in zip(alike, groups, strict=True)]


def _experts(forms: tuple[tuple[int, int], ...]) -> list[dict]:
    """(G, M) of V3's two expert layers."""
    return [{"G": G, "M": M, "N": N, "K": K} for N, K in EXPERTS[:2] for G, M in forms]


SIZES = {
    "fp8_gemm_nt": Sizes(
        small=[
            {"M": 65, "N": 130, "K": 300, "c": F32},
            {"M": 1, "N": 256, "K": 256, "b_rows": 1, "out_dtype": torch.float16},
            {"M": 7, "N": 129, "K": 127, "c": BF16, "out_dtype": F32},
            {"M": 130, "N": 40, "K": 128, "b_rows": 1, "c": torch.float16},
            {"M": 0, "N": 128, "K": 128},
            {"M": 3, "N": 0, "K": 128},
            {"M": 3, "N": 5, "K": 0},
            {"M": 3, "N": 5, "K": 0, "c": F32},
        ],
        cpu=[{"M": M, "N": N, "K": K} for N, K in ((7168, 2048), (4096, 7168)) for M in (1, 4, 64)],
        gpu=[{"M": M, "N": N, "K": K} for N, K in V3 for M in (1, 16, 64, 128, 4096)],
        inspect=_one_of_each_tile(),
    ),
    "m_grouped_fp8_gemm_nt_contiguous": Sizes(
        small=[
            {"M": 150, "N": 130, "K": 200, "G": 3},
            {"M": 9, "N": 40, "K": 128, "G": 20, "b_rows": 1, "out_dtype": F32},
            {"M": 0, "N": 40, "K": 128, "G": 2},
            {"M": 5, "N": 0, "K": 128, "G": 2},
            {"M": 5, "N": 8, "K": 0, "G": 2},
            {"M": 5, "N": 8, "K": 128, "G": 0},
        ],
        cpu=[{"M": 256, "N": 512, "K": 1024, "G": 8}],
        gpu=[
            {**size, "M": size["G"] * size["M"], "skipped": 0}
            for size in _experts(((4, 8192), (8, 4096), (32, 256)))
        ],
        inspect=[{**size, "M": size["G"] * size["M"]} for size in _one_of_each_tile_of_groups()],
    ),
    "m_grouped_fp8_gemm_nt_masked": Sizes(
        small=[
            {"G": 3, "M": 70, "N": 130, "K": 200},
            {"G": 9, "M": 5, "N": 40, "K": 128, "b_rows": 1, "out_dtype": F32, "expected_m": 2},
            {"G": 0, "M": 5, "N": 40, "K": 128},
            {"G": 2, "M": 0, "N": 40, "K": 128},
            {"G": 2, "M": 5, "N": 0, "K": 128},
            {"G": 2, "M": 5, "N": 8, "K": 0},
        ],
        cpu=[{"G": 8, "M": 32, "N": 512, "K": 1024}],
        gpu=[
            {**size, "M": 2 * size["M"], "expected_m": size["M"]}
            for size in _experts(((1, 1024), (2, 512), (4, 256), (32, 64)))
        ],
        inspect=_one_of_each_tile_of_groups(),
    ),
    "k_grouped_fp8_gemm_nt": Sizes(
        small=[
            {"M": 70, "N": 130, "K": 500, "G": 3, "c": True},
            {"M": 9, "N": 40, "K": 129, "G": 5},
            {"M": 4, "N": 5, "K": 0, "G": 2, "c": True},
            {"M": 4, "N": 5, "K": 10, "G": 0},
            {"M": 0, "N": 5, "K": 10, "G": 1},
            {"M": 4, "N": 0, "K": 10, "G": 1},
        ],
        cpu=[{"M": 512, "N": 256, "K": 1024, "G": 4}],
        gpu=[
            {"M": M, "N": N, "K": 32768, "G": G, "equal": equal}
            for M, N in ((4096, 7168), (7168, 2048))
            for G, equal in ((4, True), (8, True), (4, False))
        ],
        inspect=[
            {**size, "K": size["G"] * size["K"], "c": True}
            for size in _with_a_new_tile(EXPERT_SIZES, 1, "k_grouped")
        ],
    ),
}
