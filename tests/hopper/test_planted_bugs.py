"""Every bug planted in a kernel is caught by the emulator or spoils the result.

A bug is a change of one place of the kernel's source. Each is looked for with many schedules, as a
kernel's own tests do.
"""

from __future__ import annotations

import re

import pytest
import torch

from bench.emulator import sources
from deepkern.testing import compare

from .conftest import TILES, EmulatorFailure, Tile, gemm_of, planted
from .test_fp8_gemm import operands, reference, run

FILES = tuple(f"sm90/{name}.cuh" for name in (
    "fp8_gemm", "fp8_gemm_store", "fp8_gemm_tile", "ring", "schedule"))  # fmt: skip

TILES_FILE = "sm90/fp8_gemm_tiles.h"


def first(form: str, **what) -> Tile:
    """The first compiled tile of that form with these properties."""
    fits = (t for t in TILES if t.form == form)
    return next(t for t in fits if all(getattr(t, k) == v for k, v in what.items()))


WHOLE, PAIRS = first("dense", swapped=False, cluster=1), first("dense", cluster=2)
SCALED, SWAPPED = first("dense", b_rows=1, swapped=False), first("dense", swapped=True)
CONTIGUOUS, MASKED, K_GROUPED = first("contiguous"), first("masked"), first("k_grouped")
SPREAD, IN_TURN = first("dense", columns=16), WHOLE  # where K is cut into runs
WRONG = "wrong result"
SOMEHOW = "."  # a race: which of its consequences shows first is chance
WAIT_FULL, WAIT_EMPTY = (
    "barrier_wait(&full[stage], round);",
    "barrier_wait(&empty[stage], round ^ 1);",
)
EMPTY = """    Barrier* empty = &ring.empty[ring.stage];
    if (Tile::RIGHT_ROWS == 1) warp_sync();  // all lanes have their scales
    if (Tile::CLUSTER == 1) {
      if (lane_index() == 0) barrier_arrive(empty);
"""
WAIT_AND_RELEASE, RELEASE_AND_WAIT = "    wgmma_wait<0>();\n" + EMPTY, EMPTY + "wgmma_wait<0>();\n"
# What is planted: (tile, what stands in the source, what in its place, how it is found out).
BUGS = {
    "no wait for a free buffer": (WHOLE, WAIT_EMPTY, "", SOMEHOW),
    "no wait for the data": (WHOLE, WAIT_FULL, "", SOMEHOW),
    "loader waits for the wrong parity": (
        WHOLE, WAIT_EMPTY, "barrier_wait(&empty[stage], round);",
        "deadlock.*lanes wait for barrier"),
    "reader waits for the wrong parity": (
        WHOLE, WAIT_FULL, "barrier_wait(&full[stage], round ^ 1);", SOMEHOW),
    "no wait for WGMMA": (WHOLE, "wgmma_wait<0>();", "", SOMEHOW),
    "waits for all WGMMAs but the last": (WHOLE, "wgmma_wait<0>();", "wgmma_wait<1>();", SOMEHOW),
    "buffer handed on before it was read": (WHOLE, WAIT_AND_RELEASE, RELEASE_AND_WAIT, SOMEHOW),
    "no commit": (WHOLE, "    wgmma_commit();\n", "", SOMEHOW),
    "no fence before WGMMA": (WHOLE, "    wgmma_fence();\n", "", "no wgmma_fence"),
    "accumulates what it should begin": (WHOLE, "step > 0);", "true);", SOMEHOW),
    "wrong descriptor": (WHOLE, "(rows + step * 32, 0, 1024)", "(rows + step * 32, 0, 512)", WRONG),
    "reads beyond shared memory": (
        WHOLE, "ring.left() + group * 64 * Tile::K",
        "ring.memory + Tile::SHARED_BYTES / 16 * 16", "not in the"),
    "fewer bytes announced": (
        WHOLE, "(full, Tile::STAGE_BYTES)", "(full, Tile::LEFT_BYTES)", SOMEHOW),
    "more bytes announced": (
        WHOLE, "(full, Tile::STAGE_BYTES)", "(full, Tile::STAGE_BYTES + 16)", "deadlock"),
    "no fence between threads' stores and TMA": (
        WHOLE, "  fence_async_proxy();\n  named_barrier_sync(1 + group, 128);\n",
        "  named_barrier_sync(1 + group, 128);\n", "no fence_async_proxy followed"),
    "TMA stores what others still write": (
        WHOLE, "  fence_async_proxy();\n  named_barrier_sync(1 + group, 128);\n",
        "  fence_async_proxy();\n", SOMEHOW),
    "next tile written while TMA reads": (
        WHOLE, "  if (storing) tma_store_wait_read<0>();\n", "", SOMEHOW),
    "block ends while TMA reads": (
        WHOLE, "thread_index() % 128 == 0) {\n    tma_store_wait_read<0>();", "false) {",
        "ends while a TMA store"),
    "both groups at one barrier": (
        WHOLE, "named_barrier_sync(1 + group, 128)", "named_barrier_sync(1, 128)", SOMEHOW),
    "one group less at a barrier": (
        WHOLE, "named_barrier_sync(1 + group, 128)", "named_barrier_sync(1 + group, 256)",
        "deadlock"),
    "barriers not fenced": (WHOLE, "    barrier_init_fence();\n", "", "no barrier_init_fence"),
    "too many registers": (
        WHOLE, "registers_decrease<40>", "registers_decrease<96>", "deadlock.*registers"),
    "registers that nobody has": (
        WHOLE, "registers_increase<232>", "registers_increase<264>", "setmaxnreg"),
    "one arrival too few expected": (
        WHOLE, "4 * Tile::GROUPS * Tile::CLUSTER)", "4 * Tile::GROUPS * Tile::CLUSTER - 1)",
        SOMEHOW),
    "neighbour's buffers not waited for": (
        PAIRS, "4 * Tile::GROUPS * Tile::CLUSTER)", "4 * Tile::GROUPS)", SOMEHOW),
    "neighbour not told": (PAIRS, "lane_index() < Tile::CLUSTER", "lane_index() < 1", "deadlock"),
    "half of B twice": (PAIRS, "ring.right() + rank * half * Tile::K", "ring.right()", SOMEHOW),
    "block ends before its neighbour": (
        PAIRS, "  if (Tile::CLUSTER > 1) cluster_sync();\n}", "}", "block that has ended"),
    "stores beyond its rows": (
        WHOLE, "if (row >= w.end) return false;", "if (row > w.end) return false;",
        "beyond|out of bounds"),
    "scales not waited for": (SCALED, "(RIGHT_ROWS == 1 ? 32 : 0)", "0", SOMEHOW),
    "buffer handed on before its scales were read": (
        SCALED, "if (Tile::RIGHT_ROWS == 1) warp_sync();", "", SOMEHOW),
    "scales of the wrong operand": (
        SWAPPED, "Tile::SWAPPED ? p.a_scale : p.b_scale;\n  Work w;",
        "p.b_scale;\n  Work w;", "wrong result|out of bounds"),
    "scales past the last row": (
        WHOLE, "row + 8 < last ? row + 8 : 0, Tile::LEFT_ROWS", "row + 8, Tile::LEFT_ROWS",
        "out of bounds"),
    "another group's rows": (
        CONTIGUOUS, "load_global(p.group_index + row) == w.group", "true", WRONG),
    "another group's weights": (
        CONTIGUOUS, "w.group * p.N + w.column : w.column", "w.column : w.column", WRONG),
    "rows not in use": (MASKED, "if (m >= w.valid) sum[i] = 0.0f;", "", WRONG),
    "another group's values of K": (
        K_GROUPED, "Tile::FORM == Form::k_grouped && length", "false && length", WRONG),
    "cleared after the fence": (
        K_GROUPED, "  fence_async_proxy();\n  named_barrier_sync(1 + Tile::GROUPS, threads);",
        "  named_barrier_sync(1 + Tile::GROUPS, threads);", "no fence_async_proxy followed"),
    "scales of the group before": (K_GROUPED, "scale_block += (length + 127) / 128", "", WRONG),
}  # fmt: skip

