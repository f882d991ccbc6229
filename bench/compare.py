"""`python -m bench compare OLD NEW`: what became slower, faster or wrong between two sides.

A side is one run, or a folder of runs that alternated with those of the other side.

**On a CPU** absolute times of two runs do not compare: a shared machine stalls for 8 ms at a time
and drifts by up to 2x within an hour. The call and the other providers of its row were timed in
turn. So we compare the ratio of its time to that of an anchor in the same round: to `eager`, or to
the provider with the most rounds where `eager` takes too long for enough of them. The interval of
the ratios' shift is `bench.noise.shift`: of the samples of all runs of a side, wider by what runs
of one side differ from each other. A call is slower if

- the whole interval of the shift of these ratios is above the threshold, and
- the ratio of the least times of all runs grew by more than the threshold, too. The least times
  have no stalls in them; the median does not depend on a single round.

The anchor corrects drift to first order only: load that slows it by 20 % can slow the call by 25 %.
So the interval is wider by DRIFT_SHARE of the anchor's own change, and there is no verdict if the
anchor changed by more than MOST_DRIFT. Both values come from pairs of runs of unchanged calls next
to 3 to 10 busy processes on two cores. Without the two rules up to 24 % of the pairs of a call were
reported, with them at most 1.5 %, and none for most calls (docs/measuring.md). Load that changes
between the runs and slows the call and its anchor differently shows in alternating runs alone.

**On a GPU** CUDA events and steady clocks make absolute times comparable: the same test, on the
samples themselves. The time of a call that the tensor cores limit follows the SM clock. If all runs
noted their clock under load, its anchor is the clock's period; the two rules above apply, too.
Calls that memory limits are compared as measured. If a run notes throttled clocks, the report says
so. Unmeasured on hardware.

**False alarms.** ALPHA bounds the probability that any call is reported without cause: each of the
m calls is tested at ALPHA / m (Bonferroni). With one run a side the bound is for noise within the
run; the threshold and the two rules are for noise between runs. With several it is for both.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from . import results, sides
from .listing import Listing
from .noise import Shift, between_runs, rounds_needed, shift
from .sides import Key, Row, Side
from .summary import number

THRESHOLD = 0.05
ALPHA = 0.01
EAGER, CLOCK = "eager", "SM clock"
DRIFT_SHARE = 0.25
MOST_DRIFT = math.log(1.5)
# A rate of the model is one value per run: drift of a CPU up to 2x, of a GPU's clocks 10 %.
MODEL_NOISE = {"cpu": math.log(2.0), "gpu": math.log(1.1)}
SECONDS_OF_CALLS = 20  # --seconds of this many calls give a call the full number of rounds
LISTED = 10

WRONG, SLOWER, UNCLEAR, SAME, FASTER = "wrong", "slower", "unclear", "same", "faster"
STYLES = {WRONG: "bold red", SLOWER: "red", UNCLEAR: "yellow", SAME: "dim", FASTER: "green"}

Rows = Sequence[Row]  # one per run of a side


class Anchor(NamedTuple):
    """What a change is relative to; `old` and `new` in µs, or in MHz for CLOCK."""

    name: str
    old: float
    new: float

    @property
    def drift(self) -> float:
        """The logarithm of its time's growth."""
        change = math.log(self.new / self.old)
        return -change if self.name == CLOCK else change


@dataclass(frozen=True)
class Change:
    """What became of one call; `shift` is the logarithm of the new time over the old one."""

    op: str
    size: str
    provider: str
    verdict: str
    note: str = ""
    old: float | None = None  # microseconds; tokens/s of the model
    new: float | None = None
    shift: Shift | None = None
    anchor: Anchor | None = None

    @property
    def order(self) -> tuple:
        """Wrong ones first, then by change, the slowest first."""
        return self.verdict != WRONG, -(self.shift.estimate if self.shift else 0.0), self.op

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.op, self.size, self.provider)))


def wrong(old: Side, new: Side) -> Iterator[Change]:
    """What agreed in OLD and does not agree in NEW."""
    before = sides.checks(old)
    for key, record in sides.checks(new).items():
        if record["ok"] is False and key in before and before[key]["ok"] is not False:
            yield Change(*key, WRONG, record["note"])


def timed(old: Side, new: Side, threshold: float) -> list[Change]:
    """The verdicts on the speed of all calls that both sides have timed."""
    before, after = sides.timed(old), sides.timed(new)
    common = [key for key in after if key in before]
    alpha, limit = ALPHA / max(len(common), 1), math.log1p(threshold)
    change = on_gpu if new.machine["gpu"] else on_cpu
    return [change(key, before[key], after[key], alpha, limit) for key in common]


def of(rows: Rows, provider: str) -> list[dict]:
    """The records of a provider in each run."""
    return [row.records[provider] for row in rows]


