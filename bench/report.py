"""The report of a run: tables of the machine, the checks, the speeds and the model."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .checks import Check
from .timings import Speed

ROOF = "roof: a copy's bandwidth, and on a GPU the peak rate; a CPU's caches can be faster"
BACKENDS = ("cuda", "triton", "cpu", "torch")


def machine(about: dict) -> Panel:
    gpu = about["gpu"]
    gpu_text = f"{gpu['name']} ({gpu['target']}), {gpu['memory_gib']} GiB" if gpu else "none"
    interpreted = " (interpreted: checked, not timed)" if about["interpreted_triton"] else ""
    lines = [
        f"CPU       {about['cpu']}, {about['cores']} cores, {about['threads']} threads, "
        f"{about['memory_gib']} GiB; {' '.join(about['isa'])}",
        f"GPU       {gpu_text}",
        f"versions  deepkern {about['deepkern']} at {about['commit']}, torch {about['torch']}, "
        f"triton {about['triton']}, Python {about['python']}",
        *(f"{name:9} {status}{interpreted if name == 'triton' else ''}"
          for name, status in about["backends"].items()),
    ]  # fmt: skip
    return Panel(Text("\n".join(lines)), title="This machine", title_align="left")


def checked(checks: Iterable[Check]) -> Table:
    """One row per op, one column per backend: the largest error over all sizes, or the failures."""
    cells: dict[str, dict[str, list[Check]]] = {}
    for check in checks:
        cells.setdefault(check.op, {}).setdefault(check.backend, []).append(check)
    names = [name for name in BACKENDS if any(name in row for row in cells.values())]
    view = Table(title="Checks: largest error / bound", title_justify="left")
    view.add_column("op")
    for name in names:
        view.add_column(f"{name}, to {'plain PyTorch' if name == 'torch' else 'the reference'}")
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


def timed(speeds: Iterable[Speed]) -> Table:
    view = Table(
        title="Speed compared with PyTorch (ratio above 1: deepkern is faster)",
        title_justify="left",
    )
    for name in ("op", "size", "backend"):
        view.add_column(name)
    for name in ("µs", "GB/s", "TFLOPS", "of roof", "PyTorch µs", "ratio"):
        view.add_column(name, justify="right")
    view.add_column("PyTorch baseline")
    previous = None
    for s in speeds:
        label = ("", "", "") if s.label == previous else s.label
        previous = s.label
        if s.microseconds is None:
            view.add_row(*label, *[""] * 6, f"[red]{escape(s.note)}")
            continue
        ratio = f"[{'green' if s.ratio >= 1 else 'yellow'}]{s.ratio:.2f}" if s.ratio else ""
        ours = ("", "", "", "") if not label[0] else (
            _number(s.microseconds), _number(s.gb_per_s), _number(s.tflops),
            f"{s.roof:.0%}" if s.roof else "",
        )  # fmt: skip
        baseline = f"{s.baseline}[yellow]: {escape(s.note)}" if s.note else s.baseline
        view.add_row(*label, *ours, _number(s.baseline_microseconds), ratio, baseline)
    return view


def _number(value: float | None) -> str:
    """Three significant digits, no exponent."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def model(records: Iterable[dict]) -> Group:
    view = Table(title="The model: stdlib-bytes, held-out text", title_justify="left")
    for name in ("", "value", "note"):
        view.add_column(name)
    texts = []
    for r in records:
        if r["unit"] == "text":
            texts.append(Panel(Text(r["value"]), title=r["name"], title_align="left"))
            continue
        value = _number(r["value"]) if r["unit"] == "tokens/s" else f"{r['value']:.5g}"
        style = {True: "green", False: "red", None: "none"}[r["ok"]]
        view.add_row(r["name"], Text(f"{value} {r['unit']}".strip(), style=style), r["note"])
    return Group(*texts, view)


def failures(records: Iterable[dict]) -> list[str]:
    """One line for each failed record."""
    return [
        " ".join(str(r[key]) for key in ("op", "backend", "size", "name", "note") if r.get(key))
        for r in records
        if r.get("ok") is False
    ]


def verdict(console: Console, records: list[dict]) -> None:
    wrong = failures(records)
    unchecked = sorted({f"{r['op']} on {r['backend']}" for r in records
                        if r["kind"] == "check" and r["ok"] is None})  # fmt: skip
    if unchecked:
        console.print(f"not checked: {', '.join(unchecked)}", style="yellow")
    if wrong:
        console.print(f"{len(wrong)} disagreements:", style="bold red")
        for line in wrong:
            console.print(f"  {line}", style="red", markup=False, soft_wrap=True)
    else:
        console.print("Everything that was checked agrees.", style="bold green")
