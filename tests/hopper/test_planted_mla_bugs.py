"""Every bug planted in mla_decode's kernels is caught: as in test_planted_bugs.py."""

from __future__ import annotations

import re

import pytest
import torch

import deepkern
from bench.emulator import build, sources
from deepkern.testing import compare

from .conftest import EmulatorFailure, mla_of
from .test_mla_decode import CACHES, WORST_SCALE, operands, scales_of

FP8 = CACHES["fp8"]

KERNELS = ("sm90/mla_decode.cuh", "sm90/mla_load.cuh", "sm90/mla_tile.cuh", "sm90/ring.cuh")
WRONG = "wrong result"
SOMEHOW = "."  # a race: which of its consequences shows first is chance
UNFENCED = "no fence_async_proxy followed"
GATHERED = "      fence_async_proxy();\n      barrier_arrive(full);"
UNPACKED = "    fence_async_proxy();\n    barrier_arrive(&ring.full"
PUT = "    const int at = first + row;\n"
AFTER_SUMS = (
    "    wgmma_wait<0>();\n    if (lane_index() == 0) barrier_arrive(&ring.empty[ring.stage]);"
)
# What is planted: what stands in the source, what in its place, how it is found out.
BUGS = {
    "no wait for a free buffer": (
        "    ring.wait_empty();\n    Barrier* full", "    Barrier* full", SOMEHOW),
    "no wait for the tokens": ("    ring.wait_full();\n", "", SOMEHOW),
    "wrong parity": ("(&empty[stage], round ^ 1)", "(&empty[stage], round)", "deadlock"),
    "buffer handed on before the values were read": (
        AFTER_SUMS, "\n".join(reversed(AFTER_SUMS.split("\n"))), SOMEHOW),
    "no wait for the scores": (
        "      wgmma_wait<0>();\n    }\n    weigh", "    }\n    weigh", SOMEHOW),
    "one group alone frees a buffer": ("init(128, 8)", "init(128, 4)", SOMEHOW),
    "gathered rows not fenced": (GATHERED, GATHERED.split("\n")[1], UNFENCED),
    "queries not waited for": (
        "  fence_async_proxy();\n  named_barrier_sync(1, 256);\n}", "  fence_async_proxy();\n}",
        SOMEHOW),
    "weights of the other half not waited for": (
        "  named_barrier_sync(1, 256);\n  take_weights", "  take_weights", SOMEHOW),
    "weights of the other half's other tokens": (
        "from + i / 4 * 2048", "from + (1 - i / 4) * 2048", WRONG),
    "own weights twice": ("weights + (1 - group) * 4096", "weights + group * 4096", WRONG),
    "maxima of the other half not waited for": (
        "  named_barrier_sync(1, 256);\n  float zero[2];", "  float zero[2];", SOMEHOW),
    "sums of the other half not waited for": (
        "  named_barrier_sync(1, 256);\n  const bool whole", "  const bool whole", SOMEHOW),
    "sums not brought to the new maximum": (
        "sum[i / 64][i % 64] *= shrink[i / 2 % 2];", "sum[i / 64][i % 64] *= shrink[0];", WRONG),
    "maximum of one half alone": (
        "larger(top[half], load_shared<float>(maxima + 4 * other))", "top[half]", WRONG),
    "columns of the values interleaved": (
        "step * 16 * 128, MlaTile::COLUMN_BYTES, 1024), true);",
        "step * 16 * 128, MlaTile::COLUMN_BYTES / 2, 1024), true);", WRONG),
    "first tokens' values for all": (
        "matrix_descriptor(values + step * 16 * 128", "matrix_descriptor(values", WRONG),
    "absent tokens seen": ("from ? row : ABSENT", "row", WRONG),
    "absent tokens seen where many follow": (
        "{smaller(rows.limit[0] - first, MlaTile::TOKENS)", "{rows.limit[0] - first", WRONG),
    "tokens of a whole tile past the end": (
        "&& first + MlaTile::TOKENS <= w.end", "", SOMEHOW),
    "page's first tokens for all": ("+ first % p.page;", ";", WRONG),
    "new tokens see each other": ("w.length - (p.Sq - 1 - query) : w.length", "w.length : w.length",
                                  WRONG),
    "fewer bytes announced": (
        "expect(full, MlaTile::TILE_BYTES)", "expect(full, MlaTile::TILE_BYTES - 1024)", SOMEHOW),
    "too many registers": ("FP8 ? 88 : 72", "FP8 ? 96 : 80", "deadlock"),
    "a split left out": ("i < cut.count; ++i) {", "i < cut.count - 1; ++i) {", WRONG),
    "splits added up before they are there": (
        "  grid_dependency_wait();\n", "", "no grid_dependency_wait came before"),
    "splits read past caches that are up to date": (
        "load_written(p.partial_lse + at)", "load_global(p.partial_lse + at)",
        "load_global is for what nobody writes"),
    "rows past the last stored": ("    if (m >= all) continue;\n", "", SOMEHOW),
    "every tile of rows the first one's": (
        "row = block_index() % p.tiles * MlaTile::ROWS", "row = 0", SOMEHOW),
    "all splits in one place": (
        "* p.splits + w.split) * all + m", "* p.splits) * all + m", "nothing orders the two"),
    "splits not weighted": (
        "const float weight = exp2_of(load_written(p.partial_lse + at) - zero);",
        "const float weight = 1.0f;", WRONG),
}  # fmt: skip
FP8_BUGS = {
    "no wait for a free buffer": ("    ring.wait_empty();\n    for", "    for", SOMEHOW),
    "unpacked tokens not fenced": (UNPACKED, UNPACKED.split("\n")[1], UNFENCED),
    "tokens announced before they are all there": (
        "at < MlaTile::TOKENS; at += 32", "at < MlaTile::TOKENS - 32; at += 32", SOMEHOW),
    "buffers not taken in turn": (
        "(&ring.full[ring.stage]);\n    ring.next();", "(&ring.full[ring.stage]);", SOMEHOW),
    "scale of another block": ("rounded_up(scales[j])", "rounded_up(scales[0])", WRONG),
    "ratio of another token": ("(chunk * MlaTile::TOKENS + at) * 4", "(chunk * MlaTile::TOKENS + "
                               "(at ^ 1)) * 4", WRONG),
    "ratio of another block in the scores": ("ratios + j * MlaTile::TOKENS * 4", "ratios", WRONG),
    "ratio of another block in the values": ("group * 2 * MlaTile::TOKENS * 4", "0", WRONG),
    "ratio of the other tokens": (
        "weight, ratios + mine * 4", "weight, ratios + others * 4", WRONG),
    "RoPE a chunk off": ("from + 33 + chunk", "from + 32 + chunk", WRONG),
    "RoPE left out of the scores": (
        "keys, MlaTile::COLUMNS - 1);", "keys, MlaTile::COLUMNS - 2);", WRONG),
    "halves of 16 codes the same way round": ("turned ? 1 - half : half", "half", WRONG),
    "not swizzled": ("(to ^ swizzle) * 16", "to * 16", WRONG),
    "no zeros for absent tokens": (PUT, PUT + "    if (!token.there) return;\n", WRONG),
    "absent tokens seen": ("token.there ? at : ABSENT", "at", WRONG),
    "pages of the tokens before": ("w, token + 16)", "w, token)", WRONG),
    "a scale of 0 divided by": ("scale == 0.0f ? 1.0f : ", "", WRONG),
    "no wait for a block's scores": (
        "    wgmma_wait<0>();\n    add_block", "    add_block", SOMEHOW),
    "what rounding added not counted": ("(total + excess[b])", "total", WRONG),
    "what rounding added not brought to the new maximum": (
        "rows.excess[0][half] *= shrink[half];", "rows.excess[0][half] *= 100 * shrink[half];",
        WRONG),
}  # fmt: skip


