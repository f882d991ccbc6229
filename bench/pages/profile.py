"""The profile of an op as one HTML file without further files."""

from __future__ import annotations

from dataclasses import dataclass

from deepkern.runtime.profile import Launch

from .. import limits, profile
from ..profile import Profile
from ..profile_table import amount, counted, headline, microseconds
from . import render
from .cells import Cell, Column, Line, Table

HOT = 10  # source lines that are marked


@dataclass(frozen=True)
class Part:
    """What the page shows of a launch."""

    kernel: str
    headline: str
    instructions: str
    tables: list[Table]


def page(report: Profile) -> str:
    return render(
        "profile.html",
        title=f"{report.op} on {report.target} ({report.arch.part})",
        size=", ".join(f"{name}={value}" for name, value in report.size.items()),
        roof=microseconds(report.roof),
        flops=amount(report.cost.flops),
        bytes=amount(report.cost.bytes),
        bound=f"{report.bound:.1%}",
        predicted=f"{report.predicted:.1%}",
        parts=[_part(report, i) for i in range(len(report.launches))],
    )


def _part(report: Profile, index: int) -> Part:
    launch = report.launches[index]
    return Part(
        launch.kernel,
        headline(report, index),
        counted(profile.by_kind(launch)),
        [_limits(index, limits.times(launch, report.arch)), _accesses(index, launch),
         _lines(index, launch)],
    )  # fmt: skip


def _limits(index: int, times: dict[str, float]) -> Table:
    longest = max(times.values(), default=0) or 1
    lines = [
        Line([Cell(limits.NAMES[name]), Cell(microseconds(seconds), seconds, "n"),
              Cell("", seconds, "n wide" if name in limits.CERTAIN else "n wide estimate",
                   bar=seconds / longest)], {})
        for name, seconds in sorted(times.items(), key=lambda x: -x[1])
    ]  # fmt: skip
    columns = [Column("limit", False), Column("at least"), Column("of the longest")]
    return Table(f"limits-{index}", "Limits", columns, lines)


def _accesses(index: int, launch: Launch) -> Table:
    lines = [
        Line([Cell(x.opcode, kind="op"), Cell(x.location),
              *(Cell(amount(n), n, "n") for n in (x.executed, x.bytes, x.sectors)),
              Cell(f"{x.used:.0%}", x.used, "n", bar=x.used)], {})
        for x in profile.accesses(launch)
    ]  # fmt: skip
    columns = [Column("access", False), Column("source", False),
               *map(Column, ("executed", "bytes", "sectors", "of each sector used"))]  # fmt: skip
    return Table(f"accesses-{index}", "Global memory", columns, lines)


def _lines(index: int, launch: Launch) -> Table:
    """All source lines in the order of their files; those with most instructions marked."""
    listed = profile.lines(launch)
    hot = {id(x) for x in listed[:HOT]}
    lines = []
    for x in sorted(listed, key=lambda x: (x.file, x.number)):
        numbers = (x.issued, x.sectors, x.wavefronts, x.wavefronts - x.least_wavefronts, x.flops)
        cells = [
            Cell(f"{profile.short(x.file)}:{x.number}"),
            *(Cell(amount(n) if n else "", n, "n") for n in numbers),
            Cell(x.text, kind="code"),
        ]
        lines.append(Line(cells, {}, "hot" if id(x) in hot else ""))
    names = ("instructions", "sectors", "shared passes", "conflicts", "tensor FLOP")
    columns = [Column("line", False), *map(Column, names), Column("source", False)]
    return Table(f"lines-{index}", "Source lines", columns, lines)