def on_gpu(key: Key, before: Rows, after: Rows, alpha: float, limit: float) -> Change:
    """The change of the absolute times, or of the clocks that a call takes."""
    records = of(before, key[2]), of(after, key[2])
    anchor = sm_clock(key, before, after)
    x, y = ([np.log(row.records[key[2]]["samples"]) + (math.log(row.mhz) if anchor else 0.0)
             for row in rows] for rows in (before, after))  # fmt: skip
    least = float(min(map(np.min, y)) - min(map(np.min, x)))
    old, new = (statistics.median([us for r in side for us in r["samples"]]) for side in records)
    moved = shift(x, y, alpha)
    change = Change(*key, UNCLEAR, "", old, new, moved, anchor)
    return concluded(change, least, records, alpha, limit)


def sm_clock(key: Key, before: Rows, after: Rows) -> Anchor | None:
    """The mean SM clocks, if all runs noted them and the tensor cores limit the call."""
    clocks = [[row.mhz for row in rows if row.mhz] for rows in (before, after)]
    if after[0].records[key[2]]["limit"] != "compute":
        return None
    if [len(side) for side in clocks] != [len(before), len(after)]:
        return None
    return Anchor(CLOCK, *map(statistics.fmean, clocks))


def on_cpu(key: Key, before: Rows, after: Rows, alpha: float, limit: float) -> Change:
    """The change of the times relative to the anchor's in the same round."""
    records = of(before, key[2]), of(after, key[2])
    old, new = (least_of(side) for side in records)
    name = choose_anchor(before, after, rounds_needed(alpha))
    if name is None:
        return Change(*key, UNCLEAR, "no other provider is timed in all runs", old, new)
    anchors = of(before, name), of(after, name)
    anchor = Anchor(name, *map(least_of, anchors))
    x, y = (list(map(ratios, *pair)) for pair in zip(records, anchors, strict=True))
    change = Change(*key, UNCLEAR, "", old, new, shift(x, y, alpha), anchor)
    least = math.log(new / old) - anchor.drift
    return concluded(change, least, (*records, *anchors), alpha, limit)


def least_of(records: Iterable[dict]) -> float:
    return min(record["least"] for record in records)


def choose_anchor(before: Rows, after: Rows, needed: int) -> str | None:
    """`eager` if it has enough rounds on both sides, else what has the most; None without any."""

    def rounds(name: str) -> int:
        return min(sum(len(r["samples"]) for r in of(rows, name)) for rows in (before, after))

    names = set.intersection(*({n for n, r in row.records.items() if r["samples"]}
                               for row in (*before, *after)))  # fmt: skip
    names = {name for name in names if not results.is_ours(name)}
    if EAGER in names and rounds(EAGER) >= needed:
        return EAGER
    return max(names, key=lambda name: (rounds(name), name == EAGER, name), default=None)


def ratios(record: dict, anchor: dict) -> np.ndarray:
    """Logarithms, one per round that has both; a slow call has the first rounds only."""
    pairs = zip(record["samples"], anchor["samples"], strict=False)
    return np.array([math.log(own / other) for own, other in pairs])


def concluded(
    change: Change, least: float, records: Sequence[list[dict]], alpha: float, limit: float
) -> Change:
    """`change` with its verdict, the interval that it follows from, and a note if it is unclear.

    least: the logarithm of the growth of the least time, relative to the anchor. records: those of
    a provider in each run of a side, for both sides, the call's and its anchor's.
    """
    drift = change.anchor.drift if change.anchor else 0.0
    moved = change.shift.widened(DRIFT_SHARE * abs(drift))
    verdict, note = judge(moved, least, limit), ""
    if abs(drift) > MOST_DRIFT:
        verdict = UNCLEAR
        note = (
            f"{change.anchor.name} changed by {math.exp(abs(drift)):.1f}x: run both again, in turn"
        )
    elif verdict == UNCLEAR:
        note = advice(records, moved, alpha, limit)
    return replace(change, verdict=verdict, note=note, shift=moved)


def advice(records: Sequence[list[dict]], moved: Shift, alpha: float, limit: float) -> str:
    """What would help to tell whether a call changed."""
    needed = rounds_needed(alpha)
    rounds = min(sum(len(r["samples"]) for r in runs) for runs in records)
    if rounds < needed:
        slowest = max(r["median"] for runs in records for r in runs)
        seconds = math.ceil(SECONDS_OF_CALLS * slowest / 1e6)
        return f"{rounds} rounds, {needed} are needed: --seconds {seconds}"
    if moved.low > limit or moved.high < -limit:
        return "least and median disagree: run again"
    return "too noisy: more alternating runs a side help, on a CPU OMP_NUM_THREADS=1, too"


