"""Profiles of the shapes that the goals name, on sm_90: `python -m bench.studies.goal_profiles
[OP or BACKEND ...]`.

Writes the table of docs/notes/profile.md. A large grid runs in part (every n-th cluster), and the
counts are scaled by the number of blocks: exact where all blocks do equal work. Where a shape is
too large for a CPU, its blocks are fewer and the same; the column "run as" says so.
"""

from __future__ import annotations

import gc
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from rich.markup import escape

from .. import limits, profile, profile_table
from ..command_line import screen
from ..profile import Profile
from ..results import write_text

OUT = Path(__file__).parents[2] / "docs" / "notes" / "profile.md"
BEGIN, END = "<!-- goal shapes -->", "<!-- end of goal shapes -->"
TARGET = "sm_90"
SMS = 132  # of an H200
_U8 = torch.uint8
_GEMM, _GROUPED = "fp8_gemm_nt_kernel", "m_grouped_fp8_gemm_nt_kernel"
_DECODE = {"mla_decode_kernel": 509, "mla_combine_splits_kernel": 1021}
_SPARSE_DECODE = {"B": 128, "Sq": 2, "H": 128, "topk": 2048, "tokens": 32768, "cache_dtype": _U8}
_SPARSE_PREFILL = {"S": 512, "Skv": 8192, "H": 128, "topk": 2048}

_BACKWARD = {f"mla_prefill_backward_{name}_kernel": 101 for name in ("delta", "dkv", "dq")}


class Goal(NamedTuple):
    op: str
    shape: str  # as the goals name it
    size: dict
    every: dict[str, int] = {}
    note: str = ""  # how the run differs from the goal
    backend: str = "triton"


def _hopper(op: str, shape: str, size: dict, note: str = "") -> Goal:
    """A goal of csrc/sm90, whose blocks are persistent: the first cluster runs."""
    return Goal(op, shape, size, {}, note, "cuda")


def _gemm(M: int, N: int, K: int) -> Goal:
    every = {_GEMM: 67} if M > 64 else {_GEMM: 41}
    return Goal("fp8_gemm_nt", f"{M} x {N} x {K}", {"M": M, "N": N, "K": K}, every)


