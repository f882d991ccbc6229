"""The two sides of a comparison: each is one or more runs of one commit on one device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from . import results
from .results import Run

Key = tuple[str, str, str]  # op, size, provider

VERSIONS = ("torch", "triton", "python")


class Unfit(ValueError):
    """A path that is no side; the message says why."""


class Row(NamedTuple):
    """An op at a size in one run."""

    records: dict[str, dict]  # by provider
    mhz: float | None  # the GPU's SM clock under load, if the run noted it


@dataclass(frozen=True)
class Side:
    """`word` is "OLD" or "NEW"."""

    word: str
    path: Path
    runs: list[Run]

    @property
    def machine(self) -> dict:
        """Of the first run; the others have the same facts, but not the same time and clocks."""
        return self.runs[0].machine

    @property
    def dirty(self) -> bool:
        return (self.machine["commit"] or "").endswith("+")

    @property
    def title(self) -> str:
        count = f"{len(self.runs)} runs" if len(self.runs) > 1 else "1 run"
        commit = (self.machine["commit"] or "unknown").rstrip("+")
        changed = " with changed files (dirty)" if self.dirty else ""
        return f"{self.word}  {self.path}: {count}, {self.runs[0].device}, commit {commit}{changed}"


def load(word: str, path: Path) -> Side:
    """The run of a file, or all runs of a folder.

    Raises Unfit if there are none, or if they differ in device, threads, instruction set or commit,
    and what `results.load` raises.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise Unfit(f"{path}: no results (*.jsonl)")
    side = Side(word, path, [results.load(file) for file in files])
    first = side.runs[0]
    for run in side.runs[1:]:
        reason = different(facts(first), facts(run))
        if reason:
            names = f"{first.file.name} and {run.file.name}"
            raise Unfit(f"{path}: not runs of one side: {names}: {reason}")
    return side


def facts(run: Run) -> dict[str, object]:
    """What the runs of a side have in common; all but the commit must be equal on both sides."""
    found = {"device": run.device, "commit": run.machine["commit"]}
    if not run.machine["gpu"]:
        found |= {key: run.machine.get(key) for key in ("threads", "isa")}
    return found


def different(a: dict[str, object], b: dict[str, object]) -> str:
    """Such as "threads 2 and 1"; empty if all are equal."""
    return "; ".join(f"{key} {value} and {b[key]}" for key, value in a.items() if value != b[key])


def incomparable(old: Side, new: Side) -> str:
    """Why times of the two sides do not compare; empty if they do."""
    return different(*({**facts(side.runs[0]), "commit": None} for side in (old, new)))


def rows(run: Run) -> dict[tuple[str, str], Row]:
    mhz = (run.machine["clocks"] or {}).get("sm_mhz")
    found: dict[tuple[str, str], Row] = {}
    for record in run.of("speed"):
        row = found.setdefault((record["op"], record["size"]), Row({}, mhz))
        row.records[record["provider"]] = record
    return found


def timed(side: Side) -> dict[Key, list[Row]]:
    """The rows, one per run, of each call of deepkern that has a time."""
    found: dict[Key, list[Row]] = {}
    for run in side.runs:
        for (op, size), row in rows(run).items():
            for provider, record in row.records.items():
                if results.is_ours(provider) and record["samples"]:
                    found.setdefault((op, size, provider), []).append(row)
    return found


def checks(side: Side) -> dict[Key, dict]:
    """Everything that was compared with a reference; of several runs one that failed, if any."""
    found: dict[Key, dict] = {}
    for run in side.runs:
        for key, record in checked(run):
            found[key] = min(found.get(key, record), record, key=_order)
    return found


def _order(record: dict) -> tuple:
    return record["ok"] is not False, not record.get("samples")


def checked(run: Run) -> Iterator[tuple[Key, dict]]:
    for r in run.of("check"):
        yield (r["op"], r["size"], f"check on {r['backend']}"), r
    for r in run.of("speed"):
        if results.is_ours(r["provider"]):
            yield (r["op"], r["size"], r["provider"]), r
    for r in run.of("model"):
        if r["unit"] != "text":
            yield ("model", r["name"], ""), r


def rates(side: Side) -> dict[str, list[float]]:
    """The model's tokens per second, one value per run, by name."""
    found: dict[str, list[float]] = {}
    for run in side.runs:
        for record in run.of("model"):
            if record["unit"] == "tokens/s":
                found.setdefault(record["name"], []).append(record["value"])
    return found


def vanished(old: Side, new: Side) -> list[str]:
    """What OLD has checked or timed and NEW has not, with the reason if it is known."""
    after, lost = checks(new), []
    for key, record in checks(old).items():
        name = " ".join(filter(None, key))
        if key not in after:
            lost.append(name)
        elif record.get("samples") and not after[key]["samples"] and after[key]["ok"] is not False:
            lost.append(f"{name} has no time: {after[key]['note']}")
    return lost


def warnings(old: Side, new: Side) -> Iterator[str]:
    """Facts of the runs that may explain a change, or hide one."""
    for key in VERSIONS:
        versions = [sorted({run.machine[key] for run in side.runs}) for side in (old, new)]
        if versions[0] != versions[1] or len(versions[0]) > 1:
            a, b = (" or ".join(names) for names in versions)
            yield f"{key} {a} and {b}: eager may have changed, too"
    for side in (old, new):
        if side.dirty and len(side.runs) > 1:
            yield f"{side.word} is dirty: nothing shows that its runs are of the same code"
        reasons = {reason for run in side.runs for reason in _throttled(run)}
        if reasons:
            yield f"{side.word}: the GPU's clocks were throttled ({', '.join(sorted(reasons))})"
    times = [[run.machine["time"] for run in side.runs] for side in (old, new)]
    if min(map(len, times)) > 1 and (
        max(times[0]) < min(times[1]) or max(times[1]) < min(times[0])
    ):
        yield "all runs of one side are older than those of the other: alternate them"


def _throttled(run: Run) -> list[str]:
    return (run.machine["clocks"] or {}).get("throttled") or []
