"""The profile of an op as one HTML file without further files."""

from __future__ import annotations

from html import escape

from deepkern.runtime.profile import Launch

from . import limits, profile
from .profile import Profile
from .profile_table import amount, counted, headline, microseconds

_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 78rem; padding: 0 1rem; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; width: 100%; }
th { text-align: left; border-bottom: 2px solid #888; }
td, th { padding: .1rem .6rem; white-space: nowrap; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
td.code { font-family: ui-monospace, monospace; white-space: pre; max-width: 40rem;
  overflow: hidden; text-overflow: ellipsis; }
td.bar { width: 60%; } td.bar div { background: #4878a8; height: .9rem; }
td.bar div.estimate { background: #b8b8b8; }
tr.hot td { background: #fff2d8; color: #000; }
@media (prefers-color-scheme: dark) { body { background: #16181b; color: #ddd; } }
"""


def page(report: Profile) -> str:
    size = ", ".join(f"{name}={value}" for name, value in report.size.items())
    title = f"{report.op} on {report.target} ({report.arch.part})"
    head = (
        f"<h1>{escape(title)}</h1><p>{escape(size)}</p>"
        f"<p>Roof {microseconds(report.roof)}: {amount(report.cost.flops)}FLOP useful, "
        f"{amount(report.cost.bytes)}B at least. At most <b>{report.bound:.1%}</b> of the roof; "
        f"{report.predicted:.1%} predicted with the estimates (gray).</p>"
    )
    parts = [_launch(report, i) for i in range(len(report.launches))]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style><body>{head}{''.join(parts)}</body></html>\n"
    )


def _launch(report: Profile, index: int) -> str:
    launch = report.launches[index]
    return (
        f"<h2>{escape(launch.kernel)}</h2><p>{escape(headline(report, index))}</p>"
        + _limits(limits.times(launch, report.arch))
        + f"<p>Instructions of warps: {escape(counted(profile.by_kind(launch)))}</p>"
        + _accesses(launch)
        + _lines(launch)
    )


def _limits(times: dict[str, float]) -> str:
    longest = max(times.values(), default=0) or 1
    rows = []
    for name, seconds in sorted(times.items(), key=lambda x: -x[1]):
        kind = "" if name in limits.CERTAIN else ' class="estimate"'
        bar = f'<div{kind} style="width:{100 * seconds / longest:.1f}%"></div>'
        rows.append(f'<tr><td>{escape(limits.NAMES[name])}<td class="n">{microseconds(seconds)}'
                    f'<td class="bar">{bar}')  # fmt: skip
    return f'<table><tr><th>limit<th class="n">at least<th>{"".join(rows)}</table>'


def _accesses(launch: Launch) -> str:
    head = ("executed", "bytes", "sectors", "of each sector used")
    rows = []
    for x in profile.accesses(launch):
        numbers = (amount(x.executed), amount(x.bytes), amount(x.sectors), f"{x.used:.0%}")
        cells = "".join(f'<td class="n">{n}' for n in numbers)
        rows.append(f'<tr><td class="code">{escape(x.opcode)}<td>{escape(x.location)}{cells}')
    names = "".join(f'<th class="n">{name}' for name in head)
    return f"<h3>Global memory</h3><table><tr><th>access<th>source{names}{''.join(rows)}</table>"


def _lines(launch: Launch) -> str:
    """All source lines in the order of their files; the ten with most instructions marked."""
    listed = profile.lines(launch)
    hot = {id(x) for x in listed[:10]}
    head = ("instructions", "sectors", "shared passes", "conflicts", "tensor FLOP")
    rows = []
    for x in sorted(listed, key=lambda x: (x.file, x.number)):
        conflicts = x.wavefronts - x.least_wavefronts
        numbers = (x.issued, x.sectors, x.wavefronts, conflicts, x.flops)
        cells = "".join(f'<td class="n">{amount(n) if n else ""}' for n in numbers)
        mark = ' class="hot"' if id(x) in hot else ""
        where = f"{escape(profile.short(x.file))}:{x.number}"
        rows.append(f'<tr{mark}><td>{where}{cells}<td class="code">{escape(x.text)}')
    names = "".join(f'<th class="n">{name}' for name in head)
    return f"<h3>Source lines</h3><table><tr><th>line{names}<th>{''.join(rows)}</table>"
