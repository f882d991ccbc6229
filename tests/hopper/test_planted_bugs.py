"""Every bug planted in a kernel is caught by the emulator or spoils the result.

A bug is a change of one place of the kernel's source. Each is looked for with many schedules, as a
kernel's own tests do.
"""

from __future__ import annotations

import re

import pytest
import torch

import deepkern
from deepkern.testing import compare

from .conftest import FORMS, EmulatorFailure, build, gemm_of, sources
from .test_fp8_gemm_nt import operands

KERNEL = "sm90/fp8_gemm_nt.cuh"
WHOLE, PAIRS = FORMS[0], FORMS[1]
WRONG = "wrong result"
SOMEHOW = "."  # a race: which of its consequences shows first is chance
# What is planted: (form, what stands in the source, what in its place, how it is found out).
BUGS = {
    "no wait for a free buffer": (
        WHOLE, "barrier_wait(&empty[ring.stage], ring.round ^ 1);", "", SOMEHOW),
    "no wait for the data": (WHOLE, "barrier_wait(&full[ring.stage], ring.round);", "", SOMEHOW),
    "loader waits for the wrong parity": (
        WHOLE, "ring.round ^ 1);", "ring.round);", "deadlock.*lanes wait for barrier"),
    "reader waits for the wrong parity": (
        WHOLE, "barrier_wait(&full[ring.stage], ring.round);",
        "barrier_wait(&full[ring.stage], ring.round ^ 1);", SOMEHOW),
    "no wait for WGMMA": (WHOLE, "wgmma_wait<0>();", "", SOMEHOW),
    "waits for all WGMMAs but the last": (
        WHOLE, "wgmma_wait<0>();", "wgmma_wait<1>();", SOMEHOW),
    "buffer handed on before it was read": (
        WHOLE, "    wgmma_commit();\n    wgmma_wait<0>();",
        "    if (lane_index() == 0) barrier_arrive(&empty[ring.stage]);\n    wgmma_commit();\n"
        "    wgmma_wait<0>();\n    if (false)", SOMEHOW),
    "no commit": (WHOLE, "    wgmma_commit();\n", "", SOMEHOW),
    "no fence before WGMMA": (WHOLE, "    wgmma_fence();\n", "", "no wgmma_fence"),
    "accumulates what it should begin": (WHOLE, "step > 0);", "true);", SOMEHOW),
    "wrong descriptor": (WHOLE, "(a + step * 32, 0, 1024)", "(a + step * 32, 0, 512)", WRONG),
    "reads beyond shared memory": (
        WHOLE, "memory + ring.stage * Tile::STAGE_BYTES + group * 64 * Tile::K",
        "memory + Tile::SHARED_BYTES - 1000 / 16 * 16", "not in the"),
    "fewer bytes announced": (
        WHOLE, "&full[ring.stage], Tile::STAGE_BYTES);", "&full[ring.stage], Tile::A_BYTES);",
        SOMEHOW),
    "more bytes announced": (
        WHOLE, "&full[ring.stage], Tile::STAGE_BYTES);",
        "&full[ring.stage], Tile::STAGE_BYTES + 16);", "deadlock"),
    "no fence between threads' stores and TMA": (
        WHOLE, "    fence_async_proxy();\n", "", "no fence_async_proxy followed"),
    "TMA stores what others still write": (
        WHOLE, "    fence_async_proxy();\n    named_barrier_sync(1 + group, 128);\n",
        "    fence_async_proxy();\n", SOMEHOW),
    "next tile written while TMA reads": (
        WHOLE, "    if (storing) tma_store_wait_read<0>();\n    named", "    named", SOMEHOW),
    "block ends while TMA reads": (
        WHOLE, "  if (storing) tma_store_wait_read<0>();\n}", "}", "ends while a TMA store"),
    "both groups at one barrier": (WHOLE, "named_barrier_sync(1 + group, 128)",
                                   "named_barrier_sync(1, 128)",
                                   SOMEHOW),
    "one group less at a barrier": (WHOLE, "named_barrier_sync(1 + group, 128)",
                                    "named_barrier_sync(1 + group, 256)", "deadlock"),
    "barriers not fenced": (WHOLE, "    barrier_init_fence();\n", "", "no barrier_init_fence"),
    "too many registers": (WHOLE, "registers_decrease<40>", "registers_decrease<96>",
                           "deadlock.*registers"),
    "registers that nobody has": (WHOLE, "registers_increase<232>", "registers_increase<264>",
                                  "setmaxnreg"),
    "one arrival too few expected": (
        WHOLE, "barrier_init(&empty[s], 4 * GROUPS * CLUSTER)",
        "barrier_init(&empty[s], 4 * GROUPS * CLUSTER - 1)", SOMEHOW),
    "neighbour's buffers not waited for": (
        PAIRS, "barrier_init(&empty[s], 4 * GROUPS * CLUSTER)",
        "barrier_init(&empty[s], 4 * GROUPS)", SOMEHOW),
    "neighbour not told": (PAIRS, "lane_index() < CLUSTER", "lane_index() < 1", "deadlock"),
    "half of B twice": (PAIRS, "+ rank * half * Tile::K", "", SOMEHOW),
    "block ends before its neighbour": (
        PAIRS, "  if (CLUSTER > 1) cluster_sync();\n}", "}", "block that has ended"),
    "stores beyond its rows": (
        WHOLE, "if (m >= p.M || n >= p.N) continue;", "if (m >= p.M + 1 || n >= p.N) continue;",
        "beyond"),
}  # fmt: skip


def caught(gemm, form: str, generator) -> str:
    """How the bug shows, or nothing."""
    args = operands(generator, 140, 136, 1152)
    want = deepkern.reference.fp8_gemm_nt(*args, torch.bfloat16, None)
    beside = torch.full((71, 72), torch.nan, dtype=torch.bfloat16)
    for seed in range(40):
        order = ("random", "earliest", "latest")[seed % 3]
        try:
            got = gemm(*args, form=form, seed=seed, order=order, blocks=2)
            compare.assert_close(got, want)
            # Many tiles one after the other, with little to do between them.
            many = operands(generator, 270, 264, 128)
            got = gemm(*many, form=form, seed=seed, order=order, blocks=1)
            compare.assert_close(got, deepkern.reference.fp8_gemm_nt(*many, torch.bfloat16, None))
            few = operands(generator, 70, 72, 128)
            gemm(*few, form=form, seed=seed, order=order, by_tma=False, out=beside[:70])
            if not beside[70].isnan().all():
                return "wrote beyond its rows"
        except EmulatorFailure as failure:
            return str(failure)
        except compare.Mismatch:
            return WRONG
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("name", BUGS)
def test_is_caught(name, generator):
    form, right, wrong, how = BUGS[name]
    whole = sources()
    assert right in whole[KERNEL], f"the kernel has no {right!r} any more: plant another bug"
    library = build(whole | {KERNEL: whole[KERNEL].replace(right, wrong)})
    found = caught(gemm_of(library), form, generator)
    assert re.search(how, found, re.DOTALL), f"expected {how!r}, found {found!r}"


def test_no_bug_is_found_where_none_is(emulated, generator):
    assert caught(emulated, WHOLE, generator) == ""
