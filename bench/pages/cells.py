"""Tables: every cell has its text and the value that its column sorts by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..summary import number
from . import plots
from .plots import Plane


class Cell(NamedTuple):
    """`value` is what the column sorts by; None sorts last."""

    text: str
    value: float | str | None = None
    kind: str = ""  # CSS classes
    bar: float | None = None  # a share from 0 to 1, drawn behind the text
    strip: str = ""  # an SVG path of samples
    plot: Plane | None = None
    shares: Mapping[str, float | None] | None = None  # bound, predicted, measured


class Column(NamedTuple):
    name: str
    numeric: bool = True
    title: str = ""  # what it means


class Line(NamedTuple):
    """A row of a table. `filters` are the values that the selects above the table compare."""

    cells: list[Cell]
    filters: Mapping[str, str]
    kind: str = ""


@dataclass(frozen=True)
class Table:
    name: str  # an id in the page
    caption: str
    columns: list[Column]
    lines: list[Line]
    filters: Mapping[str, list[str]] = field(default_factory=dict)  # name -> its options


def options(lines: Sequence[Line], *names: str) -> dict[str, list[str]]:
    """The options of each filter, in the order of the lines."""
    return {name: list(dict.fromkeys(line.filters[name] for line in lines)) for name in names}


def count(value: float | None, kind: str = "n") -> Cell:
    """A number with three digits."""
    return Cell(number(value), value, kind)


def share(value: float | None) -> Cell:
    """A share as percent, with a bar."""
    if value is None:
        return Cell("", None, "n")
    return Cell(f"{value:.0%}" if value >= 0.1 else f"{value:.1%}", value, "n", bar=min(value, 1))


def times(value: float | None) -> Cell:
    """A ratio to eager."""
    if value is None:
        return Cell("", None, "n")
    return Cell(plots.times(value), value, "n slow" if value < 1 else "n fast")
