"""The main job, `python -m bench`: checks, timings, the model, the first screen and the report."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

import deepkern

from . import ceilings, machine, plot, results, summary, timings
from .command_line import bar, screen
from .models import checkpoint
from .op import begin, check_ops, time_all
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
    console, device = console or screen(), machine.device()
    ops = sorted(deepkern.OPS) if ops is None else ops
    record = begin(console, keep, folder)
    if ops:
        record.checked = check_ops(console, ops, backends)
        console.print(summary.agreement(record.found()))
        record.save()
    if ops and speed:
        request = timings.Request(device, ceilings.measure(device), seconds=seconds)
        time_all(console, {"default": timings.plan(ops, device)}, request, record)
        console.print(summary.speed(summary.of_kind(record.found(), "speed")))
        record.save()
    if model:
        record.model = run_model(console, weights)
        console.print(summary.model(record.model))
    code = record.finish(console)
    if record.rows:
        plot.draw(record.about, record.checked, record.rows, record.file.with_suffix(".png"))
    report.run([record.file], page, console)
    return code
