"""The committed predictions of op times at V3's shapes: bench/predictions.json.

One record per op, target, backend and shape: the cost of the call, and the seconds that the
compiled kernels take at least by every limit of `bench.limits` except HBM, whose bandwidth differs
between GPUs of one target. `python -m bench.predictions [OP ...]` runs the goal shapes of
`bench.studies.goal_profiles`, and those below, on the PTX machine and rewrites the records.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path

import torch

from . import limits, profile
from .command_line import screen
from .profile import Profile
from .results import write_text
from .studies.goal_profiles import GOALS, SMS, Goal

FILE = Path(__file__).parent / "predictions.json"
TARGETS = ("sm_80", "sm_90")
_BF16 = torch.bfloat16
_GROUPED = {"G": 4, "M": 2048, "N": 4096, "K": 7168, "skipped": 0}
SHAPES = [
    *GOALS,
    Goal("gemm_nt", "4096 x 7168 x 2048", {"M": 4096, "N": 7168, "K": 2048},
         {"gemm_nt_kernel": 67}),
    Goal("gemm_nt", "64 x 7168 x 2048", {"M": 64, "N": 7168, "K": 2048}, {"gemm_nt_kernel": 41}),
    Goal("m_grouped_gemm_nt_contiguous", "4 x 2048, 4096 x 7168", _GROUPED,
         {"m_grouped_gemm_nt_kernel": 67}),
    Goal("swiglu", "4096 x 2048", {"M": 4096, "I": 2048}, {"swiglu_kernel": 97}),
    Goal("swiglu_cast_backward", "4096 x 2048", {"M": 4096, "I": 2048, "fp8": True},
         {"swiglu_cast_backward_kernel": 97}),
]  # fmt: skip
# Ops that no step calls, or only in another variant or with many more rows than the goal has.
UNUSED = ("topk_indices", "mqa_logits", "mla_sparse_decode", "mla_sparse_prefill", "moe_forward")


def load(file: Path = FILE) -> list[dict]:
    return json.loads(file.read_text()) if file.exists() else []


def write(records: list[dict], file: Path = FILE) -> None:
    """Writes all records, sorted, one per line."""
    rows = sorted(records, key=lambda r: (r["op"], r["target"], r["backend"], r["shape"]))
    write_text("[\n" + ",\n".join(f" {json.dumps(row)}" for row in rows) + "\n]\n", file)


def record(goal: Goal, report: Profile) -> dict:
    """One record. `seconds` is the sum over the launches of the longest limit other than HBM."""
    longest = [max(((t, n) for n, t in times.items() if n != "HBM"), default=(0.0, ""))
               for times in report.times()]  # fmt: skip
    return {
        "op": goal.op,
        "target": report.target,
        "backend": goal.backend,
        "shape": goal.shape,
        "bytes": report.cost.bytes,
        "flops": report.cost.flops,
        "fp8": report.cost.fp8,
        "seconds": float(f"{sum(t for t, _ in longest):.4g}"),
        "binding": limits.NAMES.get(max(longest, default=(0.0, ""))[1], ""),
    }


def measure(goal: Goal, target: str) -> dict:
    if goal.backend == "cuda":
        return record(goal, profile.run_hopper(goal.op, goal.size, every=SMS))
    return record(goal, profile.run(goal.op, target, goal.size, goal.every))


def main() -> None:
    console, chosen = screen(), sys.argv[1:]
    for target in TARGETS:
        for goal in SHAPES:
            if goal.op in UNUSED or (chosen and goal.op not in chosen):
                continue
            if goal.backend == "cuda" and target != "sm_90":
                continue
            began = time.monotonic()
            try:
                new = measure(goal, target)
            except Exception as error:
                console.print(f"{goal.op} {goal.shape} {target}: {error!r}"[:400], markup=False)
                continue
            key = ("op", "target", "backend", "shape")
            kept = [r for r in load() if any(r[k] != new[k] for k in key)]
            write([*kept, new])
            console.print(f"{time.monotonic() - began:.0f} s {new}", markup=False, soft_wrap=True)
            gc.collect()


if __name__ == "__main__":
    main()
