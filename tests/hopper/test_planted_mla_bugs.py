"""Every bug planted in mla_decode's kernels is caught: as in test_planted_bugs.py."""

from __future__ import annotations

import re

import pytest
import torch

import deepkern
from bench.emulator import sources
from deepkern.testing import compare

from .conftest import EmulatorFailure, mla_of, planted
from .test_mla_decode import CACHES, WORST_SCALE, operands, scales_of

FP8 = CACHES["fp8"]

KERNELS = tuple(f"sm90/{name}.cuh" for name in (
    "mla_decode", "mla_load", "mla_multiply", "mla_store", "mla_tile", "ring"))  # fmt: skip
WRONG = "wrong result"
SOMEHOW = "."  # a race: which of its consequences shows first is chance
UNFENCED = "no fence_async_proxy followed"
WAITS = "    pieces.wait_empty();\n    pieces.next();\n" * 2
NEXTS = "    pieces.next();\n" * 2
FENCE = "    fence_async_proxy();\n"
FILLED = "    barrier_arrive(full);\n    barrier_arrive(full + 1);\n  }\n"
READ = """    wgmma_wait<0>();
    if (lane_index() == 0) barrier_arrive(&pieces.empty[2 * tile + GROUP]);"""
OWN = "    scale_sums(sum, shrink);\n    add_own(pair, 1);\n"
# What is planted: what stands in the source, what in its place, how it is found out.
BUGS = {
    "no wait for a free buffer": (
        "    pieces.wait_empty();\n    if (from == 0", "    if (from == 0", SOMEHOW),
    "no wait for a free buffer to gather in": (
        WAITS + "#pragma unroll", NEXTS + "#pragma unroll", SOMEHOW),
    "page of another token": ("thread / 8 + i * 16);", "thread / 8);", WRONG),
    "no wait for the left columns": (
        "  barrier_wait(full, round);\n  wgmma_fence", "  wgmma_fence", SOMEHOW),
    "no wait for the right columns": (
        "  barrier_wait(full + 1, round);\n  wgmma_fence", "  wgmma_fence", SOMEHOW),
    "wrong parity": ("(&empty[stage], round ^ 1)", "(&empty[stage], round)", "deadlock"),
    "rounds not counted": ("a.even(first);\n      a.round ^= 1;", "a.even(first);", SOMEHOW),
    "buffer handed on before the values were read": (
        READ, "\n".join(reversed(READ.split("\n"))), SOMEHOW),
    "the other's piece handed on": (
        "empty[2 * tile + GROUP]", "empty[2 * tile + 1 - GROUP]", SOMEHOW),
    "no wait for the scores": (
        "LEFT_COLUMNS, true);\n  wgmma_commit();\n  wgmma_wait<0>();",
        "LEFT_COLUMNS, true);\n  wgmma_commit();", SOMEHOW),
    "three warps free a buffer": ("init(128, 4)", "init(128, 3)", SOMEHOW),
    "gathered rows not fenced": (FENCE + FILLED + "};", FILLED + "};", UNFENCED),
    "queries not waited for": (
        "  fence_async_proxy();\n  named_barrier_sync(1, 256);\n}", "  fence_async_proxy();\n}",
        SOMEHOW),
    "weights of the other tile not waited for": (
        "    named_barrier_sync(3 - GROUP, 256);\n", "", SOMEHOW),
    "weights of the other tile's other tokens": (
        "load_shared<Chunk>(weights + step", "load_shared<Chunk>(weights + (3 - step)", WRONG),
    "maximum of one tile alone": (
        "{load_shared<float>(tops), load_shared<float>(tops + 32)}", "{rows.top[0], rows.top[1]}",
        WRONG),
    "own maximum taken for the other's": (
        "((1 - GROUP) * MlaTile::ROWS + row)", "(GROUP * MlaTile::ROWS + row)", SOMEHOW),
    "sums of the other half not waited for": (
        "  named_barrier_sync(1, 256);\n  const int all", "  const int all", SOMEHOW),
    "sums stored where maxima are read": (
        "to = (1 - group) * MlaTile::ROWS", "to = group * MlaTile::ROWS", SOMEHOW),
    "sums not brought to the new maximum": (
        "sum[i / 64][i % 64] *= shrink[i / 2 % 2];", "sum[i / 64][i % 64] *= shrink[0];", WRONG),
    "sums scaled while values are added": (
        "    free(0);\n" + OWN, OWN + "    free(0);\n", SOMEHOW),
    "totals not brought to the new maximum": ("rows.total[half] *= shrink[half];", "", WRONG),
    "columns of the values interleaved": (
        "values + first * 128, MlaTile::COLUMN_BYTES", "values + first * 128, 4096", WRONG),
    "first tokens' values for all": ("(values + first * 128", "(values", WRONG),
    "absent tokens seen": ("from ? row : ABSENT", "row", WRONG),
    "absent tokens seen where many follow": (
        "{smaller(load_shared<int>(limits) - first, MlaTile::TOKENS)",
        "{load_shared<int>(limits) - first", WRONG),
    "tokens of a whole tile past the end": (
        "&& first + MlaTile::TOKENS <= w.end", "", SOMEHOW),
    "page's first tokens for all": ("page_rows) + token % p.page", "page_rows)", WRONG),
    "new tokens see each other": (
        "p.causal ? w.length - (p.Sq - 1 - query) : w.length", "w.length", WRONG),
    "fewer bytes announced": (
        "(to - from) * MlaTile::COLUMN_BYTES)", "(to - from) * MlaTile::COLUMN_BYTES - 1024)",
        SOMEHOW),
    "too many registers": ("FP8 ? 88 : 72", "FP8 ? 96 : 80", "deadlock"),
    "last tile left to one warpgroup": (
        "    if (first < w.end) a.odd_alone();\n", "", SOMEHOW),
    "rows of out not turned back": ("(chunk ^ (row % 8 * TURN))", "chunk", WRONG),
    "rows of out read before they are whole": ("  warp_sync();\n", "", SOMEHOW),
    "rows past the last stored": ("smaller(left, 16)", "16", SOMEHOW),
    "splits added up before they are there": (
        "  grid_dependency_wait();\n", "", "has not called grid_dependency_wait"),
    "splits read past caches that are up to date": (
        "load_written(p.partial_lse + at)", "load_global(p.partial_lse + at)",
        "load_global needs memory that no block writes"),
    "every tile of rows the first one's": (
        "row = block_index() % p.tiles * MlaTile::ROWS", "row = 0", SOMEHOW),
    "all splits in one place": (
        "* p.splits + w.split) * all + w.row", "* p.splits) * all + w.row",
        "the accesses are not synchronized"),
    "a split left out": ("i < cut.count; ++i) {", "i < cut.count - 1; ++i) {", WRONG),
    "splits not weighted": (
        "const float weight = exp2_of(load_written(p.partial_lse + at) - zero);",
        "const float weight = 1.0f;", WRONG),
}  # fmt: skip
FP8_BUGS = {
    "no wait for a free buffer": (WAITS + "    for (int at", NEXTS + "    for (int at", SOMEHOW),
    "no wait for the tokens": (
        "  barrier_wait(full, round);\n  barrier_wait(full + 1, round);\n", "", SOMEHOW),
    "unpacked tokens not fenced": (FENCE + FILLED + "}\n", FILLED + "}\n", UNFENCED),
    "tokens announced before they are all there": (
        "at < MlaTile::TOKENS; at += 32", "at < MlaTile::TOKENS - 32; at += 32", SOMEHOW),
    "scale of another block": ("step_of(scales[j])", "step_of(scales[0])", WRONG),
    "ratio of another token": (
        "(chunk * MlaTile::TOKENS + at) * 4", "(chunk * MlaTile::TOKENS + (at ^ 1)) * 4", WRONG),
    "ratios not divided by the next": (
        "chunk < MlaTile::BLOCKS - 1 ? divide(ratio, next) : ratio", "ratio", WRONG),
    "ratio of another block in the scores": (
        "(j * MlaTile::TOKENS + column) * 4);\n      score",
        "(3 * MlaTile::TOKENS + column) * 4);\n      score", WRONG),
    "ratio of another block in the values": (
        "const int b = j - 2 * GROUP;", "const int b = 1 - (j - 2 * GROUP);", WRONG),
    "last block's scores alone": ("2 * j, j > 0)", "2 * j, false)", WRONG),
    "no wait for a block's scores": (
        "    wgmma_commit();\n    wgmma_wait<0>();\n#pragma unroll",
        "    wgmma_commit();\n#pragma unroll", SOMEHOW),
    "RoPE a chunk off": ("from + 33 + chunk", "from + 32 + chunk", WRONG),
    "RoPE left out of the scores": (
        "MlaTile::COLUMNS - 1, true)", "MlaTile::COLUMNS - 2, true)", WRONG),
    "halves of 16 codes the same way round": ("turned ? 1 - half : half", "half", WRONG),
    "not swizzled": ("(to ^ swizzle) * 16", "to * 16", WRONG),
    "no zeros for absent tokens": (
        "      store_shared(row_of_column", "      if (step) store_shared(row_of_column", WRONG),
    "absent tokens seen": ("token.there ? at : ABSENT", "at", WRONG),
    "pages of the tokens before": ("w, token + 16)", "w, token)", WRONG),
    "a scale of 0 divided by": ("size > 0 && ", "", WRONG),
    "what rounding added not counted": ("total + sum_of_row(rows.excess[b][half])", "total", WRONG),
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
    with planted(with_bug(right, wrong)) as library:
        found = caught(mla_of(library), bf16_cases(generator))
    assert re.search(how, found, re.DOTALL), f"expected {how!r}, found {found!r}"


@pytest.mark.slow
@pytest.mark.parametrize("name", FP8_BUGS)
def test_is_caught_over_an_fp8_cache(name, generator):
    right, wrong, how = FP8_BUGS[name]
    with planted(with_bug(right, wrong)) as library:
        found = caught(mla_of(library), fp8_cases(generator))
    assert re.search(how, found, re.DOTALL), f"expected {how!r}, found {found!r}"


@pytest.mark.slow
@pytest.mark.parametrize("cases", [bf16_cases, fp8_cases])
def test_no_bug_is_found_where_none_is(emulated_mla, cases, generator):
    assert caught(emulated_mla, cases(generator)) == ""
