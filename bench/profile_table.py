"""The profile of an op as tables for a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from deepkern.runtime.profile import Launch

from . import limits, profile
from .listing import Listing
from .profile import Profile

BAR = 24  # characters of the longest limit


def show(console: Console, report: Profile, most: int = 10) -> None:
    part = f"{report.target} ({report.arch.part})"
    size = ", ".join(f"{name}={value}" for name, value in report.size.items())
    console.print(f"[bold]{report.op}[/] on {part} at {escape(size) or 'its first small size'}")
    console.print(
        f"roof {microseconds(report.roof)}: {amount(report.cost.flops)}FLOP useful, "
        f"{amount(report.cost.bytes)}B at least. At most {report.bound:.1%} of the roof; "
        f"{report.predicted:.1%} predicted."
    )
    for index, launch in enumerate(report.launches):
        console.print(headline(report, index), markup=False, soft_wrap=True, style="bold")
        console.print(limit_table(limits.times(launch, report.arch)))
        console.print("instructions of warps: " + counted(profile.by_kind(launch)))
        console.print(access_table(launch, most))
        console.print(line_table(launch, most))


def headline(report: Profile, index: int) -> str:
    launch = report.launches[index]
    known = profile.registers(report, index)
    resident = limits.resident_blocks(launch, report.arch, known)
    limit = min(resident, key=lambda name: resident[name])
    grid = " x ".join(map(str, launch.grid))
    ran = "" if launch.blocks_run == launch.blocks else f", {launch.blocks_run} of them run"
    spread = "equal work" if launch.uniform else "unequal work"
    registers = f"{known} registers" if known else "registers unknown"
    imbalance = limits.imbalance(launch, report.arch)
    return (
        f"{launch.kernel} [{report.configs[index]}]: grid {grid} = {launch.blocks} blocks{ran} of "
        f"{launch.threads} threads, {spread}; {launch.shared / 1024:.1f} KiB shared, {registers}, "
        f"{resident[limit]} blocks per SM ({limit}); busiest SM has {imbalance:.2f}x the mean"
    )


def limit_table(times: dict[str, float]) -> Listing:
    view = Listing()
    view.add_columns("limit")
    view.add_columns("at least", numeric=True)
    view.add_columns("")
    longest = max(times.values(), default=0) or 1
    for name, seconds in sorted(times.items(), key=lambda x: -x[1]):
        kind = "" if name in limits.CERTAIN else " (estimate)"
        bar = "█" * round(BAR * seconds / longest)
        view.add_row(limits.NAMES[name] + kind, microseconds(seconds), bar)
    return view


def access_table(launch: Launch, most: int) -> Listing:
    view = Listing("Global memory")
    view.add_columns("access", "source")
    view.add_columns("executed", "bytes", "sectors", "used of each", numeric=True)
    for x in profile.accesses(launch)[:most]:
        numbers = (x.executed, x.bytes, x.sectors)
        view.add_row(escape(x.opcode), escape(x.location), *map(amount, numbers), f"{x.used:.0%}")
    return view


def line_table(launch: Launch, most: int) -> Listing:
    view = Listing("Source lines")
    view.add_columns("line")
    view.add_columns("instructions", "sectors", "shared passes", "conflicts", "tensor FLOP",
                     numeric=True)  # fmt: skip
    view.add_columns("source")
    for x in profile.lines(launch)[:most]:
        conflicts = x.wavefronts - x.least_wavefronts
        numbers = (x.issued, x.sectors, x.wavefronts, conflicts, x.flops)
        where = f"{profile.short(x.file)}:{x.number}"
        view.add_row(where, *(amount(n) if n else "" for n in numbers), escape(x.text))
    return view


def counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {amount(n)}" for name, n in counts.items())


def amount(value: float) -> str:
    """Three significant digits with K, M, G or T."""
    for power, letter in ((12, "T"), (9, "G"), (6, "M"), (3, "K")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {letter}"
    return f"{value:.3g} "


def microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:,.3g} µs" if seconds < 1e-3 else f"{1e3 * seconds:,.3g} ms"
