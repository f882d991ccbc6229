"""`python -m bench op`: checks ops, then times them and other implementations of the same."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import typer
from rich.console import Console

from deepkern.runtime.backends import BACKENDS
from deepkern.testing import providers

from . import ceilings, checks, machine, report, results, shapes, summary, timings
from .ceilings import Ceilings
from .command_line import bar, screen, without_interrupts
from .timings import Request, Row

JOBS_PER_PROCESS = 10  # a process takes a few seconds to start
MOST_PROCESSES = 8  # each has memory of the GPU


def check_ops(
    console: Console, ops: Sequence[str], backends: Collection[str] | None = None
) -> list[checks.Check]:
    """Checks every op at its small sizes on every backend of this machine, or on `backends`."""
    jobs = [(op, name) for op, name in checks.plan([*ops]) if backends is None or name in backends]
    checked: list[checks.Check] = []
    with bar(console, "checking", len(jobs)) as step:
        for (op, backend), found in zip(jobs, _check_all(jobs), strict=True):
            step(f"{op} on {backend}")
            checked += found
    return checked


def _check_all(jobs: Sequence[tuple[str, str]]) -> Iterator[list[checks.Check]]:
    """The checks of each job, in order; many jobs run in a process per core."""
    processes = min(os.cpu_count() or 1, MOST_PROCESSES, len(jobs) // JOBS_PER_PROCESS)
    if processes < 2:
        yield from map(_check_job, jobs)
        return
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // processes)
    with ProcessPoolExecutor(processes, context, torch.set_num_threads, (threads,)) as pool:
        try:
            with without_interrupts():  # Ctrl-C ends the processes through the pool
                found = pool.map(_check_job, jobs)
            yield from found
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _check_job(job: tuple[str, str]) -> list[checks.Check]:
    return list(checks.check(*job, machine.device()))


def time_rows(
    console: Console,
    jobs: Sequence[tuple[str, dict]],
    checked: Sequence[checks.Check],
    request: Request,
) -> Iterator[Row]:
    """Times the rows of `jobs`, without backends that failed a check; says which do not fit."""
    failed = {(check.op, check.backend) for check in checked if check.ok is False}
    with bar(console, "timing", len(jobs)) as step:
        for op, size in jobs:
            try:
                row = timings.time_op(op, size, request, {name for o, name in failed if o == op})
            except shapes.TooLarge as reason:
                console.print(f"skipped: {op} {checks.text(size)}: {reason}", style="yellow")
                continue
            except torch.AcceleratorError:  # nothing runs on this GPU any more in this process
                raise
            except Exception as error:
                row = [*timings.failed_row(op, size, request, error)]
            step(f"{op} {checks.text(size)}")
            if row:
                yield row
            else:
                console.print(f"skipped: {op} {checks.text(size)}: no backend", style="yellow")


def with_best_roof(rows: Sequence[Row], rates: Ceilings) -> tuple[list[Row], Ceilings]:
    """The rows with the ceilings measured once more, after them; the larger ones count."""
    device = machine.device()
    rates = ceilings.best(rates, ceilings.measure(device))
    return [[timings.with_roof(speed, rates, device) for speed in row] for row in rows], rates


def plan(
    console: Console, names: Sequence[str], wanted: Sequence[str], device: torch.device
) -> dict[str, list[tuple[str, dict]]]:
    """The rows to time once each, by the name of their set; says which ops have none."""
    jobs: dict[str, list[tuple[str, dict]]] = {}
    planned: list[tuple[str, dict]] = []
    for name in wanted:
        for op in names:
            try:
                label, sizes = shapes.of(op, name, device)
            except shapes.NoShapes as reason:
                console.print(str(reason), style="yellow")
            except ValueError as error:
                raise typer.BadParameter(str(error)) from None
            else:
                new = [(op, size) for size in sizes if (op, size) not in planned]
                jobs.setdefault(label, []).extend(new)
                planned += new
    return jobs


@dataclass
class Record:
    """What a run has found so far; `save` writes all of it, so that a run that ends keeps it."""

    about: dict
    file: Path
    checked: list[checks.Check] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    model: list[dict] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)

    def found(self) -> list[dict]:
        speeds = [speed for row in self.rows for speed in row]
        return [*(x.record() for x in (*self.checked, *speeds)), *self.model]

    def save(self, *last: dict) -> None:
        results.write([{"kind": "machine", **self.about}, *self.found(), *last], self.file)

    def finish(self, console: Console) -> int:
        """Says what is wrong and where the results are: 1 if anything is wrong, else 0."""
        found, seconds = self.found(), round(time.monotonic() - self.start, 1)
        wrong = summary.failures(found)
        self.save({"kind": "verdict", "disagreements": len(wrong), "seconds": seconds})
        summary.verdict(console, found)
        console.print(f"{seconds:.0f} s; results: {self.file}", soft_wrap=True, highlight=False)
        return 1 if wrong else 0


def begin(console: Console, keep: bool, folder: Path) -> Record:
    """A record of this machine, which it prints."""
    about = machine.describe()
    console.print(summary.machine(about))
    return Record(about, results.path(about, keep, folder))


def time_all(
    console: Console, jobs: dict[str, list[tuple[str, dict]]], request: Request, record: Record
) -> Ceilings:
    """Times the rows of `jobs`, by set of shapes, and keeps each; the ceilings of all rows."""
    record.about["ceilings"] = request.ceilings.record()
    for label, given in jobs.items():
        for row in time_rows(console, given, record.checked, replace(request, shapes=label)):
            record.rows.append(row)
            record.save()
    record.rows, rates = with_best_roof(record.rows, request.ceilings)
    clocks = ceilings.clocks_under_load(request.device)
    record.about |= {"ceilings": rates.record(), "clocks": clocks}
    return rates


def known(kind: str, names: Sequence[str] | None, all_names: Collection[str]) -> None:
    """Raises typer.BadParameter for a name that is not one of `all_names`."""
    for name in names or ():
        if name not in all_names:
            raise typer.BadParameter(f"no {kind} {name!r}; there are {', '.join(all_names)}")


def run(
    names: Sequence[str],
    shape_sets: Sequence[str] = ("default",),
    backends: Sequence[str] | None = None,
    against: Sequence[str] | None = None,
    seconds: float = 0.3,
    keep: bool = False,
    folder: Path = results.FOLDER,
    console: Console | None = None,
) -> int:
    """Checks and times ops, prints a table for each, and writes the results.

    Args:
        names: ops.
        shape_sets: names of sets of shapes, or sizes such as "M=64,N=7168,K=2048" (bench.shapes).
        backends: those of deepkern to time; by default all kernels that serve the device.
        against: providers; by default all that are installed. Ratios are to the first one.
        seconds: for each provider and size.

    Returns 1 if a result of deepkern is wrong, 2 if there was nothing to do, else 0. A provider
    that differs has no time.
    """
    known("provider", against, providers.NAMES)
    known("backend", backends, BACKENDS)
    console, device = console or screen(), machine.device()
    record = begin(console, keep, folder)
    jobs = plan(console, names, shape_sets, device)
    rates = ceilings.measure(device)
    ops = list({op: 1 for row in jobs.values() for op, _ in row})
    record.checked = check_ops(console, ops, backends)
    chosen = (tuple(words) if words else None for words in (backends, against))
    rates = time_all(console, jobs, Request(device, rates, "", seconds, *chosen), record)
    if not record.rows and not record.checked:
        console.print("nothing was checked or timed", style="red")
        return 2
    tables = report.checked(record.checked), report.timed(record.rows, (against or ["eager"])[0])
    console.print(report.ceilings(rates), *tables)
    return record.finish(console)
