"""The tables of a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from deepkern.runtime.arch import ARCHS
from deepkern.testing.costs import Cost

from .. import limits, predictions
from ..checks import text
from ..families import family_of
from ..figures import SIZES
from ..results import is_ours
from ..summary import number
from . import figures
from .cells import Cell, Column, Line, Table, count, options, share, times
from .devices import Device
from .plots import Style
from .speeds import Row, dimensions, flops_unit, short

# Speed.

_TIMED = [
    Column("op", False), Column("size", False), Column("provider", False),
    Column("least µs", title="per call, the fastest round"),
    Column("median µs", title="per call, the median of the rounds"),
    Column("spread", title="interquartile range over median; the ticks are the rounds, from the "
                           "least time to 1.25 times it"),
    Column("GB/s"), Column("FLOPS"),
    Column("of the roof", title="least time by the measured ceilings over the time"),
    Column("limit", False, "what the roof is limited by"),
    Column("x eager", title="the time of PyTorch eager over the time: above 1 is faster"),
]  # fmt: skip
_ON_GPU = [
    Column("graph µs", title="per call in a replayed CUDA graph"),
    Column("host µs", title="until the call returns on the host"),
]


def speed(name: str, rows: Sequence[Row]) -> Table:
    """All providers of all rows; the notes are in the last column."""
    gpu = any(row.run.machine["gpu"] for row in rows)
    commits = {row.run.machine["commit"] for row in rows}
    extra = [*(_ON_GPU if gpu else []), *([Column("commit", False)] if len(commits) > 1 else [])]
    lines = [
        Line(_speed(row, r, gpu, len(commits) > 1),
             {"family": family_of(row.op), "provider": r["provider"]}, "repeated" if i else "")
        for row in rows
        for i, r in enumerate(row.records)
    ]  # fmt: skip
    unit = flops_unit(rows[0].run).name if rows else "TFLOPS"
    timed = [c._replace(name=unit) if c.name == "FLOPS" else c for c in _TIMED]
    columns = [*timed, *extra, Column("note", False, "what it does, or why it has no time")]
    return Table(name, "Speed of every provider", columns, lines,
                 options(lines, "family", "provider"))  # fmt: skip


def _speed(row: Row, r: dict, gpu: bool, commit: bool) -> list[Cell]:
    wrong = disagrees(r)
    reason = "; ".join(part for part in (r["note"], r["about"]) if part)
    cells = [
        Cell(row.op, kind="op"), Cell(short(row.size), kind="size"),
        Cell(r["provider"], kind="provider ours" if is_ours(r["provider"]) else "provider"),
        count(r["least"]), count(r["median"]),
        _spread(r),
        count(r["gb_per_s"]), count(row.rate(r)), share(r["roof_share"]), Cell(r["limit"] or ""),
        times(row.ratio(r)),
    ]  # fmt: skip
    cells += [count(r["graph"]), count(r["host"])] if gpu else []
    cells += [Cell(row.run.machine["commit"] or "", kind="op")] if commit else []
    return [*cells, Cell(reason, kind="note wrong" if wrong else "note")]


def _spread(r: dict) -> Cell:
    if len(r["samples"]) < 2:
        return Cell("1 round" if r["samples"] else "", None, "n unknown")
    return Cell(f"{r['spread']:.1%}", r["spread"], "n", strip=samples(r["samples"]))


def samples(values: Sequence[float], width: int = 60) -> str:
    """An SVG path with a tick per sample, from the least to 1.25 times it."""
    least = min(values, default=1.0)
    at = sorted({round(min(v / least - 1, 0.25) * 4 * width) for v in values})
    return "".join(f"M{x} 0v9" for x in at)


# Correctness.


def disagrees(record: dict) -> bool:
    """Whether a check failed; another provider's failure is not one of deepkern."""
    return record["ok"] is False and (record["kind"] != "speed" or is_ours(record["provider"]))


