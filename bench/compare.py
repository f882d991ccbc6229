"""`python -m bench compare OLD NEW`: what became slower, faster or wrong between two runs.

**On a CPU** absolute times of two runs do not compare: a shared machine stalls for 8 ms at a time
and drifts by up to 2x within an hour. The call and the other providers of its row were timed in
turn. So we compare the ratio of its time to that of an anchor in the same round: to `eager`, or to
the provider with the most rounds where `eager` takes too long for enough of them. The interval of
the ratios' shift is `bench.noise.shift`. A call is slower if

- the whole interval of the shift of these ratios is above the threshold, and
- the ratio of the least times grew by more than the threshold, too. The least times have no stalls
  in them; the median does not depend on a single round.

The anchor corrects drift to first order only: load that slows it by 20 % can slow the call by 25 %.
So the interval is wider by DRIFT_SHARE of the anchor's own change, and there is no verdict if the
anchor changed by more than MOST_DRIFT. Both values come from pairs of runs of unchanged calls next
to 3 to 10 busy processes on two cores. Without the two rules up to 24 % of the pairs of a call were
reported, with them at most 1.5 %, and none for most calls (docs/measuring.md).

**On a GPU** CUDA events and steady clocks make absolute times comparable: the same test, on the
samples themselves. If a run notes throttled clocks, the report says so.

**False alarms.** ALPHA bounds the probability that any call is reported without cause: each of the
m calls is tested at ALPHA / m (Bonferroni). The bound is for noise within a run. The threshold and
the two rules above are for noise between runs: a call that did not change is reported only if noise
exceeds the threshold.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import results
from .noise import Shift, rounds_needed, shift
from .results import Run
from .summary import number

THRESHOLD = 0.05
ALPHA = 0.01
ANCHOR = "eager"
DRIFT_SHARE = 0.25
MOST_DRIFT = math.log(1.5)
# A rate of the model is one value per run: drift of a CPU up to 2x, of a GPU's clocks 10 %.
MODEL_NOISE = {"cpu": math.log(2.0), "gpu": math.log(1.1)}
SECONDS_OF_CALLS = 20  # --seconds of this many calls give a call the full number of rounds
LISTED = 10

WRONG, SLOWER, UNCLEAR, SAME, FASTER = "wrong", "slower", "unclear", "same", "faster"
STYLES = {WRONG: "bold red", SLOWER: "red", UNCLEAR: "yellow", SAME: "dim", FASTER: "green"}
VERSIONS = ("torch", "triton", "python")

Row = dict[str, dict]  # the records of an (op, size), by provider


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
    anchor: str = ""

    @property
    def order(self) -> tuple:
        """Wrong ones first, then by change, the slowest first."""
        return self.verdict != WRONG, -(self.shift.estimate if self.shift else 0.0), self.op


def rows(run: Run) -> dict[tuple[str, str], Row]:
    found: dict[tuple[str, str], Row] = {}
    for record in run.of("speed"):
        found.setdefault((record["op"], record["size"]), {})[record["provider"]] = record
    return found


def calls(run: Run) -> dict[tuple[str, str, str], Row]:
    """(op, size, provider) of each call of deepkern -> its row."""
    return {(*key, provider): row for key, row in rows(run).items() for provider in row
            if results.is_ours(provider)}  # fmt: skip


def checks(run: Run) -> dict[tuple[str, str, str], dict]:
    """(op, size, provider) -> everything that has been compared with a reference."""
    found = {(r["op"], r["size"], f"check on {r['backend']}"): r for r in run.of("check")}
    found |= {key: row[key[2]] for key, row in calls(run).items()}
    return found | {("model", r["name"], ""): r for r in run.of("model") if r["unit"] != "text"}


def incomparable(old: Run, new: Run) -> str | None:
    """Why times of the two runs do not compare; None if they do."""
    facts: dict[str, tuple] = {"device": (old.device, new.device)}
    if not old.machine["gpu"]:
        for key in ("threads", "isa"):
            facts[key] = old.machine.get(key), new.machine.get(key)
    different = [f"{key} {a} and {b}" for key, (a, b) in facts.items() if a != b]
    return "; ".join(different) or None


def wrong(old: Run, new: Run) -> Iterator[Change]:
    """What agreed in OLD and does not agree in NEW."""
    before = checks(old)
    for key, record in checks(new).items():
        if record["ok"] is False and key in before and before[key]["ok"] is not False:
            yield Change(*key, WRONG, record["note"])


def timed(old: Run, new: Run, threshold: float) -> list[Change]:
    """The verdicts on the speed of all calls that both runs have timed."""
    before, after = calls(old), calls(new)
    common = [key for key, row in after.items() if row[key[2]]["samples"]
              and key in before and before[key][key[2]]["samples"]]  # fmt: skip
    alpha, limit = ALPHA / max(len(common), 1), math.log1p(threshold)
    change = on_gpu if new.machine["gpu"] else on_cpu
    return [change(key, before[key], after[key], alpha, limit) for key in common]


def on_gpu(
    key: tuple[str, str, str], before: Row, after: Row, alpha: float, limit: float
) -> Change:
    """The change of the absolute times."""
    records = before[key[2]], after[key[2]]
    x, y = (np.log(record["samples"]) for record in records)
    moved = shift(x, y, alpha)
    verdict = judge(moved, y.min() - x.min(), limit)
    note = advice(records, moved, alpha, limit) if verdict == UNCLEAR else ""
    old, new = (record["median"] for record in records)
    return Change(*key, verdict, note, old, new, moved)


def on_cpu(
    key: tuple[str, str, str], before: Row, after: Row, alpha: float, limit: float
) -> Change:
    """The change of the times relative to the anchor's in the same round."""
    records = before[key[2]], after[key[2]]
    old, new = (record["least"] for record in records)
    name = choose_anchor(before, after, rounds_needed(alpha))
    if name is None:
        return Change(*key, UNCLEAR, "no other provider is timed in both runs", old, new)
    anchors = before[name], after[name]
    x, y = (ratios(record, anchor) for record, anchor in zip(records, anchors, strict=True))
    drift = math.log(anchors[1]["least"] / anchors[0]["least"])
    least = math.log(new / old) - drift
    moved = shift(x, y, alpha).widened(DRIFT_SHARE * abs(drift))
    verdict = UNCLEAR if abs(drift) > MOST_DRIFT else judge(moved, least, limit)
    note = ""
    if abs(drift) > MOST_DRIFT:
        factor = math.exp(abs(drift))
        note = f"{name} changed by {factor:.1f}x: run both again, one after the other"
    elif verdict == UNCLEAR:
        note = advice((*records, *anchors), moved, alpha, limit)
    return Change(*key, verdict, note, old, new, moved, name)


