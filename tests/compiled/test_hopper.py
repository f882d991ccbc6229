"""csrc/sm90 as nvcc compiles it, executed by the PTX machine, compared with the emulator.

The emulator (tests/hopper) compiles the same sources with a C++ compiler against its own
primitives. Here nvcc's PTX and host code run, so inline PTX and nvcc's code motion are tested too.
"""

from __future__ import annotations

import re

import pytest
import torch

import deepkern
from bench import emulator, hopper
from deepkern.testing import compare, ops

pytestmark = pytest.mark.proof

GEMMS = {
    "dense": "fp8_gemm_nt",
    "contiguous": "m_grouped_fp8_gemm_nt_contiguous",
    "masked": "m_grouped_fp8_gemm_nt_masked",
    "k_grouped": "k_grouped_fp8_gemm_nt",
}
ORDERS = ("random", "earliest", "latest")
# For each tile a product that the launcher chooses it for: M, N, K, groups, SMs of the GPU.
PRODUCTS = [
    (9, 72, 272, 1, 1), (9, 40, 2064, 1, 16), (17, 72, 272, 1, 1), (130, 136, 272, 1, 2),
    (130, 40, 400, 1, 2), (70, 40, 1040, 1, 1), (17, 72, 400, 1, 2), (17, 40, 272, 1, 1),
    (9, 40, 1040, 1, 1), (9, 40, 272, 1, 1),
    (257, 136, 272, 2, 2), (70, 40, 400, 2, 1), (9, 40, 272, 2, 1), (9, 40, 272, 2, 1),
    (130, 136, 272, 2, 2), (40, 40, 272, 2, 1), (9, 40, 272, 2, 1), (9, 40, 272, 2, 1),
    (70, 136, 400, 2, 2), (70, 72, 400, 2, 1), (9, 40, 272, 2, 1),
]  # fmt: skip
TILES = dict(zip(hopper.tiles(), PRODUCTS, strict=True))


@pytest.fixture(scope="session", autouse=True)
def needs_compilers() -> None:
    if hopper.NVCC is None:
        pytest.skip("no nvcc on PATH")
    if emulator.compiler() is None:
        pytest.skip("no C++ compiler")


def gemm_args(variant: str, generator, M, N, K, G, b_rows, out_dtype=torch.bfloat16) -> list:
    size = {"M": M, "N": N, "K": K}
    size |= {} if variant == "dense" else {"G": G}
    size |= {} if variant == "k_grouped" else {"b_rows": b_rows}
    op = deepkern.OPS[GEMMS[variant]]
    args = list(op.positional(ops.inputs(op.name, generator, **size)))
    if variant != "k_grouped":
        args[[name for name, _ in op.parameters].index("out_dtype")] = out_dtype
    return args


def run(name: str, args, library=None, **how):
    with hopper.cuda_backend(library, **how):
        return getattr(deepkern, name)(*args)