def failures(device: Device) -> list[tuple[str, str]]:
    """(what, note) of everything that disagrees."""
    return [
        (" ".join(str(r[k]) for k in ("op", "backend", "provider", "size", "name") if r.get(k)),
         r["note"] or "no note")
        for kind in ("check", "speed", "model")
        for _, r in device.records(kind)
        if disagrees(r)
    ]  # fmt: skip


def agreeing(device: Device) -> int:
    """The checks that agree."""
    return sum(r["ok"] is True for kind in ("check", "model") for _, r in device.records(kind))


def checked(name: str, device: Device) -> Table:
    """Each op on each backend: the error closest to its bound, over all sizes."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for _, r in device.records("check"):
        groups.setdefault((r["op"], r["backend"]), []).append(r)
    lines = [
        Line([Cell(op, kind="op"), Cell(backend), *_check(checks)],
             {"family": family_of(op), "backend": backend})
        for (op, backend), checks in groups.items()
    ]  # fmt: skip
    columns = [
        Column("op", False), Column("backend", False), Column("result", False),
        Column("largest error", title="diff = 1 - 2Σxy / Σ(x² + y²)"), Column("bound"),
        Column("of the bound"), Column("sizes"), Column("note", False),
    ]  # fmt: skip
    return Table(name, "Largest error of each op and backend, and its bound", columns, lines,
                 options(lines, "family", "backend"))  # fmt: skip


def _check(checks: Sequence[dict]) -> list[Cell]:
    failed = [r for r in checks if r["ok"] is False]
    passed = [r for r in checks if r["ok"]]
    notes = "; ".join(dict.fromkeys(r["note"] for r in failed or checks if r["note"]))
    sizes = Cell(str(len(checks)), len(checks), "n")
    nothing = [Cell("", None, "n")] * 3
    if failed:
        word = Cell(f"wrong at {len(failed)} of {len(checks)} sizes", kind="wrong")
        where = ", ".join(r["size"] for r in failed)
        return [word, *_errors(failed), sizes, Cell(f"{notes} ({where})", kind="note wrong")]
    if not passed:
        return [Cell("not checked", kind="unknown"), *nothing, sizes, Cell(notes, kind="note")]
    if all(r["tolerance"] == 0 for r in passed):
        return [Cell("same bits", kind="right"), *nothing, sizes, Cell(notes, kind="note")]
    return [Cell("agrees", kind="right"), *_errors(passed), sizes, Cell(notes, kind="note")]


def _errors(checks: Sequence[dict]) -> list[Cell]:
    """Error, bound and their ratio, of the check that is closest to its bound."""
    compared = [r for r in checks if r["error"] is not None and r["tolerance"]]
    if not compared:
        return [Cell("", None, "n")] * 3
    worst = max(compared, key=lambda r: r["error"] / r["tolerance"])
    error, bound = worst["error"], worst["tolerance"]
    return [Cell(f"{error:.1e}", error, "n"), Cell(f"{bound:.0e}", bound, "n"),
            share(error / bound)]  # fmt: skip


# Predictions.


def measured(devices: Iterable[Device], rows: Mapping[str, Sequence[Row]]) -> list[tuple[str, Row]]:
    """(GPU target, row) of everything that a GPU has timed."""
    return [(d.target, row) for d in devices if d.target for row in rows[d.name] if row.ours()]


def bounds(figures: Mapping[tuple[str, str], dict], seen: Sequence[tuple[str, Row]]) -> Table:
    """Shares of the roof at the counted sizes, next to those that a GPU reached at its sizes."""
    reached: dict[tuple[str, str], list[float]] = {}
    for target, row in seen:
        reached.setdefault((row.op, target), []).append(row.ours()[0]["roof_share"] or 0.0)
    lines = []
    for (op, target), f in sorted(figures.items()):
        found = reached.get((op, target), [])
        lines.append(Line(
            [Cell(op, kind="op"), Cell(target), Cell(short(text(SIZES[op])), kind="size"),
             *_predicted(f["bound"], f["predicted"], max(found, default=None)),
             Cell(limits.NAMES.get(f["binding"], f["binding"]))],
            {"family": family_of(op), "target": target}))  # fmt: skip
    columns = [Column("op", False), Column("target", False), Column("counted size", False),
               *_SHARES, Column("binding limit", False)]  # fmt: skip
    return Table("bounds", "At small sizes, whose instructions were all counted", columns, lines,
                 options(lines, "family", "target"))  # fmt: skip


_SHARES = [
    Column("share of the roof", title="the bar is the prediction, the tick the bound, "
                                                  "the circle the measurement"),
    Column("at most", title="by limits that the compiler cannot lower"),
    Column("predicted", title="by all limits, estimates included"),
    Column("measured", title="of the measured ceilings, by deepkern's fastest provider"),
]  # fmt: skip


def _predicted(bound: float | None, predicted: float, reached: float | None) -> list[Cell]:
    known = {"bound": bound, "predicted": predicted, "measured": reached}
    return [
        Cell("", predicted, "shares", shares=known),
        Cell("" if bound is None else f"{bound:.0%}", bound, "n"),
        Cell(f"{predicted:.0%}", predicted, "n"),
        Cell("not measured" if reached is None else f"{reached:.0%}", reached,
             "n unknown" if reached is None else "n"),
    ]  # fmt: skip


def predicted(records: Sequence[dict], seen: Sequence[tuple[str, Row]]) -> Table:
    """Predicted times at V3's shapes, next to those that a GPU measured at exactly that size."""
    sizes = {(g.op, g.backend, g.shape): dimensions(text(g.size))
             for g in predictions.SHAPES if not g.note}  # fmt: skip
    lines = [_prediction(r, sizes.get((r["op"], r["backend"], r["shape"])), seen) for r in records]
    columns = [
        Column("op", False), Column("target", False), Column("backend", False),
        Column("shape", False), Column("roof µs", title="by the vendor's peak rates"),
        Column("predicted µs"), Column("measured µs"), _SHARES[0], *_SHARES[2:],
        Column("binding limit", False),
    ]  # fmt: skip
    return Table("predictions", "At the shapes of DeepSeek-V3", columns, lines,
                 options(lines, "target", "backend"))  # fmt: skip


