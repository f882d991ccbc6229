"""The picture of a run: speed beside PyTorch, and error against what is allowed."""

from __future__ import annotations

from pathlib import Path

from .checks import Check
from .timings import Speed

_COLOURS = {"cuda": "#2a7f3f", "triton": "#3b6fb6", "cpu": "#c2721d", "torch": "#8a8a8a"}
_FLOOR = 1e-18  # where errors of 0 are drawn


def draw(machine: dict, checks: list[Check], speeds: list[Speed], file: Path) -> None:
    """Writes a PNG with one panel for each kind of figure there is."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ratios = [s for s in speeds if s.ratio]
    errors = _worst(checks)
    rows = max(len(ratios), len(errors), 4)
    figure, axes = plt.subplots(1, 2, figsize=(15, 1.6 + 0.32 * rows), layout="constrained")
    _draw_ratios(axes[0], ratios)
    _draw_errors(axes[1], errors)
    figure.suptitle(_title(machine), fontsize=10)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _title(machine: dict) -> str:
    gpu = machine["gpu"]
    device = gpu["name"] if gpu else f"{machine['cpu']}, {machine['cores']} cores"
    versions = f"torch {machine['torch']}, triton {machine['triton']}"
    return f"deepkern {machine['deepkern']} at {machine['commit']} · {device} · {versions}"


def _legend(axes, names) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=_COLOURS[name], label=name) for name in _COLOURS if name in names]
    if handles:
        axes.legend(handles=handles, fontsize=8, ncols=len(handles), frameon=False,
                    loc="lower right", bbox_to_anchor=(1, 1))  # fmt: skip


def _draw_ratios(axes, speeds: list[Speed]) -> None:
    axes.set_title("Speed beside PyTorch", loc="left")
    axes.set_xlabel("PyTorch's time / deepkern's time  (right of the line: deepkern is faster)")
    axes.set_yticks(range(len(speeds)), [f"{s.op}  {s.size}" for s in speeds], fontsize=8)
    colours = [_COLOURS[s.backend] for s in speeds]
    # A ratio is read from 1, so bars start there, and 1/2 is as long as 2.
    axes.barh(range(len(speeds)), [s.ratio - 1 for s in speeds], left=1, color=colours)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.axvline(1, color="black", linewidth=1)
    for y, s in enumerate(speeds):
        sign, align = (1, "left") if s.ratio >= 1 else (-1, "right")
        axes.annotate(f"{s.ratio:.2f}x, {s.microseconds:,.0f} µs", (s.ratio, y), (4 * sign, 0),
                      textcoords="offset points", ha=align, va="center", fontsize=7)  # fmt: skip
    low, high = (f([s.ratio for s in speeds] + [1]) for f in (min, max))
    axes.set_xlim(low / 8, high * 8)
    axes.set_ylim(len(speeds) - 0.4, -0.6)
    _legend(axes, {s.backend for s in speeds})


def _worst(checks: list[Check]) -> list[Check]:
    """Of each op and backend the check with the largest error; failed and unmeasured ones first."""
    found: dict[tuple[str, str], Check] = {}
    for check in checks:
        if check.ok is None:
            continue
        key = (check.op, check.backend)
        if key not in found or _severity(check) > _severity(found[key]):
            found[key] = check
    return sorted(found.values(), key=lambda c: (c.op, list(_COLOURS).index(c.backend)))


def _severity(check: Check) -> tuple[bool, float]:
    return not check.ok, check.error if check.error is not None else float("inf")


def _draw_errors(axes, checks: list[Check]) -> None:
    axes.set_title("Error against what is allowed", loc="left")
    axes.set_xlabel("largest diff = 1 - 2Σxy / Σ(x² + y²)   (black bar: allowed)")
    axes.set_yticks(range(len(checks)), [f"{c.op}  {c.backend}" for c in checks], fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(_FLOOR, 10)
    for y, c in enumerate(checks):
        colour = _COLOURS[c.backend] if c.ok else "#c22222"
        if c.error is None:
            axes.text(_FLOOR * 3, y, "failed", va="center", fontsize=7, color=colour)
        elif c.error == 0:
            words = "bits equal, as they must be" if c.tolerance == 0 else "bits equal"
            axes.text(_FLOOR * 3, y, words, va="center", fontsize=7, color=colour)
        else:
            axes.barh(y, max(c.error, _FLOOR) - _FLOOR, left=_FLOOR, color=colour)
        if c.tolerance:
            axes.plot([c.tolerance] * 2, [y - 0.4, y + 0.4], color="black", linewidth=2)
    axes.set_ylim(len(checks) - 0.4, -0.6)
    _legend(axes, {c.backend for c in checks})