def judge(moved: Shift, least: float, limit: float) -> str:
    """The verdict if both the interval and the least times support one."""
    if moved.low > limit and least > limit:
        return SLOWER
    if moved.high < -limit and least < -limit:
        return FASTER
    if -limit <= moved.low and moved.high <= limit and abs(least) <= limit:
        return SAME
    return UNCLEAR


def rates(old: Side, new: Side, threshold: float) -> Iterator[Change]:
    """The verdicts on the model's tokens per second: one value per run, so only large changes."""
    noise = MODEL_NOISE["gpu" if new.machine["gpu"] else "cpu"]
    before, after = sides.rates(old), sides.rates(new)
    for name in after:
        if name in before:
            x, y = ([[-math.log(rate)] for rate in side[name]] for side in (before, after))
            least = min(y)[0] - min(x)[0]
            middle = statistics.median(v for (v,) in y) - statistics.median(v for (v,) in x)
            moved = Shift(middle, middle, middle).widened(max(noise, between_runs(x, y, ALPHA)))
            verdict = judge(moved, least, math.log1p(threshold))
            note = "tokens/s, one value per run"
            yield Change("model", name, "", verdict, note, max(before[name]), max(after[name]),
                         moved)  # fmt: skip


def table(changes: Iterable[Change], gpu: bool) -> Listing:
    """The slowest change first. The change is that of the times over the anchor's."""
    time = "median" if gpu else "least"
    view = Listing(f"Change of the {time} time in µs, relative to the anchor's")
    view.add_columns("verdict", "change")
    view.add_columns("old", "new", numeric=True)
    view.add_columns("anchor")
    view.add_columns("its old", "its new", numeric=True)
    for c in sorted(changes, key=lambda change: change.order):
        name, *its = c.anchor or ("", None, None)
        cells = percent(c.shift), number(c.old), number(c.new), name, *map(number, its)
        view.add_row(f"[{STYLES[c.verdict]}]{c.verdict}", *cells, heading=c.name, note=c.note)
    return view


def percent(moved: Shift | None) -> str:
    """`+31 % (+26 to +36)`; without an interval the estimate only."""
    if moved is None:
        return ""
    estimate, *interval = (100 * math.expm1(min(x, 10.0)) for x in moved)
    bounds = f" ({interval[0]:+.0f} to {interval[1]:+.0f})" if math.isfinite(moved.low) else ""
    return f"{estimate:+.0f} %{bounds}"


def run(
    old: Path,
    new: Path,
    threshold: float = THRESHOLD,
    across_devices: bool = False,
    console: Console | None = None,
) -> int:
    """Prints what changed: 1 if a row is slower or wrong, 0 if none is, 2 if nothing compares."""
    from .command_line import screen

    console = console or screen()
    try:
        before, after = sides.load("OLD", old), sides.load("NEW", new)
    except (OSError, results.Invalid, results.OldSchema, sides.Unfit) as error:
        return _refused(console, str(error))
    reason = sides.incomparable(before, after)
    if reason and not across_devices:
        return _refused(console, f"{reason}; --across-devices compares them anyway")
    if not sides.checks(before).keys() & sides.checks(after).keys():
        return _refused(console, "the runs have no row in common")
    changes = [*wrong(before, after), *timed(before, after, threshold),
               *rates(before, after, threshold)]  # fmt: skip
    for side in (before, after):
        console.print(side.title, markup=False, highlight=False, soft_wrap=True)
    for line in sides.warnings(before, after):
        console.print(line, style="yellow", markup=False, soft_wrap=True)
    if changes:
        console.print(table(changes, bool(after.machine["gpu"])))
    lost = sides.vanished(before, after)
    for line in [*lost[:LISTED], *([f"{len(lost) - LISTED} more"] if len(lost) > LISTED else [])]:
        console.print(f"not in NEW: {line}", style="yellow", markup=False, soft_wrap=True)
    return _close(console, changes, threshold, [len(side.runs) for side in (before, after)])


def _refused(console: Console, reason: str) -> int:
    console.print(f"cannot compare: {reason}", style="red", markup=False, soft_wrap=True)
    return 2


def _close(console: Console, changes: list[Change], threshold: float, runs: list[int]) -> int:
    if not changes:
        return _refused(console, "nothing is timed in both")
    counts = Counter(change.verdict for change in changes)
    parts = ", ".join(f"{counts[v]} {v}" for v in STYLES if counts[v])
    failed = bool(counts[SLOWER] or counts[WRONG])
    a_side = f"{runs[0]} a side" if runs[0] == runs[1] else f"{runs[0]} old, {runs[1]} new"
    console.print(
        f"{parts}; {'runs' if max(runs) > 1 else 'run'}: {a_side}; threshold {threshold:.0%}, "
        f"chance reports a call in at most {ALPHA:.0%} of comparisons",
        style="bold red" if failed else "yellow" if counts[UNCLEAR] else "bold green",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return int(failed)
