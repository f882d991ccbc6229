"""What the commands have in common: options, names of ops, the console and the progress bar."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

NAMES = typer.Argument(None, help="ops; all by default")
KEEP = typer.Option(False, help="name the results so that git does not ignore a CPU's")
SECONDS = typer.Option(0.3, min=1e-4, help="time each call for about this long")
FOLDER = typer.Option(Path(__file__).parent / "results", help="folder for the results")


def known_ops(names: list[str] | None) -> list[str]:
    """The named ops, or all; an unknown name is an error of the command line (exit code 2)."""
    import deepkern

    for name in names or ():
        if name not in deepkern.OPS:
            raise typer.BadParameter(f"no op {name!r}; there are {', '.join(sorted(deepkern.OPS))}")
    return names or sorted(deepkern.OPS)


def screen() -> Console:
    """The console for tables: as wide as the terminal or COLUMNS, else 170 columns."""
    known = Console().is_terminal or os.environ.get("COLUMNS", "").isdigit()
    return Console(width=None if known else 170)


@contextlib.contextmanager
def without_interrupts() -> Iterator[None]:
    """Ctrl-C waits for the end of the block; processes that start in it never receive it."""
    resource_tracker.ensure_running()  # multiprocessing's, which unblocks the signal when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def bar(console: Console, title: str, total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar; yields `step(text)`, to call after each of `total` pieces of work.

    It draws nothing where the output is no terminal.
    """
    columns = (TextColumn(f"{title:12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("{task.description}"))  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)

        def step(text: str) -> None:
            progress.update(task, advance=1, description=text)

        yield step