GOALS = [
    _gemm(4096, 7168, 16384),
    _gemm(4096, 24576, 1536),
    _gemm(4096, 4096, 7168),
    _gemm(4096, 7168, 2048),
    _gemm(64, 7168, 16384),
    _gemm(16, 4096, 4096),
    _gemm(1, 4096, 4096),
    Goal("m_grouped_fp8_gemm_nt_contiguous", "4 x 8192, 4096 x 7168",
         {"G": 4, "M": 8192, "N": 4096, "K": 7168, "skipped": 0}, {_GROUPED: 67}, "4 x 2048 rows"),
    Goal("m_grouped_fp8_gemm_nt_masked", "4 x 256, 4096 x 7168",
         {"G": 4, "M": 256, "N": 4096, "K": 7168, "expected_m": 256}, {_GROUPED: 67}),
    Goal("k_grouped_fp8_gemm_nt", "4 groups, 4096 x 7168 x 32768",
         {"M": 4096, "N": 7168, "K": 32768, "G": 4, "equal": True},
         {"k_grouped_fp8_gemm_nt_kernel": 131}),
    Goal("cast_per_token", "4096 x 7168", {"M": 4096, "K": 7168}, {"cast_per_token_kernel": 97}),
    Goal("cast_per_block", "4096 x 7168", {"N": 4096, "K": 7168}, {"cast_per_block_kernel": 97}),
    Goal("cast_per_channel", "4096 x 7168", {"M": 4096, "K": 7168},
         {"cast_per_channel_kernel": 97}),
    Goal("cast_back", "4096 x 7168", {"N": 4096, "K": 7168}, {"cast_back_kernel": 97}),
    Goal("swiglu_cast", "4096 x 2048", {"M": 4096, "I": 2048}, {"swiglu_cast_kernel": 97}),
    Goal("rmsnorm_cast", "4096 x 7168", {"M": 4096, "K": 7168, "residual": True},
         {"rmsnorm_cast_kernel": 97}),
    Goal("expert_dispatch", "4096 tokens, 256 experts, FP8",
         {"T": 512, "E": 256, "topk": 8, "K": 7168, "dtype": torch.float8_e4m3fn, "none": 0.0}, {},
         "512 tokens"),
    Goal("expert_combine", "4096 tokens x 8, 7168", {"T": 4096, "topk": 8, "K": 7168, "none": 0.0},
         {"expert_combine_kernel": 97}),
    Goal("mla_decode", "B 128, H 128, 8K, bf16", {"lengths": (8192,), "batch": 128, "H": 128},
         _DECODE),
    Goal("mla_decode", "B 128, H 16, 4K, bf16", {"lengths": (4096,), "batch": 128, "H": 16},
         _DECODE),
    Goal("mla_decode", "B 128, H 16, 4K, FP8",
         {"lengths": (4096,), "batch": 128, "H": 16, "cache_dtype": _U8}, _DECODE),
    Goal("mla_sparse_decode", "B 128, topk 2048, FP8", _SPARSE_DECODE,
         {"mla_sparse_attention_kernel": 131}),
    Goal("mla_sparse_prefill", "4096 queries, H 128, topk 2048", _SPARSE_PREFILL,
         {"mla_sparse_attention_kernel": 257}, "512 queries"),
    Goal("mla_prefill", "8K causal, H 128", {"lengths": (8192,), "H": 16},
         {"mla_prefill_kernel": 101}, "16 heads; unequal blocks: every 101st"),
    Goal("mla_prefill_backward", "8K causal, H 128", {"lengths": (8192,), "H": 16},
         _BACKWARD, "16 heads; unequal blocks: every 101st"),
    Goal("mqa_logits", "4096 x 32K", {"S": 512, "Skv": 8192}, {"mqa_logits_kernel": 61},
         "512 x 8K"),
    Goal("topk_indices", "2048 of 32K", {"S": 1, "N": 32768, "k": 2048}),
    Goal("moe_forward", "128 tokens, 256 experts",
         {"T": 4, "E": 8, "topk": 8, "K": 7168, "I": 2048, "none": 0.0}, {_GROUPED: 37},
         "8 experts with 4 tokens each"),
    Goal("moe_forward", "2048 tokens, 256 experts",
         {"T": 64, "E": 8, "topk": 8, "K": 7168, "I": 2048, "none": 0.0}, {_GROUPED: 37},
         "8 experts with 64 tokens each"),
    *(_hopper("fp8_gemm_nt", f"{M} x {N} x {K}", {"M": M, "N": N, "K": K})
      for M, N, K in ((4096, 7168, 16384), (4096, 24576, 1536), (4096, 4096, 7168),
                      (4096, 7168, 2048), (64, 7168, 16384), (16, 4096, 4096), (1, 4096, 4096))),
    _hopper("m_grouped_fp8_gemm_nt_contiguous", "4 x 8192, 4096 x 7168",
            {"G": 4, "M": 8192, "N": 4096, "K": 7168, "skipped": 0}, "4 x 2048 rows"),
    _hopper("m_grouped_fp8_gemm_nt_masked", "4 x 256, 4096 x 7168",
            {"G": 4, "M": 256, "N": 4096, "K": 7168, "expected_m": 256}),
    _hopper("k_grouped_fp8_gemm_nt", "4 groups, 4096 x 7168 x 32768",
            {"M": 4096, "N": 7168, "K": 32768, "G": 4, "equal": True}),
    _hopper("mla_decode", "B 128, H 128, 8K, bf16",
            {"lengths": (8192,), "batch": 128, "H": 128}),
    _hopper("mla_decode", "B 128, H 16, 4K, bf16", {"lengths": (4096,), "batch": 128, "H": 16}),
    _hopper("mla_decode", "B 128, H 16, 4K, FP8",
            {"lengths": (4096,), "batch": 128, "H": 16, "cache_dtype": _U8}),
    _hopper("mla_sparse_decode", "B 128, topk 2048, FP8", _SPARSE_DECODE),
    _hopper("mla_sparse_prefill", "4096 queries, H 128, topk 2048", _SPARSE_PREFILL,
            "512 queries"),
    _hopper("mla_prefill", "8K causal, H 128", {"lengths": (8192,), "H": 16}, "16 heads"),
    _hopper("mla_prefill_backward", "8K causal, H 128", {"lengths": (8192,), "H": 16},
            "16 heads"),
]  # fmt: skip


