"""The tables of `python -m bench op`: one of the checks, and one per op of the speeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group
from rich.markup import escape
from rich.text import Text

from .ceilings import Ceilings
from .checks import Check
from .listing import Listing
from .summary import BACKENDS, number
from .timings import Row, Speed

RATIO = "ratio above 1: faster than"


def checked(checks: Iterable[Check]) -> Listing:
    """One row per op, one column per backend: the largest error over all sizes, or the failures."""
    cells: dict[str, dict[str, list[Check]]] = {}
    for check in checks:
        cells.setdefault(check.op, {}).setdefault(check.backend, []).append(check)
    names = [name for name in BACKENDS if any(name in row for row in cells.values())]
    view = Listing("Checks: largest error / bound")
    view.add_columns(
        "op", *(f"{n}, to {'plain PyTorch' if n == 'torch' else 'the reference'}" for n in names)
    )
    for op, row in cells.items():
        view.add_row(op, *(_cell(row.get(name, [])) for name in names))
    return view


def _cell(checks: list[Check]) -> str:
    if not checks:
        return "[dim]-"
    failed = [check for check in checks if check.ok is False]
    if failed:
        return f"[red]wrong at {len(failed)} of {len(checks)} sizes"
    passed = [check for check in checks if check.ok]
    if not passed:
        return "[yellow]not checked"
    if all(check.tolerance == 0 for check in passed):
        return f"[green]same bits[/] at {len(passed)} sizes"
    worst = max(check.error for check in passed)
    bound = max(check.tolerance for check in passed)
    return f"[green]{worst:.1e}[/] / {bound:.0e}, {len(passed)} sizes"


def ceilings(rates: Ceilings) -> Text:
    """The line above the tables of `timed`."""
    products = ", ".join(
        f"{name} {number(1e3 * rate)}" for name, rate in rates.matmul_tflops.items()
    )
    text = f"roof: {number(rates.copy_gb_per_s)} GB/s of a copy, GFLOPS of products: {products}"
    return Text(text, style="dim")


def timed(rows: Iterable[Row], reference: str = "eager") -> Group:
    """One table per op. Ratios are to the provider `reference` of the same row."""
    by_op: dict[str, list[Row]] = {}
    for row in rows:
        by_op.setdefault(row[0].op, []).append(row)
    views = (_timed_op(op, of_op, reference) for op, of_op in by_op.items())
    return Group(*(part for view in views for part in view))


def _timed_op(op: str, rows: Sequence[Row], reference: str) -> tuple[Listing, Text]:
    """The table of an op, and what its providers do."""
    on_gpu = any(speed.host is not None for row in rows for speed in row)
    columns = ("graph", "host", "GB/s", "TFLOPS") if on_gpu else ("GB/s", "GFLOPS")
    view = Listing(f"{op} ({RATIO} {reference})")
    view.add_columns("provider")
    view.add_columns("least µs", "median", "±", *columns, "of roof", "ratio", "error", numeric=True)
    about: dict[str, None] = {}
    for row in rows:
        base = next((s.microseconds for s in row if s.provider == reference), None)
        limit = next((f" (limit: {s.limit})" for s in row if s.limit), "")
        for s in row:
            style = "dim" if s.samples else "red" if s.ours else "yellow"
            view.add_row(*_cells(s, base, on_gpu), heading=f"{s.size}{limit}", note=s.note,
                         style=style)  # fmt: skip
            if s.about:
                about[f"{s.provider}: {s.about}"] = None
    return view, Text("\n".join(about), style="dim")


def _cells(s: Speed, base: float | None, on_gpu: bool) -> list[str]:
    """One provider's line; `base` is the time that its own is compared with."""
    error = "" if s.error is None else f"{s.error:.0e}"
    if s.microseconds is None or s.median is None or s.spread is None:
        return [escape(s.provider), *[""] * (9 if on_gpu else 7), error]
    ratio = base / s.microseconds if base else None
    colour = "green" if ratio and ratio >= 1 else "yellow"
    return [
        escape(s.provider), number(s.least), number(s.median), f"{s.spread:.0%}",
        *((number(s.graph), number(s.host)) if on_gpu else ()),
        number(s.gb_per_s), number(s.tflops and s.tflops * (1 if on_gpu else 1e3)),
        f"{s.roof_share:.0%}" if s.roof_share else "",
        f"[{colour}]{ratio:.2f}" if ratio and s.ours else f"{ratio:.2f}" if ratio else "", error,
    ]  # fmt: skip