def choose_anchor(before: Row, after: Row, needed: int) -> str | None:
    """`eager` if it has enough rounds in both runs, else what has the most; None without any."""
    rounds = {name: min(len(row[name]["samples"]) for row in (before, after))
              for name in before if name in after and not results.is_ours(name)}  # fmt: skip
    if rounds.get(ANCHOR, 0) >= needed:
        return ANCHOR
    name = max(rounds, key=lambda name: (rounds[name], name == ANCHOR), default=None)
    return name if name and rounds[name] else None


def ratios(record: dict, anchor: dict) -> np.ndarray:
    """Logarithms, one per round that has both; a slow call has the first rounds only."""
    pairs = zip(record["samples"], anchor["samples"], strict=False)
    return np.array([math.log(own / other) for own, other in pairs])


def advice(records: Iterable[dict], moved: Shift, alpha: float, limit: float) -> str:
    """What would help to tell whether a call changed; `records` have its times and the anchor's."""
    rounds, needed = min(len(r["samples"]) for r in records), rounds_needed(alpha)
    if rounds < needed:
        seconds = math.ceil(SECONDS_OF_CALLS * max(r["median"] for r in records) / 1e6)
        return f"{rounds} rounds, {needed} are needed: --seconds {seconds}"
    if moved.low > limit or moved.high < -limit:
        return "least and median disagree: run again"
    return "too noisy: an idle machine helps, on a CPU OMP_NUM_THREADS=1 and --seconds 0.01, too"


def judge(moved: Shift, least: float, limit: float) -> str:
    """The verdict if both the interval and the least times support one."""
    if moved.low > limit and least > limit:
        return SLOWER
    if moved.high < -limit and least < -limit:
        return FASTER
    if -limit <= moved.low and moved.high <= limit and abs(least) <= limit:
        return SAME
    return UNCLEAR


