"""The committed figures of what every op executes, and their checks; `python -m bench profile`.

`profiles.json` has, for each op and target, the counts of one call at the size in SIZES under the
pinned Triton, and the shares of the roof that follow from them. The counts are exact and do not
depend on the schedule, so a difference is a change of the compiled code.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import triton
import typer

from . import limits, profile, profile_table, shapes
from .budgets import PINNED
from .command_line import bar, screen
from .listing import Listing
from .pages import profile as profile_page
from .profile import Profile
from .results import write_text

FILE = Path(__file__).parent / "profiles.json"
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120")
COUNTS = ("instructions", "sectors", "conflicts", "flops")
SLACK = 0.02  # of a count

_FP8 = torch.float8_e4m3fn
_MOE = {"topk": 2, "K": 512, "none": 0.0}
# One size per op with whole tiles, a second or less on the machine.
SIZES: dict[str, dict] = {
    "cast_back": {"N": 128, "K": 1024},
    "cast_per_block": {"N": 128, "K": 1024},
    "cast_per_channel": {"M": 128, "K": 1024},
    "cast_per_token": {"M": 32, "K": 2048},
    "expert_combine": {"T": 16, **_MOE},
    "expert_combine_backward": {"T": 16, **_MOE},
    "expert_dispatch": {"T": 32, "E": 16, "dtype": _FP8, **_MOE},
    "expert_dispatch_backward": {"T": 16, **_MOE},
    "expert_load": {"T": 512, "E": 256, "topk": 8},
    "fp8_gemm_nt": {"M": 128, "N": 256, "K": 512},
    "gemm_nt": {"M": 128, "N": 256, "K": 256},
    "hadamard_cast": {"M": 64, "N": 128},
    "hadamard_transform": {"M": 64, "N": 128},
    "indexer_cache_append": {"T": 32},
    "k_grouped_fp8_gemm_nt": {"M": 256, "N": 256, "K": 512, "G": 2, "equal": True},
    "m_grouped_fp8_gemm_nt_contiguous": {"G": 2, "M": 256, "N": 256, "K": 512, "skipped": 0},
    "m_grouped_fp8_gemm_nt_masked": {"G": 2, "M": 64, "N": 256, "K": 512, "expected_m": 64},
    "m_grouped_gemm_nt_contiguous": {"G": 2, "M": 256, "N": 256, "K": 256, "skipped": 0},
    "merge_states": {"lead": (4,), "S": 1, "H": 16, "D": 512, "empty": False},
    "merge_states_backward": {"lead": (4,), "S": 1, "H": 16, "D": 512, "empty": False},
    "mla_cache_append": {"T": 32},
    "mla_cache_gather": {"lengths": (128, 128)},
    "mla_decode": {"lengths": (512,), "H": 16},
    "mla_prefill": {"lengths": (256,), "H": 1},
    "mla_prefill_backward": {"lengths": (256,), "H": 1},
    "mla_sparse_decode": {"B": 1, "topk": 256, "tokens": 512},
    "mla_sparse_prefill": {"S": 2, "Skv": 512, "topk": 256},
    "mla_sparse_prefill_backward": {"S": 1, "Skv": 256, "topk": 128},
    "moe_forward": {"T": 32, "E": 4, "I": 256, **_MOE},
    "moe_forward_backward": {"T": 32, "E": 4, "I": 256, **_MOE},
    "mqa_logits": {"S": 64, "Skv": 256},
    "paged_mqa_logits": {"lengths": (256,), "next_n": 1},
    "rmsnorm_cast": {"M": 16, "K": 2048, "residual": True},
    "route_topk": {"T": 32, "E": 256, "topk": 8, "num_groups": 8, "topk_groups": 4, "scale": 2.5},
    "route_topk_backward": {"T": 32, "E": 256, "scale": 2.5},
    "sequence_balance_loss": {"B": 1, "S": 128, "E": 256, "topk": 8},
    "sequence_balance_loss_backward": {"B": 1, "S": 128, "E": 256, "topk": 8},
    "swiglu": {"M": 32, "I": 1024},
    "swiglu_cast": {"M": 32, "I": 1024},
    "swiglu_cast_backward": {"M": 32, "I": 1024, "fp8": True, "weighted": True},
    "topk_indices": {"S": 1, "N": 8192, "k": 512},
    "update_expert_bias": {"E": 256},
}


def load(file: Path = FILE) -> dict[tuple[str, str], dict]:
    """(op, target) -> figures."""
    if not file.exists():
        return {}
    tree = json.loads(file.read_text())
    return {(op, target): f for op, targets in tree.items() for target, f in targets.items()}


def write(figures: dict[tuple[str, str], dict], file: Path = FILE) -> None:
    """Writes all figures, sorted, one op and target per line."""
    tree: dict[str, list[str]] = {}
    for (op, target), figure in sorted(figures.items()):
        tree.setdefault(op, []).append(f"  {json.dumps(target)}: {json.dumps(figure)}")
    ops = [f" {json.dumps(op)}: {{\n" + ",\n".join(rows) + "\n }" for op, rows in tree.items()]
    write_text("{\n" + ",\n".join(ops) + "\n}\n", file)


def measure(op: str, target: str) -> dict:
    """The figures of one op on one target."""
    return figures_of(profile.run(op, target, SIZES[op]))


def figures_of(report: Profile) -> dict:
    launches = report.launches
    conflicts = sum(x.total("wavefronts") - x.total("least_wavefronts") for x in launches)
    times = report.times()
    slowest = max(times, key=lambda t: max(t.values()), default={})
    return {
        "launches": len(launches),
        "instructions": sum(x.total("issued") for x in launches),
        "sectors": sum(x.total("sectors") for x in launches),
        "conflicts": conflicts,
        "flops": sum(x.total("flops") for x in launches),
        "useful_flops": report.cost.flops,
        "bytes_per_least": round(moved(report) / max(report.cost.bytes, 1), 2),
        "bound": round(report.bound, 4),
        "predicted": round(report.predicted, 4),
        "binding": profile.binding(slowest),
    }


def moved(report: Profile) -> int:
    """Bytes of the distinct sectors that the launches read and write."""
    return limits.SECTOR * sum(x.sectors_read + x.sectors_written for x in report.launches)


def problems(figures: dict, committed: dict | None) -> list[str]:
    """What got worse, and what is stale, in fresh figures against the committed ones."""
    if committed is None:
        return ["has no figures: run `python -m bench profile --write-figures`"]
    wrong = []
    for name in COUNTS:
        now, then = figures[name], committed[name]
        if now > then * (1 + SLACK):
            wrong.append(f"{name}: {now:,}, committed {then:,}")
        elif now < then * (1 - SLACK):
            wrong.append(f"{name}: {now:,}, better than the committed {then:,}: the figures are "
                         "stale, run `python -m bench profile --write-figures`")  # fmt: skip
    return wrong


def run(ops: list[str], targets: list[str], check: bool, fresh: bool) -> int:
    """Measures all; prints a table; compares with the committed figures or rewrites them."""
    console = screen()
    committed = load()
    measured: dict[tuple[str, str], dict] = {}
    with bar(console, "profiling", len(ops) * len(targets)) as step:
        for op in ops:
            for target in targets:
                measured[op, target] = measure(op, target)
                step(f"{op} {target}")
    console.print(table(measured))
    if fresh:
        write({**committed, **measured})
        console.print(f"figures written to {FILE}")
        return 0
    if triton.__version__ != PINNED:
        console.print(f"not compared: the figures are of Triton {PINNED}")
        return 0
    wrong = {key: problems(f, committed.get(key)) for key, f in measured.items()} if check else {}
    for (op, target), texts in wrong.items():
        for text in texts:
            console.print(f"{op} on {target}: {text}", style="red", markup=False, soft_wrap=True)
    return 1 if any(wrong.values()) else 0


def table(figures: dict[tuple[str, str], dict]) -> Listing:
    view = Listing("What the ops execute: tensor FLOP over the useful ones, bytes over the least")
    view.add_columns("target")
    view.add_columns("instructions", "sectors", "conflicts", "FLOP", "bytes", "bound", "predicted",
                     numeric=True)  # fmt: skip
    view.add_columns("binding limit")
    for (op, target), f in figures.items():
        useful = f["useful_flops"]
        tensor = f"{f['flops'] / useful:.2f}" if useful else ""
        view.add_row(target, *(f"{f[n]:,}" for n in COUNTS[:3]), tensor,
                     f"{f['bytes_per_least']:.2f}", f"{f['bound']:.1%}", f"{f['predicted']:.1%}",
                     limits.NAMES[f["binding"]] if f["binding"] else "", heading=op)  # fmt: skip
    return view


def report(
    op: str,
    targets: list[str],
    words: list[str],
    every: list[str],
    html: Path | None,
    out: Path | None,
) -> int:
    """Profiles one op and shows the report; writes it to files as HTML or JSON."""
    try:
        size = shapes.parse_size(op, words) if words else SIZES[op]
        sampled = {k: int(n) for k, n in (word.split("=") for word in every)}
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    found = profile.run(op, targets[0] if targets else "sm_90", size, sampled)
    console = screen()
    profile_table.show(console, found)
    if html is not None:
        write_text(profile_page.page(found), html)
    if out is not None:
        write_text(json.dumps(profile.record(found)) + "\n", out)
    return 0
