"""The main job and its parts: checks, timings, the model, the report and the results file."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

import deepkern

from . import checks, language_model, machine, plot, report, results, timings
from .command_line import bar, screen


def check_ops(console: Console, ops: list[str]) -> list[checks.Check]:
    """Checks every op on every backend of this machine, at its small sizes."""
    jobs, checked = checks.plan(ops), []
    with bar(console, "checking", len(jobs)) as step:
        for op, backend in jobs:
            step(f"{op} on {backend}")
            checked += checks.check(op, backend, machine.device())
    return checked


def time_ops(
    console: Console, ops: list[str], checked: list[checks.Check], seconds: float
) -> list[timings.Speed]:
    """Times every op and its PyTorch baselines; skips an op whose check failed."""
    jobs = timings.plan(ops, machine.device())
    failed = {(c.op, c.backend) for c in checked if c.ok is False}
    speeds = []
    with bar(console, "timing", len(jobs)) as step:
        for speed in timings.time_all(jobs, failed, seconds):
            speeds.append(speed)
            step(f"{speed.op} {speed.size}")
    return speeds


def run_model(console: Console, path: Path) -> list[dict]:
    """The checkpoint's figures, or one failed record if it cannot be loaded or run."""
    with bar(console, "model", len(language_model.STEPS)) as step:
        try:
            return language_model.run(path, step)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            return [language_model.record("the model runs", 0.0, "", False, reason)]


def run(
    ops: list[str] | None = None,
    model: bool = True,
    seconds: float = 0.3,
    keep: bool = False,
    folder: Path = results.FOLDER,
    checkpoint: Path = language_model.CHECKPOINT,
    console: Console | None = None,
) -> int:
    """Checks and times `ops` (all by default), runs the model; 1 if any check fails, else 0."""
    console, start = console or screen(), time.monotonic()
    ops = sorted(deepkern.OPS) if ops is None else ops
    about = machine.describe()
    console.print(report.machine(about))
    records: list[dict] = [{"kind": "machine", **about}]
    checked = check_ops(console, ops)
    speeds = time_ops(console, ops, checked, seconds)
    records += [c.record() for c in checked] + [s.record() for s in speeds]
    if ops:
        console.print(report.checked(checked), report.timed(speeds))
        console.print(report.ROOF, style="dim")
    if model:
        model_records = run_model(console, checkpoint)
        records += model_records
        console.print(report.model(model_records))
    wrong = report.failures(records)
    elapsed = round(time.monotonic() - start, 1)
    records.append({"kind": "verdict", "disagreements": len(wrong), "seconds": elapsed})
    report.verdict(console, records)
    file = results.path(about, keep, folder)
    results.write(records, file)
    written = [str(file)]
    if ops:
        plot.draw(about, checked, speeds, file.with_suffix(".png"))
        written.append(file.with_suffix(".png").name)
    console.print(
        f"{elapsed:.0f} s; written: {', '.join(written)}", soft_wrap=True, highlight=False
    )
    return 1 if wrong else 0