def _prediction(r: dict, size: dict | None, seen: Sequence[tuple[str, Row]]) -> Line:
    target = ARCHS[r["target"]]
    roof = limits.roof(Cost(r["bytes"], r["flops"], r["fp8"]), target) * 1e6
    memory = r["bytes"] / target.bandwidth / 1e3
    predicted = max(r["seconds"] * 1e6, roof)
    time, reached = _measured(r, size, seen)
    shares = _predicted(None, roof / predicted, reached)
    cells = [
        Cell(r["op"], kind="op"), Cell(r["target"]), Cell(r["backend"]),
        Cell(r["shape"], kind="size"), count(roof), count(predicted),
        count(time) if time else Cell("not measured", None, "n unknown"), shares[0], *shares[2:],
        Cell("HBM" if memory >= r["seconds"] * 1e6 else r["binding"]),
    ]  # fmt: skip
    return Line(cells, {"target": r["target"], "backend": r["backend"]})


def _measured(
    r: dict, size: dict | None, seen: Sequence[tuple[str, Row]]
) -> tuple[float | None, float | None]:
    """(µs, share of the roof) of the same op, target, backend and size; None if not measured."""
    for target, row in seen:
        if (target, row.op) == (r["target"], r["op"]) and dimensions(row.size) == size:
            for record in row.ours():
                if record["provider"] == f"deepkern {r['backend']}":
                    return row.time(record), record["roof_share"]
    return None, None


# Static inspection.


