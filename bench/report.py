"""What a person reads of a run: tables of the machine, the checks, the speeds and the model."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .checks import Check
from .timings import Speed

ROOF = "roof: a copy's bandwidth, and on a GPU the peak rate; on a CPU, caches can beat it"
BACKENDS = ("cuda", "triton", "cpu", "torch")


def machine(facts: dict) -> Panel:
    gpu = facts["gpu"]
    seen = f"{gpu['name']} ({gpu['target']}), {gpu['memory_gib']} GiB" if gpu else "none"
    interpreted = " (interpreted: checked, not timed)" if facts["interpreted_triton"] else ""
    lines = [
        f"CPU       {facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, "
        f"{facts['memory_gib']} GiB; {' '.join(facts['isa'])}",
        f"GPU       {seen}",
        f"versions  deepkern {facts['deepkern']} at {facts['commit']}, torch {facts['torch']}, "
        f"triton {facts['triton']}, Python {facts['python']}",
        *(f"{name:9} {said}{interpreted if name == 'triton' else ''}"
          for name, said in facts["backends"].items()),
    ]  # fmt: skip
    return Panel(Text("\n".join(lines)), title="This machine", title_align="left")


def checked(checks: Iterable[Check]) -> Table:
    """One row per op, one column per backend: the largest error over all sizes, or what failed."""
    cells: dict[str, dict[str, list[Check]]] = {}
    for check in checks:
        cells.setdefault(check.op, {}).setdefault(check.backend, []).append(check)
    names = [name for name in BACKENDS if any(name in row for row in cells.values())]
    view = Table(title="Checks: largest error / what is allowed", title_justify="left")
    view.add_column("op")
    for name in names:
        view.add_column(f"{name}, to {'plain PyTorch' if name == 'torch' else 'the oracle'}")
    for op, row in cells.items():
        view.add_row(op, *(_verdict(row.get(name, [])) for name in names))
    return view


def _verdict(found: list[Check]) -> str:
    if not found:
        return "[dim]-"
    failed = [check for check in found if check.ok is False]
    if failed:
        return f"[red]wrong at {len(failed)} of {len(found)} sizes"
    held = [check for check in found if check.ok]
    if not held:
        return "[yellow]not checked"
    if all(check.tolerance == 0 for check in held):
        return f"[green]same bits[/] at {len(held)} sizes"
    worst = max(check.error for check in held)
    return (
        f"[green]{worst:.1e}[/] / {max(check.tolerance for check in held):.0e}, {len(held)} sizes"
    )


def timed(speeds: Iterable[Speed]) -> Table:
    view = Table(
        title="Speed beside PyTorch (ratio above 1: deepkern is faster)", title_justify="left"
    )
    for name in ("op", "size", "backend"):
        view.add_column(name)
    for name in ("µs", "GB/s", "TFLOPS", "of roof", "PyTorch µs", "ratio"):
        view.add_column(name, justify="right")
    view.add_column("PyTorch baseline")
    before = None
    for s in speeds:
        label, before = (("", "", "") if s.label == before else s.label), s.label
        if s.microseconds is None:
            view.add_row(*label, *[""] * 6, f"[red]{escape(s.note)}")
            continue
        ratio = f"[{'green' if s.ratio >= 1 else 'yellow'}]{s.ratio:.2f}" if s.ratio else ""
        ours = ("", "", "", "") if not label[0] else (
            _number(s.microseconds), _number(s.gb_per_s), _number(s.tflops),
            f"{s.roof:.0%}" if s.roof else "",
        )  # fmt: skip
        said = f"{s.baseline}[yellow]: {escape(s.note)}" if s.note else s.baseline
        view.add_row(*label, *ours, _number(s.baseline_microseconds), ratio, said)
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
    """One line for everything that disagreed."""
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