def causes(report: Profile) -> str:
    """What is behind the longest limit of the launch that takes longest, in numbers."""
    times = report.times()
    index = max(range(len(times)), key=lambda i: max(times[i].values()))
    launch, seconds = report.launches[index], times[index]
    found = []
    flops = sum(x.total("flops") * x.scale for x in report.launches)
    if report.cost.flops and flops > 1.05 * report.cost.flops:
        found.append(f"{flops / report.cost.flops:.2f}x the tensor FLOPs")
    passes, least = launch.total("wavefronts"), launch.total("least_wavefronts")
    if passes > 1.1 * least:
        found.append(f"{passes / least:.2f}x shared passes (conflicts)")
    accesses = [x for x in profile.accesses(launch) if x.used < 0.75]
    loose = sum(x.sectors for x in accesses) / max(launch.total("sectors"), 1)
    if loose > 0.1:
        found.append(f"{loose:.0%} of sectors partly used ({accesses[0].location})")
    ranked = sorted(seconds, key=lambda name: -seconds[name])[:3]
    top = ", ".join(f"{name} {profile_table.microseconds(seconds[name])}" for name in ranked)
    kinds = profile.by_kind(launch)
    total = sum(kinds.values())
    mix = ", ".join(f"{k} {n / total:.0%}" for k, n in list(kinds.items())[:3])
    return "; ".join([f"{short_name(launch.kernel)}: {top}", *found, mix])


def short_name(kernel: str) -> str:
    """The function of a mangled C++ name in namespace sm90; other names as they are."""
    found = re.match(r"_ZN4sm90(\d+)(.*)", kernel)
    return found[2][: int(found[1])] if found else kernel


def row(goal: Goal, report: Profile) -> str:
    times = report.times()
    slowest = max(times, key=lambda t: max(t.values()))
    cells = (
        f"`{goal.op}`", goal.backend, goal.shape, f"{report.predicted:.0%}", f"{report.bound:.0%}",
        profile_table.microseconds(report.roof),
        "the roof" if report.predicted > 0.99 else limits.NAMES[profile.binding(slowest)],
        causes(report), goal.note,
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def key(row: str) -> tuple[str, ...]:
    """The op, the backend and the shape of a row of the table."""
    return tuple(cell.strip() for cell in row.split("|")[1:4])


def predicted(row: str) -> tuple[int, str]:
    """The predicted share of a row, for the order of rows."""
    return int(row.split("|")[4].strip().rstrip("%")), row


def main() -> None:
    console, rows, failures = screen(), [], 0
    for goal in GOALS:
        if len(sys.argv) > 1 and not {goal.op, goal.backend} & set(sys.argv[1:]):
            continue
        began = time.monotonic()
        try:
            if goal.backend == "cuda":
                report = profile.run_hopper(goal.op, goal.size, every=SMS)
            else:
                report = profile.run(goal.op, TARGET, goal.size, goal.every)
        except Exception as error:
            console.print(f"{goal.op} {goal.shape}: {type(error).__name__}: {error}"[:600])
            failures += 1
            continue
        rows.append((report.predicted, row(goal, report)))
        seconds = time.monotonic() - began
        console.print(escape(f"{rows[-1][1]} {seconds:.0f} s"), soft_wrap=True)
        del report
        gc.collect()
    if failures:
        sys.exit(f"{failures} goal shapes failed: {OUT.name} is unchanged")
    if rows:
        before, rest = OUT.read_text().split(BEGIN)
        kept = {key(line): line for line in rest.split(END)[0].splitlines() if "`" in line}
        kept |= {key(text): text for _, text in rows}
        head = ("| op | backend | shape | predicted | bound | roof | binding limit | counts "
                "| run as |\n|---|---|---|--:|--:|--:|---|---|---|")  # fmt: skip
        body = "\n".join(sorted(kept.values(), key=predicted))
        write_text(f"{before}{BEGIN}\n{head}\n{body}\n{END}{rest.split(END)[1]}", OUT)


if __name__ == "__main__":
    main()