def rates(old: Run, new: Run, threshold: float) -> Iterator[Change]:
    """The verdicts on the model's tokens per second: one value per run, so only large changes."""
    noise = MODEL_NOISE["gpu" if new.machine["gpu"] else "cpu"]
    before = {r["name"]: r["value"] for r in old.of("model") if r["unit"] == "tokens/s"}
    for record in new.of("model"):
        if record["name"] in before and record["unit"] == "tokens/s":
            times = before[record["name"]], record["value"]
            least = math.log(times[0] / times[1])
            moved = Shift(least, least, least).widened(noise)
            verdict = judge(moved, least, math.log1p(threshold))
            note = "tokens/s; one value per run" if verdict == UNCLEAR else "tokens/s"
            yield Change("model", record["name"], "", verdict, note, *times, moved)


def vanished(old: Run, new: Run) -> list[str]:
    """What OLD has checked or timed and NEW has not, with the reason if it is known."""
    after, lost = checks(new), []
    for key, record in checks(old).items():
        name = " ".join(filter(None, key))
        if key not in after:
            lost.append(name)
        elif record.get("samples") and not after[key]["samples"] and after[key]["ok"] is not False:
            lost.append(f"{name} has no time: {after[key]['note']}")
    return lost


def warnings(old: Run, new: Run) -> Iterator[str]:
    """Facts of the two machines that may explain a change."""
    for key in VERSIONS:
        if old.machine[key] != new.machine[key]:
            yield f"{key} {old.machine[key]} and {new.machine[key]}: {ANCHOR} may have changed, too"
    for word, run in (("OLD", old), ("NEW", new)):
        reasons = (run.machine.get("clocks") or {}).get("throttled")
        if reasons:
            yield f"{word}: the GPU's clocks were throttled ({', '.join(reasons)})"


def table(changes: Iterable[Change], gpu: bool) -> Table:
    """The slowest change first."""
    view = Table(title="Change of the time", title_justify="left")
    for name in ("op", "size", "provider"):
        view.add_column(name)
    time = "median" if gpu else "least"
    for name in (f"old {time}", f"new {time}", "change"):
        view.add_column(name, justify="right")
    for name in ("relative to", "verdict", "note"):
        view.add_column(name)
    for c in sorted(changes, key=lambda change: change.order):
        times = map(number, (c.old, c.new))
        view.add_row(c.op, c.size, c.provider, *times, percent(c.shift), c.anchor,
                     f"[{STYLES[c.verdict]}]{c.verdict}", escape(c.note))  # fmt: skip
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
        before, after = results.load(old), results.load(new)
    except (OSError, results.Invalid, results.OldSchema) as error:
        return _refused(console, str(error))
    reason = incomparable(before, after)
    if reason and not across_devices:
        return _refused(console, f"{reason}; --across-devices compares them anyway")
    if not checks(before).keys() & checks(after).keys():
        return _refused(console, "the runs have no row in common")
    changes = [*wrong(before, after), *timed(before, after, threshold),
               *rates(before, after, threshold)]  # fmt: skip
    for word, r in (("OLD", before), ("NEW", after)):
        console.print(f"{word}  {r.file}: {r.device}, commit {r.machine['commit']}", markup=False)
    for line in warnings(before, after):
        console.print(line, style="yellow", markup=False)
    console.print(table(changes, bool(after.machine["gpu"])))
    lost = vanished(before, after)
    for line in [*lost[:LISTED], *([f"{len(lost) - LISTED} more"] if len(lost) > LISTED else [])]:
        console.print(f"not in NEW: {line}", style="yellow", markup=False)
    return _close(console, changes, threshold)


def _refused(console: Console, reason: str) -> int:
    console.print(f"cannot compare: {reason}", style="red", markup=False, soft_wrap=True)
    return 2


def _close(console: Console, changes: list[Change], threshold: float) -> int:
    if not changes:
        return _refused(console, "nothing is timed in both")
    counts = Counter(change.verdict for change in changes)
    parts = ", ".join(f"{counts[v]} {v}" for v in STYLES if counts[v])
    failed = bool(counts[SLOWER] or counts[WRONG])
    console.print(
        f"{parts}; threshold {threshold:.0%}, chance reports a call "
        f"in at most {ALPHA:.0%} of comparisons",
        style="bold red" if failed else "yellow" if counts[UNCLEAR] else "bold green",
        highlight=False,
    )
    return int(failed)
