"""Every tile that a launch can choose is executed, with full and partial tiles and a full pipeline.

A GEMM here has two rows and two columns of tiles, of which the second ones are partial, and more
blocks of K than the pipeline has stages. On targets with bulk copies one program computes all four
tiles, because the target has one SM. The choices of attention tiles depend on the shape and cannot
be overridden: a list of shapes covers them.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch

import deepkern
from deepkern.runtime import arch, tiles
from deepkern.runtime.arch import ARCHS
from deepkern.testing import compare, ops

pytestmark = pytest.mark.proof

F32, F16, UINT8 = torch.float32, torch.float16, torch.uint8
MAIN = ("sm_80", "sm_90", "sm_120")
ALL = (*MAIN, "sm_89", "sm_100")
PRODUCTS = [(t, b_rows) for t in ALL for b_rows in ((128, 1) if t in MAIN else (128,))]


def gemm_tiles(target: str, b_rows: int, variant: str) -> list[tiles.GemmTile]:
    """The candidates, without splits of K."""
    wide, deep = 1 << 16, 128  # with many columns and one block of K nothing is split
    return tiles.candidate_tiles(ARCHS[target], wide, deep, b_rows, variant)


def split_tiles(target: str, b_rows: int) -> list[tiles.GemmTile]:
    """The candidates with splits of K, two of them."""
    narrow = tiles.candidate_tiles(ARCHS[target], 64, 4096, b_rows)
    assert all(t.num_splits > 1 for t in narrow)
    return [replace(t, num_splits=2) for t in narrow]


def cases(which, variant: str | None = None, products=PRODUCTS) -> list:
    rest = () if variant is None else (variant,)
    return [
        pytest.param(target, b_rows, tile, id=f"{target}-{b_rows}-{name_of(tile)}")
        for target, b_rows in products
        for tile in which(target, b_rows, *rest)
    ]


def name_of(tile: tiles.GemmTile) -> str:
    name = f"{tile.BLOCK_M}x{tile.BLOCK_N}"
    if tile.swapped:
        name += "-swapped"
    if tile.num_splits > 1:
        name += "-parallel" if tile.parallel_splits else "-splits"
    return name


@contextlib.contextmanager
def forced(target: str, tile: tiles.GemmTile, seed: int, order: str = "random"):
    """Launches inside the block use this tile and are for a GPU of the target with one SM."""
    one_sm = replace(ARCHS[target], num_sms=1)
    with (
        deepkern.backend("triton"),
        deepkern.compiled(target, seed=seed, order=order),
        arch.compile_for(one_sm),
        tiles.override_tile_choice(lambda *_: tile),
    ):
        yield


def check_tile(name: str, target: str, tile: tiles.GemmTile, args: tuple, seed: int) -> None:
    with forced(target, tile, seed):
        got = getattr(torch.ops.deepkern, name)(*args)
    compare.assert_matches(name, got, getattr(deepkern.reference, name)(*args), target)


def depth(tile: tiles.GemmTile) -> int:
    """K: one block more than there are stages, and a partial one."""
    return 128 * max(tile.num_stages + 1, 3) + 16


@pytest.mark.parametrize(("target", "b_rows", "tile"), cases(gemm_tiles, "dense"))
def test_gemm(target, b_rows, tile, generator, seed):
    M, N, K = tile.BLOCK_M + 5, tile.BLOCK_N + 9, depth(tile)
    args = ops.inputs("fp8_gemm_nt", generator, M=M, N=N, K=K, b_rows=b_rows, out_dtype=F32)
    check_tile("fp8_gemm_nt", target, tile, args, seed)


@pytest.mark.parametrize(("target", "b_rows", "tile"), cases(split_tiles))
def test_gemm_with_splits_of_k(target, b_rows, tile, generator, seed):
    M, N, K = tile.BLOCK_M + 5, tile.BLOCK_N + 9, 128 * 7 + 16
    args = ops.inputs("fp8_gemm_nt", generator, M=M, N=N, K=K, b_rows=b_rows, c=F32)
    check_tile("fp8_gemm_nt", target, tile, args, seed)


@pytest.mark.parametrize(("target", "b_rows", "tile"), cases(gemm_tiles, "m_grouped"))
def test_grouped_gemm_over_contiguous_rows(target, b_rows, tile, generator, seed):
    name = "m_grouped_fp8_gemm_nt_contiguous"
    size = {"M": tile.BLOCK_M + 25, "N": tile.BLOCK_N + 9, "K": depth(tile), "G": 2}
    args = ops.inputs(name, generator, **size, b_rows=b_rows, out_dtype=F32)
    check_tile(name, target, tile, args, seed)


MAIN_PRODUCTS = [p for p in PRODUCTS if p[0] in MAIN]


@pytest.mark.parametrize(
    ("target", "b_rows", "tile"), cases(gemm_tiles, "m_grouped", MAIN_PRODUCTS)
)
def test_grouped_gemm_over_masked_rows(target, b_rows, tile, generator, seed):
    name = "m_grouped_fp8_gemm_nt_masked"
    size = {"M": tile.BLOCK_M + 5, "N": tile.BLOCK_N + 9, "K": depth(tile), "G": 2}
    args = list(ops.inputs(name, generator, **size, b_rows=b_rows))
    args[4] = torch.tensor([tile.BLOCK_M + 3, 2], dtype=torch.int32)
    check_tile(name, target, tile, tuple(args), seed)


@pytest.mark.parametrize(
    ("target", "b_rows", "tile"), cases(gemm_tiles, "k_grouped", [(t, 1) for t in ALL])
)
def test_grouped_gemm_over_columns(target, b_rows, tile, generator, seed):
    name = "k_grouped_fp8_gemm_nt"
    size = {"M": tile.BLOCK_M + 5, "N": tile.BLOCK_N + 9, "K": 2 * depth(tile), "G": 2}
    args = ops.inputs(name, generator, **size, c=True, equal=True)
    check_tile(name, target, tile, args, seed)


FP8 = {"cache_dtype": UINT8}
# More than two blocks of keys for every tile, and a partial one.
ATTENTION = {
    "decode": ("mla_decode", {"lengths": (200,), "H": 16}),
    "decode, 32 rows": ("mla_decode", {"lengths": (200,), "H": 32}),
    "decode, 64 rows": ("mla_decode", {"lengths": (200,), "H": 70}),
    "decode, FP8": ("mla_decode", {"lengths": (200,), "H": 16, **FP8}),
    "sparse decode": ("mla_sparse_decode", {"topk": 200, "tokens": 300, "H": 16}),
    "sparse decode, 64 rows": ("mla_sparse_decode", {"topk": 200, "tokens": 300, "H": 70}),
    "sparse decode, FP8": ("mla_sparse_decode", {"topk": 200, "tokens": 300, "H": 16, **FP8}),
    "sparse decode, FP8, 32 rows": (
        "mla_sparse_decode",
        {"topk": 200, "tokens": 300, "H": 40, **FP8, "sink": True},
    ),
    "prefill": ("mla_prefill", {"lengths": (150,), "lengths_k": (290,), "H": 1}),
    "prefill, all keys": ("mla_prefill", {"lengths": (140,), "H": 1, "causal": False}),
    "prefill, 128 wide": ("mla_prefill", {"lengths": (150,), "H": 2, "Hk": 1, "Dqk": 128}),
    "prefill, fp32": ("mla_prefill", {"lengths": (70,), "H": 1, "dtype": F32}),
    "prefill backward": ("mla_prefill_backward", {"lengths": (150,), "H": 1}),
    "prefill backward, 128 wide": (
        "mla_prefill_backward",
        {"lengths": (150,), "H": 2, "Hk": 1, "Dqk": 128},
    ),
    "sparse prefill": ("mla_sparse_prefill", {"S": 2, "Skv": 150, "H": 16, "topk": 200}),
    "sparse prefill, 64 rows": ("mla_sparse_prefill", {"S": 2, "Skv": 150, "H": 70, "topk": 200}),
    "sparse prefill backward": (
        "mla_sparse_prefill_backward",
        {"S": 2, "Skv": 150, "H": 40, "topk": 100, "sink": True},
    ),
    "logits": ("mqa_logits", {"S": 70, "Skv": 300}),
    "logits, 256 wide": ("mqa_logits", {"S": 9, "Skv": 300, "D": 256}),
    "paged logits": ("paged_mqa_logits", {"lengths": (300, 70)}),
}
OTHER_ATTENTION = ("decode", "decode, 64 rows", "prefill", "prefill backward", "logits")


@pytest.mark.parametrize(
    ("target", "case"),
    [(t, c) for t in ALL for c in (ATTENTION if t in MAIN else OTHER_ATTENTION)],
)
def test_attention(target, case, generator, seed):
    name, size = ATTENTION[case]
    args = ops.inputs(name, generator, **size)
    with deepkern.backend("triton"), deepkern.compiled(target, seed=seed):
        got = getattr(torch.ops.deepkern, name)(*args)
    compare.assert_matches(name, got, getattr(deepkern.reference, name)(*args), target)


# Kernels whose copies and products run asynchronously, for 50 seeds in each order.
PIPELINED = {
    "gemm": ("fp8_gemm_nt", {"M": 66, "N": 40, "K": 656}),
    "decode": ("mla_decode", {"lengths": (150,), "H": 3, "R": 64, "D": 16}),
    "prefill": (
        "mla_prefill",
        {"lengths": (66,), "lengths_k": (130,), "H": 1, "Dqk": 64, "Dv": 32},
    ),
}


@pytest.mark.parametrize("order", ["random", "earliest", "latest"])
@pytest.mark.parametrize("case", PIPELINED)
def test_fifty_seeds(case, order, generator, seed):
    name, size = PIPELINED[case]
    args, first = ops.inputs(name, generator, **size), None
    small = tiles.GemmTile(64, 32, 4, 4)
    for k in range(50):
        with forced("sm_90", small, seed + k, order):
            got = compare.as_tuple(getattr(torch.ops.deepkern, name)(*args))
        if first is None:
            first = got
            compare.assert_matches(name, got, getattr(deepkern.reference, name)(*args), "sm_90")
        for a, b in zip(got, first, strict=True):
            compare.assert_bitwise(a, b, f"{name}, seed {seed + k}")
