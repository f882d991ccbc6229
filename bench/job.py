"""The main job, `python -m bench`: checks, timings, the model, the first screen and the report."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

import deepkern

from . import ceilings, machine, plot, results, summary, timings
from .command_line import bar, screen
from .models import checkpoint
from .op import check_ops, time_rows, with_best_roof
from .pages import report


def run_model(console: Console, path: Path) -> list[dict]:
    """The checkpoint's figures, or one failed record if it cannot be loaded or run."""
    with bar(console, "model", len(checkpoint.STEPS)) as step:
        try:
            return checkpoint.run(path, step)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            return [checkpoint.record("the model runs", 0.0, "", False, reason)]


def run(
    ops: list[str] | None = None,
    backends: list[str] | None = None,
    speed: bool = True,
    model: bool = True,
    seconds: float = 0.3,
    keep: bool = False,
    folder: Path = results.FOLDER,
    weights: Path = checkpoint.CHECKPOINT,
    page: Path = report.OUT,
    console: Console | None = None,
) -> int:
    """Checks and times `ops` (all by default), runs the model; 1 if any check fails, else 0.

    backends: those to check; all of this machine by default.
    """
    console, start = console or screen(), time.monotonic()
    ops = sorted(deepkern.OPS) if ops is None else ops
    about = machine.describe()
    console.print(summary.machine(about))
    checked, rows = check_ops(console, ops, backends), []
    records = [c.record() for c in checked]
    if ops:
        console.print(summary.agreement(records))
    if ops and speed:
        device = machine.device()
        rates = ceilings.measure(device)
        request = timings.Request(device, rates, seconds=seconds)
        rows, rates = with_best_roof(
            list(time_rows(console, timings.plan(ops, device), checked, request)), rates
        )
        about |= {"ceilings": rates.record(), "clocks": ceilings.clocks_under_load(device)}
        speeds = [speed.record() for row in rows for speed in row]
        console.print(summary.speed(speeds))
        records += speeds
    if model:
        records += run_model(console, weights)
        console.print(summary.model(summary.of_kind(records, "model")))
    wrong = summary.failures(records)
    elapsed = round(time.monotonic() - start, 1)
    summary.verdict(console, records)
    file = results.path(about, keep, folder)
    verdict = {"kind": "verdict", "disagreements": len(wrong), "seconds": elapsed}
    results.write([{"kind": "machine", **about}, *records, verdict], file)
    console.print(f"{elapsed:.0f} s; results: {file}", soft_wrap=True, highlight=False)
    if rows:
        plot.draw(about, checked, rows, file.with_suffix(".png"))
    report.run([file], page, console)
    return 1 if wrong else 0
