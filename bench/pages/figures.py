"""The figures of a device: ratios by family, roofline, bandwidth, speed over rows, history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..families import FAMILIES, family_of
from ..results import Run
from ..summary import number
from . import plots
from .devices import Device
from .plots import ROW, Axis, Bar, Label, Mark, Plane, Segment, Strip, Style, Tick, times
from .speeds import Row, Unit, flops_unit, mean, series, short

Styles = Mapping[str, Style]
ROOFLINE_HEIGHT = 380
PANEL_HEIGHT = 170
FEW_ROWS = 4
SPARK_HEIGHT = 26


def tip(row: Row, record: dict, *more: str) -> str:
    """The tooltip of a timed record."""
    ratio, share = row.ratio(record), record["roof_share"]
    words = [f"{number(row.time(record))} µs"]
    words += [f"{times(ratio)} the speed of eager"] if ratio else []
    words += [f"{share:.0%} of the roof ({record['limit']})"] if share else []
    return "\n".join([row.op, short(row.size), record["provider"], ", ".join(words), *more])


# Ratios by family.


def summaries(rows: Sequence[Row], styles: Styles) -> list[Strip]:
    """One strip per family, all with the same axis."""
    ratios = [row.ratio(r) for row in rows for r in row.ours()]
    shared = plots.axis([1.0, *(x for x in ratios if x)])
    names = [*FAMILIES, *sorted({family_of(row.op) for row in rows} - set(FAMILIES))]
    chosen = {name: [row for row in rows if family_of(row.op) == name] for name in names}
    return [_summary(name, chosen[name], shared, styles) for name in names if chosen[name]]


def _summary(name: str, rows: Sequence[Row], shared: Axis, styles: Styles) -> Strip:
    grouped = by_op(rows)
    ops = sorted(grouped, key=lambda op: -mean(best_ratios(grouped[op]) or [1e-9]))
    bars = [_ratios(op, grouped[op], shared, styles) for op in ops]
    return Strip(name, verdict(rows), shared.ticks(), bars, Tick(shared(1.0), "eager"))


def by_op(rows: Sequence[Row]) -> dict[str, list[Row]]:
    ops: dict[str, list[Row]] = {}
    for row in rows:
        ops.setdefault(row.op, []).append(row)
    return ops


def best_ratios(rows: Sequence[Row]) -> list[float]:
    """The ratios of deepkern's fastest provider, where there are both times."""
    return [ratio for row in rows if (ratio := row.best_ratio())]


def verdict(rows: Sequence[Row]) -> str:
    """The mean ratio of a family's sizes, and at how many another provider is faster."""
    ratios = best_ratios(rows)
    if not ratios:
        return "no size has both times"
    slower = sum(ratio < 1 for ratio in ratios)
    rivals = [row for row in rows if row.ours() and row.others()]
    behind = sum((row.time(row.others()[0]) or 0) < (row.time(row.ours()[0]) or 0)
                 for row in rivals)  # fmt: skip
    faster = f"at {behind} of {len(rivals)}" if rivals else "nowhere: there was none"
    return (
        f"{times(mean(ratios))} {_over(len(ratios))}; slower than eager at {slower}, than the "
        f"fastest other provider {faster}"
    )


def _over(count: int) -> str:
    return f"in the geometric mean of {count} sizes" if count > 1 else "at the only size"


def _ratios(op: str, rows: Sequence[Row], shared: Axis, styles: Styles) -> Bar:
    marks = [
        Mark(shared(ratio), ROW / 2, styles[r["provider"]], r["provider"], tip(row, r))
        for row in rows
        for r in row.ours()
        if (ratio := row.ratio(r))
    ]
    best = best_ratios(rows)
    if not best:
        return Bar(op, [], "no ratio", note=_missing(rows))
    value = times(mean(best))
    if len(best) > 1:
        value += f" ({times(min(best))[:-1]} to {times(max(best))[:-1]})"
    return Bar(op, marks, value, slow=mean(best) < 1)


def _missing(rows: Sequence[Row]) -> str:
    """Why an op has no ratio: the first note of a provider without a time."""
    notes = (f"{r['provider']}: {r['note']}" for row in rows for r in row.records if r["note"])
    return next(notes, "eager was not timed")


