"""Every bug planted in mla_decode's kernels is caught: as in test_planted_bugs.py."""

from __future__ import annotations

import re

import pytest

import deepkern
from bench.emulator import build, sources
from deepkern.testing import compare, inputs

from .conftest import EmulatorFailure, mla_of

KERNEL = "sm90/mla_decode.cuh"
WRONG = "wrong result"
SOMEHOW = "."  # a race: which of its consequences shows first is chance
WEIGHTS_STORED = """    fence_async_proxy();
    named_barrier_sync(1, 256);
#pragma unroll
    for (int i = 0; i < 128; ++i) sum"""
AFTER_SUMS = (
    "    wgmma_wait<0>();\n    if (lane_index() == 0) barrier_arrive(&ring.empty[ring.stage]);"
)
# What is planted: what stands in the source, what in its place, how it is found out.
BUGS = {
    "no wait for a free buffer": ("    ring.wait_empty();\n", "", SOMEHOW),
    "no wait for the tokens": ("    ring.wait_full();\n", "", SOMEHOW),
    "wrong parity": ("(&empty[stage], round ^ 1)", "(&empty[stage], round)", "deadlock"),
    "buffer handed on before the values were read": (
        AFTER_SUMS, "\n".join(reversed(AFTER_SUMS.split("\n"))), SOMEHOW),
    "no wait for the scores": (
        "    wgmma_wait<0>();\n    float shrink", "    float shrink", SOMEHOW),
    "one group alone frees a buffer": ("empty[s], 8);", "empty[s], 4);", SOMEHOW),
    "gathered rows not fenced": (
        "      fence_async_proxy();\n      barrier_arrive(full);", "      barrier_arrive(full);",
        "no fence_async_proxy followed"),
    "queries not waited for": (
        "  fence_async_proxy();\n  named_barrier_sync(1, 256);\n}", "  fence_async_proxy();\n}",
        SOMEHOW),
    "weights not fenced": (
        WEIGHTS_STORED, WEIGHTS_STORED.replace("    fence_async_proxy();\n", ""),
        "no fence_async_proxy followed"),
    "weights of the other half not waited for": (
        WEIGHTS_STORED, WEIGHTS_STORED.replace("    named_barrier_sync(1, 256);\n", ""), SOMEHOW),
    "maxima of the other half not waited for": (
        "  named_barrier_sync(1, 256);\n  float zero[2];", "  float zero[2];", SOMEHOW),
    "sums of the other half not waited for": (
        "  named_barrier_sync(1, 256);\n  const bool whole", "  const bool whole", SOMEHOW),
    "sums not brought to the new maximum": (
        "sum[i] *= shrink[i / 2 % 2];", "sum[i] *= shrink[0];", WRONG),
    "maximum of one half alone": (
        "larger(top[half], load_shared<float>(maxima + 4 * other))", "top[half]", WRONG),
    "halves of the values swapped in memory": (
        "MlaTile::COLUMN_BYTES, 1024), true);", "MlaTile::COLUMN_BYTES / 2, 1024), true);", WRONG),
    "first tokens' values for all": ("values + step * 16 * 128", "values", WRONG),
    "absent tokens seen": ("from ? token : ABSENT", "token", WRONG),
    "tokens of a whole tile past the end": (
        "&& first + MlaTile::TOKENS <= w.end", "", SOMEHOW),
    "page's first tokens for all": ("+ first % p.page;", ";", WRONG),
    "new tokens see each other": ("w.length - (p.Sq - 1 - query) : w.length", "w.length : w.length",
                                  WRONG),
    "fewer bytes announced": (
        "expect(full, MlaTile::TILE_BYTES)", "expect(full, MlaTile::TILE_BYTES - 1024)", SOMEHOW),
    "too many registers": ("registers_decrease<72>", "registers_decrease<88>", "deadlock"),
    "a split left out": ("i < cut.count; ++i) {", "i < cut.count - 1; ++i) {", WRONG),
    "splits not weighted": (
        "const float weight = exp2_of(p.partial_lse[at] - zero);", "const float weight = 1.0f;",
        WRONG),
}  # fmt: skip


def looked_for(mla, generator) -> None:
    """Raises what the emulator or a comparison finds."""
    op = deepkern.OPS["mla_decode"]
    sizes = ({"lengths": (330, 700), "H": 9, "page": 128},
             {"lengths": (200, 65, 1), "H": 5, "page": 16})  # fmt: skip
    cases = [op.positional(inputs.make(op.name, generator, Sq=2, **size)) for size in sizes]
    for q, _, table, *_ in cases:
        q[:, :, 0] *= 30  # maxima that move from tile to tile, in some rows
        table[0, 1] = -1
    want = [deepkern.reference.mla_decode(*args) for args in cases]
    for seed in range(20):
        for args, exact in zip(cases, want, strict=True):
            order = ("random", "earliest", "latest")[seed % 3]
            for mine, other in zip(mla(*args, seed=seed, order=order), exact, strict=True):
                compare.assert_close(mine, other)


def caught(mla, generator) -> str:
    """How the bug shows, or nothing."""
    try:
        looked_for(mla, generator)
    except EmulatorFailure as failure:
        return str(failure)
    except compare.Mismatch:
        return WRONG
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("name", BUGS)
def test_is_caught(name, generator):
    right, wrong, how = BUGS[name]
    whole = sources()
    assert right in whole[KERNEL], f"the kernel has no {right!r} any more: plant another bug"
    library = build(whole | {KERNEL: whole[KERNEL].replace(right, wrong)})
    found = caught(mla_of(library), generator)
    assert re.search(how, found, re.DOTALL), f"expected {how!r}, found {found!r}"


@pytest.mark.slow
def test_no_bug_is_found_where_none_is(emulated_mla, generator):
    assert caught(emulated_mla, generator) == ""
