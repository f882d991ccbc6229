"""A progress bar that says what it is at; silent where there is no terminal to draw on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def screen() -> Console:
    """The console that tables go to; wide where it is a file or a pipe, whose width is unknown."""
    return Console(width=None if Console().is_terminal else 170)


@contextlib.contextmanager
def bar(console: Console, title: str, total: int) -> Iterator[Callable[[str], None]]:
    """Yields `step(what)`, to be called after each of `total` pieces of work."""
    columns = (TextColumn(f"{title:12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("{task.description}"))  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)

        def step(what: str) -> None:
            progress.update(task, advance=1, description=what)

        yield step
