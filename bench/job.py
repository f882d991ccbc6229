"""The main job and its parts: check, time, run the model, print, and leave the figures behind."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

import deepkern

from . import checks, language_model, machine, plot, report, results, timings
from .progress import bar, screen


def check_ops(console: Console, ops: list[str]) -> list[checks.Check]:
    """Every op on every backend that serves here, at its small sizes."""
    jobs, found = checks.plan(ops), []
    with bar(console, "checking", len(jobs)) as step:
        for op, backend in jobs:
            step(f"{op} on {backend}")
            found += checks.check(op, backend, machine.device())
    return found


def time_ops(
    console: Console, ops: list[str], checked: list[checks.Check], seconds: float
) -> list[timings.Speed]:
    """Every op beside PyTorch, but none whose check failed."""
    jobs = timings.plan(ops, machine.device())
    failed = {(c.op, c.backend) for c in checked if c.ok is False}
    found = []
    with bar(console, "timing", len(jobs)) as step:
        for speed in timings.time_all(jobs, failed, seconds):
            found.append(speed)
            step(f"{speed.op} {speed.size}")
    return found


def run_model(console: Console, path: Path) -> list[dict]:
    """The checkpoint's figures; a record that fails if it cannot be loaded or run."""
    with bar(console, "model", len(language_model.STEPS)) as step:
        try:
            return language_model.run(path, step)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            return [language_model.record("the model runs", 0.0, "", False, why)]


def run(
    ops: list[str] | None = None,
    model: bool = True,
    seconds: float = 0.3,
    keep: bool = False,
    folder: Path = results.FOLDER,
    checkpoint: Path = language_model.CHECKPOINT,
    console: Console | None = None,
) -> int:
    """Checks and times `ops` (all by default), runs the model; 1 if anything disagrees, else 0."""
    console, start = console or screen(), time.monotonic()
    ops = sorted(deepkern.OPS) if ops is None else ops
    facts = machine.describe()
    console.print(report.machine(facts))
    records: list[dict] = [{"kind": "machine", **facts}]
    checked = check_ops(console, ops)
    speeds = time_ops(console, ops, checked, seconds)
    records += [c.record() for c in checked] + [s.record() for s in speeds]
    if ops:
        console.print(report.checked(checked), report.timed(speeds))
        console.print(report.ROOF, style="dim")
    if model:
        modelled = run_model(console, checkpoint)
        records += modelled
        console.print(report.model(modelled))
    wrong = report.failures(records)
    taken = round(time.monotonic() - start, 1)
    records.append({"kind": "verdict", "disagreements": len(wrong), "seconds": taken})
    report.verdict(console, records)
    file = results.path(facts, keep, folder)
    results.write(records, file)
    written = [str(file)]
    if ops:
        plot.draw(facts, checked, speeds, file.with_suffix(".png"))
        written.append(file.with_suffix(".png").name)
    console.print(f"{taken:.0f} s; written: {', '.join(written)}", soft_wrap=True, highlight=False)
    return 1 if wrong else 0