def check(name: str, args, **how) -> None:
    """Products have the bits of the emulator, attention is close to it and to the reference."""
    got = run(name, args, **how)
    with emulator.cuda_backend(**how):
        want = getattr(deepkern, name)(*args)
    if not name.startswith("mla_"):
        return compare.assert_bitwise(got, want)
    compare.assert_matches(name, got, getattr(deepkern.reference, name)(*args), "sm_90")
    if name == "mla_prefill_backward":
        for mine, other in zip(got, want, strict=True):
            torch.testing.assert_close(mine, other, rtol=2**-7, atol=1e-3)
        return
    # log2f of CUDA and of the C library differ in the last place, so lse and splits do.
    torch.testing.assert_close(got[1], want[1], rtol=3e-7, atol=3e-7)
    torch.testing.assert_close(got[0], want[0], rtol=2**-7, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("tile", TILES)
def test_every_tile(tile, seed, generator):
    variant, *_, b_rows = tile[5:-1].split(", ")
    M, N, K, G, sms = TILES[tile]
    for order in ORDERS:
        out_dtype = (torch.bfloat16, torch.float16, torch.float32)[ORDERS.index(order)]
        args = gemm_args(variant, generator, M, N, K, G, int(b_rows), out_dtype)
        check(GEMMS[variant], args, seed=seed, order=order, multiprocessors=sms)
        launches = hopper.launches()
        assert hopper.tile_of(launches[-1][2]) == tile, launches
        assert ["find_group_bounds" in name for *_, name in launches[:-1]] == (
            [True] if variant == "contiguous" else []
        )


@pytest.mark.parametrize(("K", "blocks"), [(272, 1), (1040, 2), (2064, 4), (4112, 8)])
def test_clusters_that_split_k(K, blocks, seed, generator):
    args = gemm_args("dense", generator, 5, 130, K, 1, 128)
    check("fp8_gemm_nt", args, seed=seed)
    assert [cluster for _, cluster, _ in hopper.launches()] == [blocks]


def test_adds_c(seed, generator):
    a, a_scale, b, b_scale, *_ = gemm_args("dense", generator, 70, 100, 256, 1, 128)
    c = torch.randn(70, 100, generator=generator)
    check("fp8_gemm_nt", (a, a_scale, b, b_scale, torch.float32, c), seed=seed)


@pytest.mark.parametrize("kind", [{}, {"cache_dtype": torch.uint8}], ids=["bf16", "fp8"])
@pytest.mark.parametrize(
    ("order", "lengths", "Sq", "H", "page"),
    [("random", (1030, 0, 20), 2, 3, 64), ("earliest", (130, 65), 2, 40, 16),
     ("latest", (200, 1), 1, 1, 53)],
)  # fmt: skip
def test_decode(kind, order, lengths, Sq, H, page, seed, generator):
    size = {"lengths": lengths, "Sq": Sq, "H": H, "page": page, **kind}
    args = deepkern.OPS["mla_decode"].positional(ops.inputs("mla_decode", generator, **size))
    check("mla_decode", args, seed=seed, order=order)
    combines = max(lengths) >= 1024
    kernels = [name for *_, name in hopper.launches()]
    assert ["mla_combine" in name for name in kernels] == [False] + [True] * combines


@pytest.mark.parametrize("kind", [{}, {"cache_dtype": torch.uint8}], ids=["bf16", "fp8"])
@pytest.mark.parametrize(
    ("order", "topk", "Sq", "H", "page"),
    [("random", 1030, 2, 3, 64), ("earliest", 130, 1, 40, 53), ("latest", 65, 2, 1, 1)],
)
def test_sparse_decode(kind, order, topk, Sq, H, page, seed, generator):
    size = {"topk": topk, "Sq": Sq, "H": H, "page": page, "sink": True, **kind}
    args = ops.inputs("mla_sparse_decode", generator, **size)
    check("mla_sparse_decode", args, seed=seed, order=order)
    kernels = [name for *_, name in hopper.launches()]
    assert ["mla_combine" in name for name in kernels] == [False] + [True] * (topk >= 1024)


def test_sparse_prefill(seed, generator):
    size = {"H": 70, "topk": 150, "lengths": True, "sink": True}
    args = ops.inputs("mla_sparse_prefill", generator, **size)
    check("mla_sparse_prefill", args, seed=seed, multiprocessors=2)


@pytest.mark.parametrize(
    ("order", "lengths", "keys", "size"),
    [("random", (130, 0, 20), (300, 7, 20), {"H": 2, "Hk": 1}),
     ("earliest", (150,), (150,), {"H": 1, "causal": False}),
     ("latest", (3, 40), (290, 0), {"H": 2, "unused": 3})],
)  # fmt: skip
def test_prefill(order, lengths, keys, size, seed, generator):
    inputs = ops.inputs("mla_prefill", generator, lengths, keys, **size)
    args = deepkern.OPS["mla_prefill"].positional(inputs)
    check("mla_prefill", args, seed=seed, order=order, multiprocessors=2)
    find, attend = [name for *_, name in hopper.launches()]
    assert "find_prefill_tiles" in find and "11mla_prefill" in attend


@pytest.mark.parametrize(
    ("order", "lengths", "keys", "size"),
    [("random", (130, 0, 20), (200, 7, 20), {"H": 2, "Hk": 1}),
     ("latest", (140,), (150,), {"H": 1, "causal": False})],
)  # fmt: skip
def test_prefill_backward(order, lengths, keys, size, seed, generator):
    q, k, v, *rest = ops.inputs("mla_prefill", generator, lengths, keys, **size)
    out, lse = deepkern.reference.mla_prefill(q, k, v, *rest)
    grad_out = torch.randn(out.shape, generator=generator).bfloat16()
    args = (grad_out, q, k, v, out.bfloat16(), lse.float(), *rest, torch.ones_like(lse.float()))
    check("mla_prefill_backward", args, seed=seed, order=order, multiprocessors=2)
    kernels = [name for *_, name in hopper.launches()]
    for name, kernel in zip(("delta", "find", "_dq", "find", "_dkv"), kernels, strict=True):
        assert name in kernel


def test_float32_sums(generator):
    """Other bits than Hopper's sums of 14 bits, and a smaller error."""
    args = gemm_args("dense", generator, 40, 72, 1024, 1, 128, torch.float32)
    got, want = run("fp8_gemm_nt", args, hardware_sums=False), deepkern.reference.fp8_gemm_nt(*args)
    compare.assert_matches("fp8_gemm_nt", got, want)
    assert compare.diff(run("fp8_gemm_nt", args), want) > 1e-9 > 1e5 * compare.diff(got, want)


def random_call(kind: str, rng, generator) -> tuple[str, list | tuple, dict]:
    """An op, its arguments and how to run it."""
    pick = lambda *values: values[rng.integers(len(values))]  # noqa: E731
    how = {"seed": int(rng.integers(2**31)), "order": pick(*ORDERS)}
    how["multiprocessors"] = pick(1, 2, 3, 4, 8, 16, 132)
    if kind == "mla_decode":
        lengths = rng.choice([0, 1, 20, 63, 64, 65, 140, 200, 530, 1100, 2100], rng.integers(1, 4))
        size = {"lengths": tuple(map(int, lengths)), "Sq": pick(1, 2), "H": pick(1, 3, 16, 40, 70)}
        size |= {"page": pick(1, 16, 53, 64, 128)}
        size |= pick({}, {"cache_dtype": torch.uint8})
        op = deepkern.OPS[kind]
        return kind, op.positional(ops.inputs(kind, generator, **size)), how
    M, N = pick(1, 3, 9, 17, 33, 65, 70, 129, 150, 257), pick(1, 8, 9, 72, 100, 130, 200, 264)
    K, G, b_rows = pick(16, 128, 100, 144, 272, 400, 1040), pick(1, 2, 3), pick(1, 128)
    dtype = pick(torch.bfloat16, torch.float16, torch.float32)
    return GEMMS[kind], gemm_args(kind, generator, M, N, K, G, b_rows, dtype), how


@pytest.mark.parametrize("kind", [*GEMMS, "mla_decode"])
@pytest.mark.parametrize("part", range(2))
def test_random_calls(kind, part, rng, generator):
    for _ in range(20):
        name, args, how = random_call(kind, rng, generator)
        check(name, args, **how)


# Planted bugs. Hook -> (kernel, start of the tile's line or "sparse", regular expression of the
# error).
WHOLE, PAIRS = "TILE(dense, 128, 128, 5, 1, 1, false, 128", "TILE(dense, 128, 128, 5, 2"
SPLITS, K_GROUPED = "TILE(dense, 64, 16, 10", "TILE(k_grouped, 128"
WAVES = "TILE(dense, 256"
# A missing warp_sync before an arrival is not here: the clocks of the machine are those of warps,
# so that an arrival of one lane releases the stores of all.  The emulator, whose lanes are threads,
# finds it (tests/hopper/test_planted_bugs.py).
BUGS = {
    "no_wait_full": ("fp8_gemm", WHOLE, "."),
    "releases_before_wgmma_wait": ("fp8_gemm", WHOLE, "."),
    "no_wgmma_wait": ("fp8_gemm", WHOLE, "wgmma"),
    "no_fence_before_tma_store": ("fp8_gemm", WHOLE, "proxy"),
    "wait_full_wrong_parity": ("fp8_gemm", WHOLE, "."),
    "releases_after_first_wave": ("fp8_gemm", WAVES, "."),
    "neighbour_not_released": ("fp8_gemm", PAIRS, "deadlock|wait"),
    "exits_before_neighbour": ("fp8_gemm", PAIRS, "ended|exit"),
    "no_clearing_of_k_tail": ("fp8_gemm", K_GROUPED, "wrong result"),
    "one_block_not_notified": ("fp8_gemm", SPLITS, "deadlock|wait"),
    "no_wait_for_partials": ("fp8_gemm", SPLITS, "."),
    "no_wait_for_p": ("mla_decode", "", "race|phase|wrote|writes"),
    "no_fence_after_gather": ("mla_decode", "", "proxy"),
    "no_wait_for_gather": ("mla_decode", "", "."),
    "announces_before_copies": ("mla_decode", "sparse", "."),
    "positions_not_announced": ("mla_decode", "sparse", "race"),
    "no_fence_for_piece_0": ("mla_decode", "sparse", "proxy"),
    "no_fence_for_piece_1": ("mla_decode", "sparse", "proxy"),
    "no_fence_after_value_tail": ("mla_prefill", "", "proxy"),
    "rescales_before_pv_ends": ("mla_prefill", "", "wgmma"),
}


def find_error(bug: str, generator) -> str:
    """What the machine reports, or "wrong result"; empty if it finds nothing in 30 runs."""
    kernel, tile, _ = BUGS[bug]
    line = next((t for t in hopper.tiles() if tile and t.startswith(tile)), "")
    library = hopper.kernels(bug, kernel, f"{line}\n" * len(hopper.tiles()) if line else "")
    name, size = "mla_decode", {"lengths": (200, 577), "Sq": 2, "H": 3, "page": 16}
    if tile == "sparse":
        name, size = "mla_sparse_decode", {"topk": 200, "tokens": 90, "H": 3}
    if kernel == "mla_prefill":
        name, size = kernel, {"lengths": (200,), "lengths_k": (300,), "H": 1}
    if kernel == "fp8_gemm":
        name = GEMMS[line[5:].split(",")[0]]
        size = {"M": 270, "N": 136, "K": 1152} | ({"G": 2} if "k_grouped" in name else {})
    args = deepkern.OPS[name].positional(ops.inputs(name, generator, **size))
    want = getattr(deepkern.reference, name)(*args)
    for seed in range(30):
        how = {"seed": seed, "order": ORDERS[seed % 3], "multiprocessors": 2 if line else 132}
        try:
            compare.assert_matches(name, run(name, args, library, **how), want, "sm_90")
        except RuntimeError as error:  # of ops.cpp, with the machine's message
            return str(error)
        except compare.Mismatch:
            return "wrong result"
    return ""


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug, generator):
    found = find_error(bug, generator)
    expected = BUGS[bug][2]
    assert re.search(expected, found, re.DOTALL), f"expected {expected!r}, found {found!r}"
    print(bug, "->", found)
