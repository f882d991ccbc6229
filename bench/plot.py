"""The picture of a run: speed compared with PyTorch, and errors compared with their bounds."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from .checks import Check
from .timings import Row, Speed

_COLOURS = {"cuda": "#2a7f3f", "triton": "#3b6fb6", "cpu": "#c2721d", "torch": "#8a8a8a"}
_WRONG = "#c22222"
_FLOOR = 1e-18  # start of the error bars


def draw(machine: dict, checks: list[Check], rows: list[Row], file: Path) -> None:
    """Writes a PNG with one bar per timed size, and one bar per checked op and backend."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    ratios = [pair for row in rows for pair in pairs(row)]
    errors = worst(checks)
    lines = max(len(ratios), len(errors), 4)
    figure, axes = plt.subplots(1, 2, figsize=(16, 2 + 0.36 * lines), layout="constrained")
    _draw_ratios(axes[0], ratios)
    _draw_errors(axes[1], errors)
    backends = {pair.ours.backend for pair in ratios} | {check.backend for check in errors}
    handles = [Patch(color=_COLOURS[name], label=name) for name in _COLOURS if name in backends]
    if not all(check.ok for check in errors):
        handles.append(Patch(color=_WRONG, label="wrong"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles) or 1)
    figure.suptitle(_title(machine), fontsize=10)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _title(machine: dict) -> str:
    gpu = machine["gpu"]
    device = gpu["name"] if gpu else f"{machine['cpu']}, {machine['cores']} cores"
    versions = f"torch {machine['torch']}, triton {machine['triton']}"
    return f"deepkern {machine['deepkern']} at {machine['commit']} · {device} · {versions}"


class Pair(NamedTuple):
    """A backend of deepkern and another provider, both timed in one row."""

    ours: Speed
    theirs: Speed

    @property
    def ratio(self) -> float:
        """Above 1: deepkern is faster."""
        assert self.ours.microseconds and self.theirs.microseconds
        return self.theirs.microseconds / self.ours.microseconds


def pairs(row: Row) -> list[Pair]:
    timed = [speed for speed in row if speed.microseconds]
    ours, theirs = ([s for s in timed if s.ours is side] for side in (True, False))
    return [Pair(one, other) for one in ours for other in theirs]


def _draw_ratios(axes, pairs: list[Pair]) -> None:
    axes.set_title("Speed compared with other providers")
    axes.set_xlabel("their time / deepkern's time  (right of the line: deepkern is faster)")
    labels = [f"{p.ours.op}  {p.ours.size}\n{p.theirs.provider}: {p.theirs.about}" for p in pairs]
    axes.set_yticks(range(len(pairs)), labels, fontsize=7)
    # Bars start at a ratio of 1, so that 1/2 is as long as 2.
    lengths, colours = [p.ratio - 1 for p in pairs], [_COLOURS[p.ours.backend] for p in pairs]
    axes.barh(range(len(pairs)), lengths, left=1, color=colours)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.axvline(1, color="black", linewidth=1)
    for y, p in enumerate(pairs):
        sign, align = (1, "left") if p.ratio >= 1 else (-1, "right")
        text = f"{p.ratio:.2g}x, {p.ours.microseconds:,.0f} µs"
        axes.annotate(
            text if p.ratio < 100 else f"{p.ratio:.0f}x", (p.ratio, y), (4 * sign, 0),
            textcoords="offset points", ha=align, va="center", fontsize=7,
        )  # fmt: skip
    low, high = (extreme([p.ratio for p in pairs] + [1]) for extreme in (min, max))
    room = max(high / low, 10) ** 0.45  # for the text next to the longest bars
    axes.set_xlim(low / room, high * room)
    axes.set_ylim(len(pairs) - 0.4, -0.6)


def worst(checks: list[Check]) -> list[Check]:
    """The check of each op and backend that is closest to its bound, or failed."""
    worst_of: dict[tuple[str, str], Check] = {}
    for check in checks:
        key = (check.op, check.backend)
        if check.ok is not None and (
            key not in worst_of or _severity(check) > _severity(worst_of[key])
        ):
            worst_of[key] = check
    return sorted(worst_of.values(), key=lambda c: (c.op, list(_COLOURS).index(c.backend)))


def _severity(check: Check) -> tuple[bool, float]:
    if check.error is None:
        return not check.ok, float("inf")
    return not check.ok, check.error / (check.tolerance or 1)


def _draw_errors(axes, checks: list[Check]) -> None:
    axes.set_title("Error compared with its bound")
    axes.set_xlabel("diff = 1 - 2Σxy / Σ(x² + y²), closest to its bound  (black: the bound)")
    axes.set_yticks(range(len(checks)), [f"{c.op}  {c.backend}" for c in checks], fontsize=7)
    axes.set_xscale("log")
    axes.set_xlim(_FLOOR, 10)
    for y, c in enumerate(checks):
        colour = _COLOURS[c.backend] if c.ok else _WRONG
        if not c.error:
            bits = "bits equal, as required" if c.tolerance == 0 else "bits equal"
            words = "failed: see the table" if not c.ok else bits
            axes.text(_FLOOR * 3, y, words, va="center", fontsize=7, color=colour)
        else:
            axes.barh(y, max(c.error, _FLOOR) - _FLOOR, left=_FLOOR, color=colour)
        if c.tolerance:
            axes.plot([c.tolerance] * 2, [y - 0.4, y + 0.4], color="black", linewidth=2)
    axes.set_ylim(len(checks) - 0.4, -0.6)