def bf16_cases(generator) -> list[tuple]:
    """A whole tile of rows; few rows; two splits; two tiles of rows."""
    cases = []
    for size in ({"lengths": (330, 700), "H": 32, "page": 128},
                 {"lengths": (200, 65, 1), "H": 5, "page": 16},
                 {"lengths": (600, 70), "H": 3, "page": 64},
                 {"lengths": (130, 10), "H": 40, "page": 64}):  # fmt: skip
        q, cache, table, *rest = operands(generator, Sq=2, **size)
        q[:, :, 0] *= 30  # maxima that move from tile to tile, in some rows
        table[:2, 1] = -1
        cases.append((q, cache, table, *rest))
    return cases


def fp8_cases(generator) -> list[tuple]:
    """The same; some with scales from 2**-8 to 2**8 or 0; and single tokens in the worst scale."""
    cases = []
    for size in ({"lengths": (330, 700), "H": 32, "page": 128},
                 {"lengths": (200, 65, 1), "H": 5, "page": 16}):  # fmt: skip
        q, cache, table, *rest = operands(generator, Sq=2, **FP8, **size)
        q[:, :, 0] *= 30
        table[:2, 1] = -1
        if size["page"] == 128:
            scale = scales_of(cache)
            scale *= torch.exp2(3 * torch.randn(scale.shape, generator=generator).clamp(-2.6, 2.6))
            scale[:, ::9, :, 1] = 0
        cases.append((q, cache, table, *rest))
    alone = operands(generator, lengths=(1,) * 4, H=3, **FP8)
    scales_of(alone[1])[alone[2][:, 0], 0] = WORST_SCALE
    return [*cases, alone]