# The same in what is done where K is cut into runs.
SPLIT_BUGS = {
    "shares read before they are there": (SPREAD, "  shared.wait_full();\n", "", SOMEHOW),
    "one block not told of shares": (
        SPREAD, "if (lane_index() < splits) barrier_arrive_at(shared.full, lane_index());",
        "if (lane_index() < splits - 1) barrier_arrive_at(shared.full, lane_index());", "deadlock"),
    "told before all lanes have written": (
        SPREAD, "  warp_sync();\n  if (lane_index() < splits) barrier_arrive_at(shared.full",
        "  if (lane_index() < splits) barrier_arrive_at(shared.full", SOMEHOW),
    "told before all lanes have read": (
        SPREAD, "  warp_sync();\n  if (lane_index() < splits) barrier_arrive_at(shared.empty",
        "  if (lane_index() < splits) barrier_arrive_at(shared.empty", SOMEHOW),
    "shares overwritten while they are read": (
        SPREAD, "  shared.wait_empty();  // all blocks have read the tile before\n", "", SOMEHOW),
    "block ends while its shares are read": (
        SPREAD, "    shared.wait_empty();  // the others may still read this block's shares\n", "",
        "that has ended"),
    "barriers of shares for one block": (
        SPREAD, "const int sharing = 4 * Tile::GROUPS * cluster;",
        "const int sharing = 4 * Tile::GROUPS;", SOMEHOW),
    "no barrier of the cluster before its blocks talk": (
        SPREAD, "cluster_arrive();  // is waited for", "(void)0;  // is not", "cluster_wait: no"),
    "no wait for it": (
        SPREAD, "    if (Tile::SPREAD) cluster_wait();\n", "", "waited for no barrier"),
    "shares added in another order": (
        SPREAD, "load_shared_at(place, r)", "load_shared_at(place, splits - 1 - r)", WRONG),
    "a rank that there is not": (
        SPREAD, "load_shared_at(place, r)", "load_shared_at(place, r + 1)", "no block of rank"),
    "one share for all": (
        SPREAD, "load_shared_at(place, r)", "load_shared_at(place, cluster_rank())", WRONG),
    "rows that no rank stores": (
        SPREAD, "m = rank + splits * warp_index()", "m = splits * warp_index()", WRONG),
    "a run begins early": (SPREAD, "k = r * p.run * 128,", "k = r * p.run * 64,", WRONG),
    "a run ends late": (SPREAD, "clamp(p.K - k, 0, p.run * 128)", "p.K - k", WRONG),
    "a run with another's scales": (
        SPREAD, "scale_block = r * p.run;", "scale_block = 0;", WRONG),
    "runs in turn with the first one's scales": (
        IN_TURN, "w.scale_block + block, length", "w.scale_block, length", WRONG),
    "runs in turn that overlap": (
        IN_TURN, "clamp(w.length - block * Tile::K, 0, p.run * Tile::K)",
        "w.length - block * Tile::K", SOMEHOW),
    "a total that holds the tile before": (
        IN_TURN, "if (!is_first) sum[i + j] += total.value[j];",
        "sum[i + j] += load_shared<Floats>(place).value[j];", WRONG),
    "a run forgotten": (IN_TURN, "if (!is_last) store_shared(place, total);", "", WRONG),
    "totals where TMA still reads": (
        IN_TURN, "    if (thread == 0) tma_store_wait_read<0>();\n", "", SOMEHOW),
    "totals before TMA's wait is over for all": (
        IN_TURN, "    named_barrier_sync(1 + thread_index() / 128, 128);\n", "", SOMEHOW),
}  # fmt: skip


