"""All results as one HTML file without further files: `python -m bench report [RESULT ...]`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from rich.console import Console

import deepkern

from .. import budgets, figures, machine, predictions, results
from ..results import Run
from . import devices, plots, render, speeds, tables
from . import figures as drawn
from .devices import Device
from .speeds import Row

OUT = machine.ROOT / "build" / "report.html"


@dataclass(frozen=True)
class Part:
    """What the page shows of a device."""

    id: str
    device: Device
    rows: list[Row]
    styles: dict[str, plots.Style]

    @property
    def unit(self) -> speeds.Unit:
        return speeds.flops_unit(self.device.newest)

    @property
    def providers(self) -> list[str]:
        """Those with a time, which the figures show."""
        return speeds.providers(self.rows)

    @property
    def ours(self) -> list[str]:
        return [name for name in self.providers if results.is_ours(name)]

    @property
    def summaries(self) -> list[plots.Strip]:
        return drawn.summaries(self.rows, self.styles)

    @property
    def roofline(self) -> plots.Plane | None:
        return drawn.roofline(self.device, self.rows, self.styles)

    @property
    def bandwidths(self) -> plots.Strip | None:
        return drawn.bandwidths(self.device, self.rows, self.styles)

    @property
    def panels(self) -> list[plots.Plane]:
        return drawn.panels(self.rows, self.styles)

    @property
    def speed(self) -> tables.Table:
        return tables.speed(f"speed-{self.id}", self.rows)

    @property
    def checked(self) -> tables.Table:
        return tables.checked(f"checks-{self.id}", self.device)

    @property
    def failures(self) -> list[tuple[str, str]]:
        return tables.failures(self.device)

    @property
    def agreeing(self) -> int:
        return tables.agreeing(self.device)

    @property
    def history(self) -> tables.Table:
        return tables.history(f"history-{self.id}", self.device, self.styles)

    @property
    def texts(self) -> list[dict]:
        """The model's records that are texts."""
        return [r for _, r in self.device.records("model") if r["unit"] == "text"]

    @property
    def model(self) -> tables.Table:
        return tables.model(f"model-{self.id}", [r for _, r in self.device.records("model")])


def parts(runs: Sequence[Run]) -> list[Part]:
    """One part per device. A provider has the same style in all."""
    found = [(device, speeds.rows(device)) for device in devices.of(runs)]
    past = [Row(run, [r]) for run in runs for r in run.of("speed")]
    styles = plots.styles(speeds.providers(past))
    return [Part(f"d{i}", device, rows, styles) for i, (device, rows) in enumerate(found)]


def ops_of(runs: Sequence[Run]) -> set[str]:
    """The ops that `runs` have checked or timed."""
    return {r["op"] for run in runs for kind in ("check", "speed") for r in run.of(kind)}


def page(
    runs: Sequence[Run], skipped: Sequence[str] = (), ops: Collection[str] = tuple(deepkern.OPS)
) -> str:
    """The HTML of a report of `runs`, with the predictions and the inspection of `ops`.

    `skipped` are names of files of another schema.
    """
    shown = parts(runs)
    budget, counts = ({key: x for key, x in found.items() if key[0] in ops}
                      for found in (budgets.load(), figures.load()))  # fmt: skip
    predicted = [r for r in predictions.load() if r["op"] in ops]
    seen = tables.measured([p.device for p in shown], {p.device.name: p.rows for p in shown})
    return render(
        "report.html",
        parts=shown,
        skipped=skipped,
        one_op=len(ops) == 1,
        bounds=tables.bounds(counts, seen),
        predicted=tables.predicted(predicted, seen),
        measured=sorted({target for target, _ in seen}),
        inspected=tables.inspected(budget),
        triton=budgets.PINNED,
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )


def load(files: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The given results, or the committed ones; and the names of files of another schema."""
    if not files:
        committed = results.committed()
        return list(committed), committed.skipped
    runs, skipped = [], []
    for file in files:
        try:
            runs.append(results.load(file))
        except results.OldSchema:
            skipped.append(file.name)
    return runs, skipped


def run(files: Sequence[Path], out: Path, console: Console) -> int:
    """Writes the report of `files`, the committed results and all ops by default. Returns 0.

    Raises `results.Invalid` if a file is not a result.
    """
    runs, skipped = load(files)
    if skipped:
        console.print(f"skipped, of another schema: {', '.join(skipped)}", soft_wrap=True)
    ops = ops_of(runs) if files else tuple(deepkern.OPS)
    results.write_text(page(runs, skipped, ops), out)
    console.print(str(out), soft_wrap=True, highlight=False, markup=False)
    return 0
