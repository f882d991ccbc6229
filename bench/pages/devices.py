"""The devices of a report, and the newest records of each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..results import Run

# The keys of a record that a newer run replaces; a newer run replaces all figures of the model.
SUBJECT = {"check": ("op", "backend"), "speed": ("op", "size"), "model": ()}


@dataclass(frozen=True)
class Device:
    """A device and its runs, the oldest first."""

    runs: list[Run]

    @property
    def name(self) -> str:
        return self.runs[-1].device

    @property
    def newest(self) -> Run:
        return self.runs[-1]

    @property
    def target(self) -> str | None:
        """The GPU's target, such as sm_90; None for a CPU."""
        gpu = self.newest.machine["gpu"]
        return gpu["target"] if gpu else None

    def records(self, kind: str) -> list[tuple[Run, dict]]:
        """The newest records of `kind` of every subject, with their runs."""
        latest = {_subject(record): run for run in self.runs for record in run.of(kind)}
        return [
            (run, record)
            for run in self.runs
            for record in run.of(kind)
            if latest[_subject(record)] is run
        ]

    def shown(self) -> list[Run]:
        """The runs with a record that is the newest, the newest first."""
        used = {id(run) for kind in SUBJECT for run, _ in self.records(kind)}
        return [run for run in reversed(self.runs) if id(run) in used] or [self.newest]


def _subject(record: dict) -> tuple:
    """What a record is about. A newer run's records replace those of the same subject."""
    return tuple(record[key] for key in SUBJECT[record["kind"]])


def of(runs: Iterable[Run]) -> list[Device]:
    """The devices of `runs`: GPUs first, then CPUs, the one with the newest run first."""
    named: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.machine["time"]):
        named.setdefault(run.device, []).append(run)
    newest_first = sorted(map(Device, named.values()), key=lambda d: d.newest.machine["time"])[::-1]
    return sorted(newest_first, key=lambda device: device.target is None)