# Roofline.


def roofline(device: Device, rows: Sequence[Row], styles: Styles) -> Plane | None:
    """FLOP/s over arithmetic intensity of the ops that multiply, under the measured ceilings."""
    points = [(row, r, rate, r["flops"] / r["bytes"]) for row in rows
              for r in (*row.others(), *row.ours())
              if (rate := row.rate(r)) and r["bytes"]]  # fmt: skip
    ceilings, unit = device.newest.machine["ceilings"], flops_unit(device.newest)
    if not points or not ceilings:
        return None
    rates = {name: rate * unit.per_tflops for name, rate in ceilings["matmul_tflops"].items()}
    xs = plots.axis([intensity for *_, intensity in points])
    ys = plots.axis([*(rate for _, _, rate, _ in points), *rates.values()], ROOFLINE_HEIGHT)
    marks = [
        Mark(xs(intensity), ys.up(rate), styles[r["provider"]], r["provider"],
             tip(row, r, f"{number(rate)} {unit.name}, {number(intensity)} FLOP/B"))
        for row, r, rate, intensity in points
    ]  # fmt: skip
    segments, labels = _roofs(ceilings["copy_gb_per_s"], rates, unit, xs, ys)
    return Plane("Roofline", f"{len(points)} points: ops that multiply", "FLOP per byte", unit.name,
                 ROOFLINE_HEIGHT, xs.ticks(7), ys.ticks_up(6), marks, segments,
                 labels)  # fmt: skip


def _roofs(
    copy: float, rates: Mapping[str, float], unit: Unit, xs: Axis, ys: Axis
) -> tuple[list[Segment], list[Label]]:
    """The bandwidth's slope up to the highest rate, and a level per dtype from the slope on."""
    slope = copy / 1e3 * unit.per_tflops  # FLOP/s per FLOP/B
    left, right = max(xs.low, ys.low / slope), xs.high
    end = min(max(rates.values(), default=ys.high) / slope, right)
    segments, labels = [], []
    if left < end:
        segments.append(Segment(xs(left), ys.up(left * slope), xs(end), ys.up(end * slope), "roof"))
        labels.append(_slope_label(f"copy {number(copy)} GB/s", slope, left, end, xs, ys))
    above = float("inf")
    for name, rate in sorted(rates.items(), key=lambda item: item[1]):
        start = max(rate / slope, xs.low)
        if start >= right:
            continue
        y = ys.up(rate)
        segments.append(Segment(xs(start), y, 100.0, y, "roof"))
        above = min(y + 4, above - 13)  # labels of close levels do not overlap
        labels.append(Label(101.0, above, f"{name} {number(rate)}", "start"))
    return segments, labels


def _slope_label(text: str, slope: float, left: float, end: float, xs: Axis, ys: Axis) -> Label:
    """Left of the slope's upper end, or below its middle where there is no space on the left."""
    if xs(end) > 40:
        return Label(xs(end) - 2, ys.up(end * slope) + 4, text, "end")
    middle = (left * end) ** 0.5
    return Label(xs(middle) + 2, ys.up(middle * slope) + 14, text, "start")


def bandwidths(device: Device, rows: Sequence[Row], styles: Styles) -> Strip | None:
    """GB/s of the ops without products, next to the copy's bandwidth."""
    chosen = [row for row in rows if not row.records[0]["flops"] and (row.ours() or row.others())]
    ceilings = device.newest.machine["ceilings"]
    if not chosen or not ceilings:
        return None
    copy = ceilings["copy_gb_per_s"]
    timed = [r for row in chosen for r in (*row.others(), *row.ours()) if r["gb_per_s"]]
    xs = plots.axis([copy, *(r["gb_per_s"] for r in timed)])
    bars = [_bandwidth(op, own, xs, styles) for op, own in by_op(chosen).items()]
    return Strip("Bandwidth", "GB/s of ops without products. A cache can be faster than the copy.",
                 xs.ticks(), bars, Tick(xs(copy), f"copy: {number(copy)} GB/s"))  # fmt: skip