def inspected(committed: Mapping[tuple, dict]) -> Table:
    """Resources of each kernel on each target, over its variants."""
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for (op, kernel, _, target), budget in committed.items():
        groups.setdefault((op, kernel, target), []).append(budget)
    lines = [_inspected(*key, variants) for key, variants in sorted(groups.items())]
    columns = [
        Column("op", False), Column("kernel", False), Column("target", False),
        Column("variants", title="tiles and flags that a launch may choose"),
        Column("registers", title="per thread, from the fewest to the most of a variant"),
        Column("spilled B", title="a kernel that spills fails the tests"),
        Column("shared B", title="per block, the most of a variant"),
        Column("matrix instructions", False),
    ]  # fmt: skip
    return Table("inspection", "Compiled kernels", columns, lines,
                 options(lines, "family", "target"))  # fmt: skip


def _inspected(op: str, kernel: str, target: str, variants: Sequence[dict]) -> Line:
    registers = [v["registers"] for v in variants]
    fewest, most = min(registers), max(registers)
    shared = max(v["shared"] for v in variants)
    matrix = sorted({name for v in variants for name in v["matrix"]})
    cells = [
        Cell(op, kind="op"), Cell(kernel, kind="op"), Cell(target),
        Cell(str(len(variants)), len(variants), "n"),
        Cell(str(most) if fewest == most else f"{fewest} to {most}", most, "n"),
        Cell("0", 0, "n"), Cell(f"{shared:,}", shared, "n"), Cell(", ".join(matrix), kind="op"),
    ]  # fmt: skip
    return Line(cells, {"family": family_of(op), "target": target})


# History.


def history(name: str, device: Device, styles: Mapping[str, Style]) -> Table:
    """The ratio of each op and size to eager over all runs of a device."""
    points: dict[tuple[str, str], list] = {}
    for run in device.runs:
        rows: dict[tuple[str, str], Row] = {}
        for r in run.of("speed"):
            rows.setdefault((r["op"], r["size"]), Row(run, [])).records.append(r)
        for key, row in rows.items():
            if (ratio := row.best_ratio()) is not None:
                points.setdefault(key, []).append((run, row.ours()[0]["provider"], ratio))
    lines = [_past(op, size, found, styles) for (op, size), found in sorted(points.items())]
    columns = [
        Column("op", False), Column("size", False), Column("runs"), Column("first"),
        Column("newest"), Column("change", title="of the newest run against the one before"),
        Column("x eager, by run", title="the dashed line is eager's speed"),
    ]  # fmt: skip
    return Table(name, "Speed over PyTorch eager by run", columns, lines, options(lines, "family"))


def _past(op: str, size: str, found: list, styles: Mapping[str, Style]) -> Line:
    ratios = [ratio for *_, ratio in found]
    change = ratios[-1] / ratios[-2] - 1 if len(ratios) > 1 else None
    cells = [
        Cell(op, kind="op"), Cell(short(size), kind="size"),
        Cell(str(len(found)), len(found), "n"), times(ratios[0]), times(ratios[-1]),
        Cell("" if change is None else f"{change:+.0%}", change, "n"),
        Cell("", ratios[-1], "spark", plot=figures.history(found, styles)),
    ]  # fmt: skip
    return Line(cells, {"family": family_of(op)})


# The model.


def model(name: str, records: Sequence[dict]) -> Table:
    """The model's figures that are numbers; bars compare those of one unit."""
    numbers = [r for r in records if r["unit"] != "text"]
    most = max((r["value"] for r in numbers if r["unit"] == "tokens/s"), default=1.0)
    kinds = {True: "right", False: "wrong", None: ""}
    lines = [
        Line([Cell(r["name"]),
              Cell(number(r["value"]) if r["unit"] == "tokens/s" else f"{r['value']:.5g}",
                   r["value"], "n",
                   bar=r["value"] / most if r["unit"] == "tokens/s" else None),
              Cell(r["unit"]),
              Cell({True: "agrees", False: "wrong", None: ""}[r["ok"]], kind=kinds[r["ok"]]),
              Cell(r["note"], kind="note wrong" if r["ok"] is False else "note")], {})
        for r in numbers
    ]  # fmt: skip
    columns = [Column("figure", False), Column("value"), Column("unit", False),
               Column("check", False), Column("note", False)]  # fmt: skip
    return Table(name, "Figures of the model", columns, lines)