def looked_for_in_splits(gemm, tile: Tile, generator) -> None:
    """The same where K is cut into four runs, the last of which is shorter or empty."""
    for K in (1152, 384):
        args = operands(tile, generator, 40, 264, K)
        want = reference(tile, args, torch.float32)
        other = IN_TURN if tile.swapped else SPREAD
        for seed in range(30):
            how = {"seed": seed, "order": ("random", "earliest", "latest")[seed % 3], "splits": 4}
            got = run(gemm, tile, args, torch.float32, blocks=4 if tile.swapped else 1, **how)
            compare.assert_close(got, want)
            if seed == 0:
                same = run(gemm, other, args, torch.float32, splits=4)
                compare.assert_bitwise(got, same)


def looked_for(gemm, tile: Tile, generator) -> None:
    """Raises what the emulator or a comparison finds."""
    many = operands(tile, generator, 270, 264, 128)  # tiles with little to do between them
    deep = operands(tile, generator, 140, 136, 1152, G=2)
    few = operands(tile, generator, 70, 72, 128)
    want = [reference(tile, args) for args in (many, deep)]
    beside = torch.full((71, 72), torch.nan, dtype=torch.bfloat16)
    for seed in range(40):
        how = {"seed": seed, "order": ("random", "earliest", "latest")[seed % 3]}
        for args, exact, blocks in ((many, want[0], 1), (deep, want[1], 2)):
            compare.assert_close(run(gemm, tile, args, blocks=blocks, **how), exact)
        if tile.form == "dense":
            run(gemm, tile, few, by_tma=False, out=beside[:70], **how)
            if not beside[70].isnan().all():
                raise compare.Mismatch("wrote beyond its rows")


def caught(gemm, tile: Tile, generator, look=looked_for) -> str:
    """How the bug shows, or nothing."""
    try:
        look(gemm, tile, generator)
    except EmulatorFailure as failure:
        return str(failure)
    except compare.Mismatch as mismatch:
        return str(mismatch) if "beyond" in str(mismatch) else WRONG
    return ""


def only(listed: str, needed: tuple[Tile, ...]) -> str:
    """The list of tiles with the first of `needed` in place of all others: less to compile."""
    lines = [line for line in listed.splitlines() if line.startswith("TILE(")]
    kept = {lines[TILES.index(tile)] for tile in needed}
    instead = lines[TILES.index(needed[0])]
    return "".join(f"{line if line in kept else instead}\n" for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*BUGS, *SPLIT_BUGS])
def test_is_caught(name, generator):
    tile, right, wrong, how = (BUGS | SPLIT_BUGS)[name]
    whole = sources()
    file = next((f for f in FILES if right in whole[f]), None)
    assert file, f"no kernel has {right!r} any more: plant another bug"
    look = looked_for if name in BUGS else looked_for_in_splits
    needed = (tile,) if name in BUGS else (tile, SPREAD, IN_TURN)
    changed = {TILES_FILE: only(whole[TILES_FILE], needed), file: whole[file].replace(right, wrong)}
    with planted(whole | changed) as library:
        found = caught(gemm_of(library), tile, generator, look)
    assert re.search(how, found, re.DOTALL), f"expected {how!r}, found {found!r}"


@pytest.mark.slow
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_no_bug_is_found_where_none_is(emulated, tile, generator):
    assert caught(emulated, tile, generator) == ""
    if tile.form == "dense" and tile.b_rows == 128:
        assert caught(emulated, tile, generator, looked_for_in_splits) == ""
