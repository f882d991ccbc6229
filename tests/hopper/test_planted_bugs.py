"""Every bug planted in an FP8 GEMM kernel is found by the emulator or changes the result.

A hook in csrc/sm90 (UNLESS_PLANTED, WHEN_PLANTED, PLANT) plants a bug when the kernel is compiled
with -DPLANT_<hook>. The search runs the kernel with many schedules, like the kernel's own tests.
"""

from __future__ import annotations

import re

import pytest
import torch

from bench.emulator import CSRC
from deepkern.testing import compare

from .conftest import TILES, EmulatorFailure, Tile, gemm_of, planted
from .planted_search import ANY, WRONG
from .test_fp8_gemm import operands, reference, run

TILES_FILE = "sm90/fp8_gemm_tiles.h"


def first(variant: str, **properties) -> Tile:
    """The first compiled tile of that variant with these properties."""
    tiles = (t for t in TILES if t.variant == variant)
    return next(t for t in tiles if all(getattr(t, k) == v for k, v in properties.items()))


WHOLE, PAIRS = first("dense", swapped=False, cluster=1), first("dense", cluster_m=2)
PAIRS_SHARE_A, WAVES = first("dense", rows=64, cluster_n=2), first("dense", waves=2)
SCALED, SWAPPED = first("dense", b_rows=1, swapped=False), first("dense", swapped=True)
CONTIGUOUS, MASKED, K_GROUPED = first("contiguous"), first("masked"), first("k_grouped")
CLUSTER_SPLIT_K, SERIAL_SPLIT_K = first("dense", columns=16), WHOLE
# Hook -> (tile to run, regular expression of the expected error).
BUGS = {
    # Barriers of the operand ring.
    "no_wait_empty": (WHOLE, ANY),
    "no_wait_full": (WHOLE, ANY),
    "wait_empty_wrong_parity": (WHOLE, "deadlock.*lanes wait for barrier"),
    "wait_full_wrong_parity": (WHOLE, ANY),
    "announces_too_few_bytes": (WHOLE, ANY),
    "announces_too_many_bytes": (WHOLE, "deadlock"),
    "expects_one_release_less": (WHOLE, ANY),
    "no_barrier_init_fence": (WHOLE, "no barrier_init_fence"),
    "no_wait_for_scales": (SCALED, ANY),
    "no_warp_sync_after_scale_stores": (SCALED, ANY),
    # WGMMA.
    "no_wgmma_wait": (WHOLE, ANY),
    "wgmma_wait_leaves_one": (WHOLE, ANY),
    "releases_before_wgmma_wait": (WHOLE, ANY),
    "releases_after_first_wave": (WAVES, ANY),
    "no_wgmma_commit": (WHOLE, ANY),
    "no_wgmma_fence": (WHOLE, "no wgmma_fence"),
    "accumulates_in_first_wgmma": (WHOLE, ANY),
    "wrong_descriptor_stride": (WHOLE, WRONG),
    "reads_past_smem": (WHOLE, "not in the"),
    # Registers.
    "producer_keeps_registers": (WHOLE, "deadlock.*registers"),
    "requests_too_many_registers": (WHOLE, "setmaxnreg"),
    # Epilogue.
    "no_fence_before_tma_store": (WHOLE, "no fence_async_proxy followed"),
    "no_barrier_before_tma_store": (WHOLE, ANY),
    "no_tma_wait_before_staging": (WHOLE, ANY),
    "waves_share_the_staging": (WAVES, ANY),
    "exits_before_tma_has_read": (WHOLE, "ends while a TMA store"),
    "warpgroups_share_a_barrier": (WHOLE, ANY),
    "barrier_expects_two_warpgroups": (WHOLE, "deadlock"),
    "stores_past_last_row": (WHOLE, "out of bounds|past the last row"),
    # Scales and groups.
    "scales_of_wrong_operand": (SWAPPED, "wrong result|out of bounds"),
    "reads_scales_past_last_row": (WHOLE, "out of bounds"),
    "stores_rows_of_other_groups": (CONTIGUOUS, WRONG),
    "b_of_first_group": (CONTIGUOUS, WRONG),
    "stores_invalid_rows": (MASKED, WRONG),
    "no_clearing_of_k_tail": (K_GROUPED, WRONG),
    "no_fence_after_k_tail": (K_GROUPED, "no fence_async_proxy followed"),
    "scales_of_previous_group": (K_GROUPED, WRONG),
}
# The same for clusters that share B and for those that share A.
PAIR_BUGS = {
    "no_wait_for_neighbour": ANY,
    "neighbour_not_released": "deadlock",
    "multicasts_to_the_same_half": ANY,
    "exits_before_neighbour": "block that has ended",
}
# The same for split-K.
SPLIT_BUGS = {
    "no_wait_for_partials": (CLUSTER_SPLIT_K, ANY),
    "one_block_not_notified": (CLUSTER_SPLIT_K, "deadlock"),
    "no_warp_sync_after_partials": (CLUSTER_SPLIT_K, ANY),
    "no_warp_sync_after_reduction": (CLUSTER_SPLIT_K, ANY),
    "no_wait_before_partials": (CLUSTER_SPLIT_K, ANY),
    "exits_before_partials_are_read": (CLUSTER_SPLIT_K, "that has ended"),
    "partials_expect_one_block": (CLUSTER_SPLIT_K, ANY),
    "no_cluster_arrive": (CLUSTER_SPLIT_K, "cluster_wait: no"),
    "no_cluster_wait": (CLUSTER_SPLIT_K, "waited for no barrier|has not passed a cluster barrier"),
    "adds_splits_in_reverse": (CLUSTER_SPLIT_K, WRONG),
    "reads_a_missing_rank": (CLUSTER_SPLIT_K, "no block of rank"),
    "adds_one_split_only": (CLUSTER_SPLIT_K, WRONG),
    "all_ranks_store_same_rows": (CLUSTER_SPLIT_K, WRONG),
    "split_starts_early": (CLUSTER_SPLIT_K, WRONG),
    "split_ends_late": (CLUSTER_SPLIT_K, WRONG),
    "split_with_other_scales": (CLUSTER_SPLIT_K, WRONG),
    "serial_splits_overlap": (SERIAL_SPLIT_K, ANY),
    "adds_totals_of_previous_tile": (SERIAL_SPLIT_K, WRONG),
    "forgets_a_split": (SERIAL_SPLIT_K, WRONG),
    "no_tma_wait_before_totals": (SERIAL_SPLIT_K, ANY),
    "no_barrier_before_totals": (SERIAL_SPLIT_K, ANY),
}


