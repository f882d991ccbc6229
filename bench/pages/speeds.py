"""Rows of providers that were timed together, their ratios to PyTorch eager, and sizes as text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..families import FAMILIES, family_of
from ..results import Run, is_ours
from .devices import Device

EAGER = "eager"
# The dimension of a size that grows with the batch: the first of these that the size has.
ROWS = ("M", "T", "S", "B", "batch", "tokens")
_PAIR = re.compile(r"(\w+)=(\([^)]*\)|\S+)")


class Unit(NamedTuple):
    """In which FLOP/s are shown."""

    name: str
    per_tflops: float


def flops_unit(run: Run) -> Unit:
    return Unit("TFLOPS", 1.0) if run.machine["gpu"] else Unit("GFLOPS", 1e3)


@dataclass(frozen=True)
class Row:
    """An op at a size: the records of its providers, from one run."""

    run: Run
    records: list[dict]

    @property
    def op(self) -> str:
        return self.records[0]["op"]

    @property
    def size(self) -> str:
        return self.records[0]["size"]

    def time(self, record: dict) -> float | None:
        """Microseconds: the median on a GPU, the least on a CPU. None if not timed."""
        return record["median" if self.run.machine["gpu"] else "least"]

    def rate(self, record: dict) -> float | None:
        """FLOP/s in the unit of the run; None if not timed, or for an op without products."""
        rate = record["tflops"]
        return rate and rate * flops_unit(self.run).per_tflops

    def ratio(self, record: dict) -> float | None:
        """The time of PyTorch eager over that of `record`; None where either is missing."""
        eager = next((self.time(r) for r in self.records if r["provider"] == EAGER), None)
        own = self.time(record)
        return eager / own if eager and own else None

    def ours(self) -> list[dict]:
        """The timed records of deepkern, the fastest first."""
        return self._timed(True)

    def others(self) -> list[dict]:
        """The timed records of other providers, the fastest first."""
        return self._timed(False)

    def _timed(self, ours: bool) -> list[dict]:
        found = [r for r in self.records if is_ours(r["provider"]) is ours and self.time(r)]
        return sorted(found, key=lambda r: self.time(r) or 0.0)

    def best_ratio(self) -> float | None:
        """The ratio of deepkern's fastest provider."""
        ours = self.ours()
        return self.ratio(ours[0]) if ours else None


def rows(device: Device) -> list[Row]:
    """The newest rows of a device, by family and op."""
    found: dict[tuple[str, str], Row] = {}
    for run, record in device.records("speed"):
        found.setdefault((record["op"], record["size"]), Row(run, [])).records.append(record)
    return sorted(found.values(), key=lambda row: (_rank(row.op), row.op))


def _rank(op: str) -> int:
    return FAMILIES.index(family_of(op)) if family_of(op) in FAMILIES else len(FAMILIES)


def mean(ratios: Sequence[float]) -> float:
    """The geometric mean."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def providers(rows: Iterable[Row]) -> list[str]:
    """The timed providers: deepkern's, then eager and compile, then the others."""

    def rank(name: str) -> tuple:
        return not is_ours(name), name != EAGER, name != "compile", name

    timed = {r["provider"] for row in rows for r in row.records if row.time(r)}
    return sorted(timed, key=rank)


def dimensions(size: str) -> dict[str, str]:
    """The names and values of a size: 'M=64 lengths=(8, 8)' -> {"M": "64", "lengths": "(8, 8)"}."""
    return dict(_PAIR.findall(size))


def short(size: str) -> str:
    """A size as text in which a tuple of equal values is 'lengths=(8192 x 64)'."""
    return _PAIR.sub(lambda pair: f"{pair[1]}={_short_tuple(pair[2])}", size)


def _short_tuple(value: str) -> str:
    items = re.findall(r"[^(), ]+", value) if value.startswith("(") else []
    if len(items) > 2 and len(set(items)) == 1:
        return f"({items[0]} x {len(items)})"
    return value


def series(size: str) -> tuple[str, str, int] | None:
    """(dimension, the rest of the size, value) of the rows; None for a size without such."""
    named = dimensions(size)
    name = next((n for n in ROWS if n in named and named[n].isdecimal()), None)
    if name is None:
        return None
    value = int(named.pop(name))
    return name, " ".join(f"{k}={v}" for k, v in named.items()), value