def _bandwidth(op: str, rows: Sequence[Row], xs: Axis, styles: Styles) -> Bar:
    marks = [
        Mark(xs(r["gb_per_s"]), ROW / 2, styles[r["provider"]], r["provider"],
             tip(row, r, f"{number(r['gb_per_s'])} GB/s"))
        for row in rows
        for r in (*row.others(), *row.ours())
        if r["gb_per_s"]
    ]  # fmt: skip
    ours = [r["gb_per_s"] for row in rows for r in row.ours()[:1] if r["gb_per_s"]]
    return Bar(op, marks, f"{number(max(ours))} GB/s" if ours else "not timed")


# Speed over rows.


def panels(rows: Sequence[Row], styles: Styles) -> list[Plane]:
    """A plot per series of sizes that differ only in the number of rows, by FEW_ROWS or more."""
    grouped: dict[tuple[str, str, str], list[tuple[int, Row]]] = {}
    for row in rows:
        found = series(row.size)
        if found is not None:
            name, rest, value = found
            grouped.setdefault((row.op, name, rest), []).append((value, row))
    planes = []
    for (op, name, rest), points in grouped.items():
        points.sort(key=lambda point: point[0])
        far = points[-1][0] >= FEW_ROWS * points[0][0]
        if far and any(row.ours() for _, row in points):
            planes.append(_panel(op, name, rest, points, styles))
    return planes


def _panel(
    op: str, name: str, rest: str, points: Sequence[tuple[int, Row]], styles: Styles
) -> Plane:
    first = points[0][1]
    multiplies = bool(first.records[0]["flops"])
    unit = flops_unit(first.run).name if multiplies else "GB/s"
    timed: dict[str, list[tuple[int, Row, dict, float]]] = {}
    for value, row in points:
        for r in (*row.others(), *row.ours()):
            if rate := row.rate(r) if multiplies else r["gb_per_s"]:
                timed.setdefault(r["provider"], []).append((value, row, r, rate))
    xs = plots.axis([value for value, _ in points])
    ys = plots.axis([rate for found in timed.values() for *_, rate in found], PANEL_HEIGHT)
    marks, lines = [], []
    for provider in sorted(timed, key=lambda name: name.startswith("deepkern")):
        own = [
            Mark(xs(value), ys.up(rate), styles[provider], provider,
                 tip(row, r, f"{number(rate)} {unit}"))
            for value, row, r, rate in timed[provider]
        ]  # fmt: skip
        marks += own
        lines += plots.trace(own)
    return Plane(op, short(rest), name, unit, PANEL_HEIGHT,
                 _value_ticks(xs, [value for value, _ in points]), ys.ticks_up(), marks,
                 lines)  # fmt: skip


def _value_ticks(xs: Axis, values: Sequence[int], apart: float = 11.0) -> list[Tick]:
    """Ticks at the values themselves, without those that are close to the one before."""
    ticks: list[Tick] = []
    for value in sorted(set(values)):
        if not ticks or xs(value) - ticks[-1].at >= apart:
            ticks.append(Tick(xs(value), str(value)))
    return ticks


# History.


def history(points: Sequence[tuple[Run, str, float]], styles: Styles) -> Plane:
    """Ratios of one op and size over (run, provider, ratio), the oldest first."""
    ys = plots.axis([1.0, *(ratio for *_, ratio in points)], SPARK_HEIGHT, least_ratio=1.5)
    step = 100 / max(len(points) - 1, 1)
    marks = [
        Mark(round(i * step, 2) if len(points) > 1 else 50.0, ys.up(ratio),
             Style(styles[provider].series, "dot"), provider,
             f"{times(ratio)} the speed of eager\n{provider}\n{when(run)}")
        for i, (run, provider, ratio) in enumerate(points)
    ]  # fmt: skip
    even = ys.up(1.0)
    return Plane("", "", "", "", SPARK_HEIGHT, [], [], marks,
                 [Segment(0.0, even, 100.0, even, "roof"), *plots.trace(marks)])  # fmt: skip


def when(run: Run) -> str:
    """The date and commit of a run."""
    return f"{run.machine['time'][:16].replace('T', ' ')}, {run.machine['commit'] or 'no commit'}"
