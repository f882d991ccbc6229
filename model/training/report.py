"""What a run shows: progress while it trains, and pictures of its log."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from model.training.run import Run


def with_progress(run: Run, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows of a run's steps, with a line that shows the newest; a skipped step is printed."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeRemainingColumn(), disable=not run.is_main) as progress:
        task = progress.add_task("", total=run.recipe.steps, completed=run.step)
        start = time.monotonic()
        for row in rows:
            seconds, start = time.monotonic() - start, time.monotonic()
            if "skipped" in row:
                progress.console.print(f"step {row['step']} skipped: {row['skipped']}")
            else:
                text = describe(row, run.recipe.tokens_per_step / seconds)
                progress.update(task, description=text)
            progress.update(task, completed=row["step"])
            yield row


def describe(row: dict[str, Any], tokens_per_second: float) -> str:
    """Loss, speed with checkpoints and scores, gradient and load of a step in one line."""
    text = f"loss {row['main']:.3f}  {tokens_per_second:.0f} tokens/s"
    text += f"  gradient {row['gradient_norm']:.2f}"
    if "load_entropy" in row:
        text += f"  load entropy {row['load_entropy']:.3f}, dropped: none"
    return text


class TensorBoard:
    """Writes rows to TensorBoard files in the run's folder, if the package is installed."""

    def __init__(self, run: Run) -> None:
        self.writer = None
        if not run.is_main:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self.writer = SummaryWriter(run.folder, purge_step=run.step + 1)

    def add(self, row: dict[str, Any]) -> None:
        if self.writer is None:
            return
        for name, value in row.items():
            if isinstance(value, (int, float)) and name != "step":
                self.writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def smoothed(values: list[float], factor: float = 0.95) -> list[float]:
    """Exponential means, corrected for the start."""
    mean, weight, result = 0.0, 0.0, []
    for value in values:
        mean = factor * mean + (1 - factor) * value
        weight = factor * weight + (1 - factor)
        result.append(mean / weight)
    return result


def plot_loss(log: list[dict[str, Any]], file: Path, unit: str = "bits per byte") -> None:
    """Draws the losses of the next and of the second next token, and those on held-out text."""
    factor = 1 / math.log(2) if unit.startswith("bits") else 1.0
    figure, axes = _figure()
    trained = [row for row in log if row.get("main") is not None]
    millions = [row["tokens"] / 1e6 for row in trained]
    for name, label in (("main", "next token"), ("mtp", "second next token (MTP)")):
        values = [row[name] * factor for row in trained if name in row]
        if values:
            (line,) = axes.plot(millions, smoothed(values), label=f"{label}, smoothed")
            axes.plot(millions, values, lw=0.4, alpha=0.3, color=line.get_color())
    scored = [row for row in log if "held_out" in row]
    points = [row["tokens"] / 1e6 for row in scored], [row["held_out"] * factor for row in scored]
    axes.plot(*points, "o", ms=4, color="k", label="held out")
    for row in (row for row in log if "skipped" in row):
        axes.axvline(row["tokens"] / 1e6, color="r", lw=0.5)
    top = max(
        (value for row in trained[len(trained) // 50 :] for value in (row["main"],)), default=1
    )
    axes.set(xlabel="million tokens of training", ylabel=unit, ylim=(None, 1.1 * top * factor))
    axes.legend()
    _save(figure, file)


def plot_load(log: list[dict[str, Any]], file: Path) -> None:
    """Draws the most loaded expert of each layer, and the entropy of the least even layer."""
    rows = [row for row in log if row.get("load_max")]
    figure, axes = _figure()
    millions = [row["tokens"] / 1e6 for row in rows]
    for layer in range(len(rows[0]["load_max"]) if rows else 0):
        values = smoothed([row["load_max"][layer] for row in rows])
        axes.plot(millions, values, label=f"layer {layer + 1} with experts")
    entropy = axes.twinx()
    values = smoothed([row["load_entropy"] for row in rows])
    entropy.plot(millions, values, "k:", label="least entropy (right)")
    entropy.set(ylabel="entropy of the load, 1 is even", ylim=(None, 1.01))
    axes.set(xlabel="million tokens of training", ylabel="largest load of an expert / mean load")
    handles = axes.get_legend_handles_labels()[0] + entropy.get_legend_handles_labels()[0]
    axes.legend(handles=handles, loc="center right")
    _save(figure, file)


def _figure() -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(7, 4), layout="constrained")


def _save(figure: Any, file: Path) -> None:
    """Writes the PNG, all or nothing."""
    import matplotlib.pyplot as plt

    fresh = file.with_name(f".{file.name}-{os.getpid()}-{time.monotonic_ns()}.png")
    try:
        figure.savefig(fresh, dpi=110)
        os.replace(fresh, file)
    finally:
        fresh.unlink(missing_ok=True)
        plt.close(figure)
