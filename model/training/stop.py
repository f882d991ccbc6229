"""The loop of a run that saves its steps and stops on a signal.

for row in saved_steps(run):
    print(row["main"])
"""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from model.training.processes import process_group
from model.training.run import Run
from model.training.state import save

TORCHRUN_SECONDS = 1.0  # torchrun repeats a signal of the terminal to its processes at once


@contextmanager
def stop_requested() -> Iterator[Callable[[], str | None]]:
    """Catches SIGTERM and SIGINT; yields a function that returns the signal's name, or None.

    Every process calls the function after each step: a signal to one stops all.  A second signal
    ends the process at once; one within a second of the first is ignored, because torchrun repeats
    the signals of a terminal.

        with stop_requested() as stopping:
            for row in run.steps():
                if stopping():
                    break
    """
    received: list[tuple[int, float]] = []

    def handle(number: int, _: FrameType | None) -> None:
        if not received:
            received.append((number, time.monotonic()))
            text = f"\n{signal.Signals(number).name}: the running step ends and is saved; a second"
            os.write(2, f"{text} signal ends at once\n".encode())
        elif time.monotonic() - received[0][1] > TORCHRUN_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def stopping() -> str | None:
        number = torch.tensor(received[0][0] if received else 0)
        if dist.is_initialized():
            dist.all_reduce(number, dist.ReduceOp.MAX, process_group())
        return signal.Signals(int(number)).name if number else None

    previous = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopping
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def saved_steps(run: Run, every: int = 1) -> Iterator[dict[str, Any]]:
    """Takes the remaining steps and saves every `every` steps and at the end; yields log rows.

    A save that fails is named in a warning, and repeated after the next step; OSError is raised if
    the last one fails.  SIGTERM and SIGINT end the run after the running step with SystemExit.
    """
    failed = False
    with stop_requested() as stopping:
        for row in run.steps():
            with run.parallel.naming_lost_ranks(f"signals after step {run.step}"):
                name = stopping()
            last = name is not None or run.step >= run.recipe.steps
            if failed or last or run.step % every == 0:
                try:
                    save(run)
                    failed = False
                except OSError as error:
                    if last:
                        raise
                    failed = True
                    warnings.warn(f"step {run.step} is not saved: {error}", stacklevel=2)
            yield row
            if name is not None:
                raise SystemExit(f"{name}: stopped and saved after step {run.step}")
