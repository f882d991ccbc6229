"""The first screen of a run: the machine, what agrees, the speed per family, the model.

It has one line per family of ops and one per figure of the model. The HTML report has the rest.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.text import Text

from . import results
from .families import FAMILIES, family_of
from .listing import Listing

Records = list[dict]
BACKENDS = {
    "cuda": "CUDA C++",
    "triton": "Triton",
    "cpu": "native CPU",
    "torch": "reference, to plain PyTorch",
}


def of_kind(records: Iterable[dict], kind: str) -> Records:
    return [record for record in records if record["kind"] == kind]


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
    return Panel(Text("\n".join(lines)), title="This machine", title_align="left", expand=False)


def agreement(checks: Records) -> Listing:
    """One row per family, one column per backend: how many ops agree with the float64 reference."""
    names = [name for name in BACKENDS if any(c["backend"] == name for c in checks)]
    view = Listing("Do the results agree with the float64 reference?")
    view.add_columns("family", *(BACKENDS[name] for name in names))
    for family in FAMILIES:
        of_family = [c for c in checks if family_of(c["op"]) == family]
        if of_family:
            cells = ([c for c in of_family if c["backend"] == name] for name in names)
            view.add_row(family, *map(_agreement_cell, cells))
    return view


def _agreement_cell(checks: Records) -> str:
    """Such as "11 ops at 88 sizes", or in red the ops that differ."""
    wrong = sorted({c["op"] for c in checks if c["ok"] is False})
    if wrong:
        return f"[red]wrong: {', '.join(wrong)}"
    ops = {c["op"] for c in checks if c["ok"]}
    if not ops:
        return "[dim]-"
    return f"[green]{len(ops)} ops[/] at {sum(bool(c['ok']) for c in checks)} sizes"


def ratios(speeds: Records) -> dict[tuple[str, str, str], float]:
    """(op, size, provider) of deepkern -> the time of the fastest other provider over its own."""
    others: dict[tuple[str, str], float] = {}
    for s in speeds:
        time = results.time_of(s)
        if time and not results.is_ours(s["provider"]):
            row = s["op"], s["size"]
            others[row] = min(time, others.get(row, time))
    return {
        (s["op"], s["size"], s["provider"]): others[s["op"], s["size"]] / time
        for s in speeds
        if (time := results.time_of(s))
        and results.is_ours(s["provider"])
        and (s["op"], s["size"]) in others
    }


def speed(speeds: Records) -> Listing:
    """One row per family: how many times as fast as the fastest other one on this machine."""
    found = ratios(speeds)
    backends = sorted({provider.removeprefix("deepkern ") for _, _, provider in found})
    view = Listing(
        "How fast? The time of the fastest other provider (PyTorch, or a library) over that of "
        f"deepkern ({', '.join(backends)}); above 1, deepkern is faster"
    )
    view.add_columns("family")
    view.add_columns("rows", "slowest", "median", "fastest", numeric=True)
    view.add_columns("slowest at", "fastest at")
    for family in FAMILIES:
        rows = {key: ratio for key, ratio in found.items() if family_of(key[0]) == family}
        if rows:
            low, high = min(rows, key=rows.__getitem__), max(rows, key=rows.__getitem__)
            middle = statistics.median(rows.values())
            view.add_row(family, str(len(rows)), *map(_ratio, (rows[low], middle, rows[high])),
                         f"{low[0]} {low[1]}", f"{high[0]} {high[1]}")  # fmt: skip
    return view


def _ratio(value: float) -> str:
    return f"[{'green' if value >= 1 else 'yellow'}]{value:.3g}x"


def model(records: Records) -> Group:
    """What the model continues, whether its figures agree, and its speed next to transformers."""
    texts = [
        Panel(Text(r["value"]), title=r["name"], title_align="left", expand=False)
        for r in records
        if r["unit"] == "text"
    ]
    return Group(*texts, _model_checks(records), _model_speed(records))


def _model_checks(records: Records) -> Listing:
    """The figures that have a bound, with it."""
    view = Listing("Is the model right?")
    view.add_columns("figure", "value", "bound")
    for r in records:
        if r["ok"] is not None:
            style = "green" if r["ok"] else "red"
            value = f"{r['value']:.5g} {r['unit']}".strip()
            view.add_row(escape(r["name"]), f"[{style}]{value}", escape(r["note"]))
    return view


def _model_speed(records: Records) -> Listing:
    """Tokens a second of the engine and of transformers, one column per number of requests."""
    rows: dict[str, dict[int, float]] = {}
    for r in records:
        program, found, batch = r["name"].partition(", batch ")
        if found and r["unit"] == "tokens/s":
            rows.setdefault(program, {})[int(batch)] = r["value"]
    batches = sorted({batch for rates in rows.values() for batch in rates})
    view = Listing(
        "How fast is the model? Tokens a second of all requests together, by their number"
    )
    view.add_columns("requests")
    view.add_columns(*map(str, batches), numeric=True)
    for program, rates in rows.items():
        view.add_row(program, *(number(rates.get(batch)) for batch in batches))
    return view


def number(value: float | None) -> str:
    """Three significant digits, no exponent."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def failures(records: Iterable[dict]) -> list[str]:
    """One line for each failed record; a foreign provider that fails is not one of ours."""
    keys = ("op", "backend", "provider", "size", "name", "note")
    return [
        " ".join(str(r[key]) for key in keys if r.get(key))
        for r in records
        if r.get("ok") is False and (r["kind"] != "speed" or results.is_ours(r["provider"]))
    ]


def verdict(console: Console, records: Records) -> None:
    wrong = failures(records)
    unchecked = sorted({f"{r['op']} on {r['backend']}" for r in of_kind(records, "check")
                        if r["ok"] is None})  # fmt: skip
    if unchecked:
        console.print(f"not checked: {', '.join(unchecked)}", style="yellow")
    if wrong:
        console.print(f"{len(wrong)} disagreements:", style="bold red")
        for line in wrong:
            console.print(f"  {line}", style="red", markup=False, soft_wrap=True)
    else:
        console.print("Everything that was checked agrees.", style="bold green")