def search_splits(gemm, tile: Tile, generator, seeds: int = 30) -> None:
    """The same with four splits of K, the last of which is shorter or empty."""
    for K in (1152, 384):
        args = operands(tile, generator, 40, 376, K)
        want = reference(tile, args, torch.float32, splits=4)
        other = SERIAL_SPLIT_K if tile.swapped else CLUSTER_SPLIT_K
        for seed in range(seeds):
            how = {"seed": seed, "order": ("random", "earliest", "latest")[seed % 3], "splits": 4}
            got = run(gemm, tile, args, torch.float32, blocks=4 if tile.swapped else 1, **how)
            compare.assert_bitwise(got, want)
            if seed == 0:
                same = run(gemm, other, args, torch.float32, splits=4)
                compare.assert_bitwise(got, same)


def search(gemm, tile: Tile, generator, seeds: int = 40) -> None:
    """Raises the first error that the emulator or a comparison finds."""
    many = operands(tile, generator, 270, 264, 128)  # many tiles, short mainloops
    deep = operands(tile, generator, 140, 136, 1152, G=2)
    few = operands(tile, generator, 70, 72, 128)
    want = [reference(tile, args) for args in (many, deep)]
    padded = torch.full((71, 72), torch.nan, dtype=torch.bfloat16)
    for seed in range(seeds):
        how = {"seed": seed, "order": ("random", "earliest", "latest")[seed % 3]}
        for args, exact, blocks in ((many, want[0], 1), (deep, want[1], 2)):
            compare.assert_bitwise(run(gemm, tile, args, blocks=blocks, **how), exact)
        if tile.waves == 2:  # a float32 tile does not fit in the staging buffer
            got = run(gemm, tile, deep, torch.float32, **how)
            compare.assert_bitwise(got, reference(tile, deep, torch.float32))
        if tile.variant == "dense":
            run(gemm, tile, few, by_tma=False, out=padded[:70], **how)
            if not padded[70].isnan().all():
                raise compare.Mismatch("stored past the last row")


def find_error(gemm, tile: Tile, generator, search=search, **how) -> str:
    """The error that the search finds, or an empty string."""
    try:
        search(gemm, tile, generator, **how)
    except EmulatorFailure as failure:
        return str(failure)
    except compare.Mismatch as mismatch:
        return str(mismatch) if "past the last row" in str(mismatch) else WRONG
    return ""


def only_tiles(needed: tuple[Tile, ...]) -> str:
    """The list of tiles with needed[0] in place of all tiles not needed, to compile fewer."""
    text = (CSRC / TILES_FILE).read_text()
    lines = [line for line in text.splitlines() if line.startswith("TILE(")]
    kept = {lines[TILES.index(tile)] for tile in needed}
    instead = lines[TILES.index(needed[0])]
    return "".join(f"{line if line in kept else instead}\n" for line in lines)


def check_is_caught(bug: str, needed: tuple[Tile, ...], expected: str, generator, search) -> None:
    with planted(bug, "fp8_gemm", {TILES_FILE: only_tiles(needed)}) as library:
        found = find_error(gemm_of(library), needed[0], generator, search)
    assert re.search(expected, found, re.DOTALL), f"expected {expected!r}, found {found!r}"


@pytest.mark.proof
@pytest.mark.parametrize("bug", BUGS)
def test_bug_is_caught(bug, generator):
    tile, expected = BUGS[bug]
    check_is_caught(bug, (tile,), expected, generator, search)


@pytest.mark.proof
@pytest.mark.parametrize("tile", [PAIRS, PAIRS_SHARE_A], ids=str)
@pytest.mark.parametrize("bug", PAIR_BUGS)
def test_bug_in_a_pair_is_caught(bug, tile, generator):
    check_is_caught(bug, (tile,), PAIR_BUGS[bug], generator, search)


@pytest.mark.proof
@pytest.mark.parametrize("bug", SPLIT_BUGS)
def test_split_k_bug_is_caught(bug, generator):
    tile, expected = SPLIT_BUGS[bug]
    needed = (tile, CLUSTER_SPLIT_K, SERIAL_SPLIT_K)
    check_is_caught(bug, needed, expected, generator, search_splits)


@pytest.mark.proof
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_correct_kernel_passes_the_search(emulated, tile, generator):
    """In fewer schedules: test_fp8_gemm.py has more of them."""
    assert find_error(emulated, tile, generator, seeds=9) == ""
    if tile.splits_k and tile.b_rows == 128:
        assert find_error(emulated, tile, generator, search_splits, seeds=9) == ""
