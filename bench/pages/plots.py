"""Axes, marks and lines of plots. x is in percent of the plot's width, y in pixels from its top.

So a plot has any width without script, and its text keeps its size on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..results import is_ours

# Multiples of a power of ten at which a logarithmic axis has ticks, the densest first.
_STEPS = ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1, 3), (1,))
ROW = 22  # height of a row of a strip


class Style(NamedTuple):
    """How the marks of a provider look: CSS classes and the id of a shape of macros.html."""

    series: str
    shape: str


# Colours are c0, c1, ... of layout.css.
_FIXED = {"deepkern cuda": 0, "deepkern triton": 1, "deepkern cpu": 2, "deepkern torch": 3,
          "eager": 4, "compile": 5}  # fmt: skip
_COLOURS = 10
_SHAPES = ("diamond", "square", "triangle", "wedge", "beam")


def styles(providers: Sequence[str]) -> dict[str, Style]:
    """A style per provider: filled circles for deepkern, hollow shapes for others."""
    ours = [name for name in providers if is_ours(name)]
    others = [name for name in providers if name not in ours]
    free = range(len(_FIXED), _COLOURS)  # for the names without a colour of their own
    named = [name for name in providers if name not in _FIXED]
    colours = {**_FIXED, **{name: free[i % len(free)] for i, name in enumerate(named)}}
    return {
        **{name: Style(f"c{colours[name]} ours", "circle") for name in ours},
        **{name: Style(f"c{colours[name]}", _SHAPES[i % len(_SHAPES)])
           for i, name in enumerate(others)},
    }  # fmt: skip


class Tick(NamedTuple):
    at: float
    text: str


class Mark(NamedTuple):
    """A point. `tip` is its tooltip, of several lines."""

    x: float
    y: float
    style: Style
    provider: str
    tip: str


class Segment(NamedTuple):
    """A straight line between two points."""

    x1: float
    y1: float
    x2: float
    y2: float
    kind: str  # CSS classes
    provider: str = ""


class Label(NamedTuple):
    x: float
    y: float
    text: str
    anchor: str  # "start" or "end"


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis from `low` to `high` over `length`."""

    low: float
    high: float
    length: float = 100.0

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return round(share * self.length, 2)

    def up(self, value: float) -> float:
        """The position from the other end: a vertical axis grows upwards."""
        return round(self.length - self(value), 2)

    def ticks(self, most: int = 6) -> list[Tick]:
        return [Tick(self(value), plain(value)) for value in self._values(most)]

    def ticks_up(self, most: int = 5) -> list[Tick]:
        return [Tick(self.up(value), plain(value)) for value in self._values(most)]

    def _values(self, most: int) -> list[float]:
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        powers = [10.0**n for n in range(first, last + 1)]
        for steps in _STEPS:
            values = [power * step for power in powers for step in steps]
            inside = [v for v in values if self.low <= v * 1.0001 and v <= self.high * 1.0001]
            if len(inside) <= most:
                return inside
        return inside[:: math.ceil(len(inside) / most)]


def axis(values: Iterable[float], length: float = 100.0, least_ratio: float = 4.0) -> Axis:
    """An axis with room around `values`, at least `least_ratio` from end to end."""
    values = [v for v in values if v > 0 and math.isfinite(v)] or [1.0]
    low, high = min(values), max(values)
    room = max((high / low) ** 0.06, math.sqrt(max(1.0, least_ratio * low / high)), 1.05)
    return Axis(low / room, high * room, length)


def times(value: float) -> str:
    """A ratio."""
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:,.{digits}f}x"


def plain(value: float) -> str:
    """At most three digits and K or M; no exponent above 1e-4."""
    for power, letter in ((1e6, "M"), (1e3, "K")):
        if value >= power:
            return f"{value / power:.3g}{letter}"
    return f"{value:.3g}"


def trace(marks: Sequence[Mark]) -> list[Segment]:
    """Lines that connect marks in their order."""
    return [
        Segment(a.x, a.y, b.x, b.y, f"trace {a.style.series}", a.provider)
        for a, b in zip(marks, marks[1:], strict=False)
    ]


@dataclass(frozen=True)
class Bar:
    """A row of a strip: a label, the marks, and a value as text."""

    label: str
    marks: list[Mark]
    value: str
    slow: bool = False
    note: str = ""  # why there is no mark


@dataclass(frozen=True)
class Strip:
    """Rows of marks over one horizontal axis."""

    title: str
    summary: str
    ticks: list[Tick]
    bars: list[Bar]
    line: Tick | None = None  # a vertical line through all rows, with its text


@dataclass(frozen=True)
class Plane:
    """A plot with two axes."""

    title: str
    subtitle: str
    x_unit: str
    y_unit: str
    height: int
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    marks: list[Mark]
    segments: list[Segment] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