def looked_for(mla, cases: list[tuple]) -> None:
    """Raises what the emulator or a comparison finds."""
    want = [deepkern.reference.mla_decode(*args) for args in cases]
    for seed in range(20):
        for args, exact in zip(cases, want, strict=True):
            order = ("random", "earliest", "latest")[seed % 3]
            for mine, other in zip(mla(*args, seed=seed, order=order), exact, strict=True):
                compare.assert_close(mine, other)


def caught(mla, cases: list[tuple]) -> str:
    """How the bug shows, or nothing."""
    try:
        looked_for(mla, cases)
    except EmulatorFailure as failure:
        return str(failure)
    except compare.Mismatch:
        return WRONG
    return ""


def with_bug(right: str, wrong: str) -> dict[str, str]:
    """All sources, `wrong` in the one file that has `right`."""
    whole = sources()
    has_it = [name for name in KERNELS if right in whole[name]]
    assert len(has_it) == 1, f"{right!r} stands in {has_it}: plant another bug"
    return whole | {has_it[0]: whole[has_it[0]].replace(right, wrong)}


@pytest.mark.slow
@pytest.mark.parametrize("name", BUGS)
def test_is_caught(name, generator):
    right, wrong, how = BUGS[name]
    found = caught(mla_of(build(with_bug(right, wrong))), bf16_cases(generator))
    assert re.search(how, found, re.DOTALL), f"expected {how!r}, found {found!r}"


@pytest.mark.slow
@pytest.mark.parametrize("name", FP8_BUGS)
def test_is_caught_over_an_fp8_cache(name, generator):
    right, wrong, how = FP8_BUGS[name]
    found = caught(mla_of(build(with_bug(right, wrong))), fp8_cases(generator))
    assert re.search(how, found, re.DOTALL), f"expected {how!r}, found {found!r}"


@pytest.mark.slow
@pytest.mark.parametrize("cases", [bf16_cases, fp8_cases])
def test_no_bug_is_found_where_none_is(emulated_mla, cases, generator):
    assert caught(emulated_mla, cases(generator)) == ""
