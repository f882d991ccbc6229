"""A table for a terminal of any width, a pipe or a log: no cell is cut, no line is padded."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

GAP, INDENT = "  ", "    "


@dataclass
class Row:
    cells: list[Text]
    heading: str
    note: str
    style: str


@dataclass
class Listing:
    """Columns without borders. What does not fit in a line goes to a further, indented line.

    A rich `Table` shortens cells to fit, numbers too, and has no line over the whole width, which
    the long names of ops and sizes need.
    """

    title: str = ""
    names: list[Text] = field(default_factory=list)
    numeric: list[bool] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def add_columns(self, *names: str, numeric: bool = False) -> None:
        self.names += [Text(name, style="bold") for name in names]
        self.numeric += [numeric] * len(names)

    def add_row(self, *cells: str, heading: str = "", note: str = "", style: str = "dim") -> None:
        """A row of markup.

        heading: plain text above the row, unless the row before has the same; note: plain text
        below, in `style`. Both wrap.
        """
        self.rows.append(Row([Text.from_markup(cell) for cell in cells], heading, note, style))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = [self.names, *(row.cells for row in self.rows)]
        widths = [max(cell.cell_len for cell in column) for column in zip(*table, strict=True)]
        lines = folded(widths, options.max_width)
        if self.title:
            yield from wrapped(self.title, "", options.max_width, "italic")
        yield from self.line(self.names, widths, lines, console, options.max_width)
        heading = ""
        for row in self.rows:
            if row.heading != heading:
                yield from wrapped(row.heading, "", options.max_width, "bold")
                heading = row.heading
            yield from self.line(row.cells, widths, lines, console, options.max_width)
            yield from wrapped(row.note, INDENT, options.max_width, row.style)

    def line(
        self, cells: Sequence[Text], widths: Sequence[int], lines: Iterable[Sequence[int]],
        console: Console, room: int,
    ) -> Iterator[Text]:  # fmt: skip
        """A row as one line of text, or as several. A cell longer than a line is wrapped."""
        for number, columns in enumerate(lines):
            parts = [padded(cells[i], widths[i], self.numeric[i]) for i in columns]
            text = Text(INDENT if number else "").append_text(Text(GAP).join(parts))
            text.rstrip()
            for part in text.wrap(console, room) if text.plain else ():
                part.rstrip()
                yield part


def folded(widths: Sequence[int], room: int) -> list[list[int]]:
    """The columns of each line of a row: as many as fit in `room`, at least one."""
    lines: list[list[int]] = [[]]
    used = 0
    for column, width in enumerate(widths):
        if lines[-1] and used + width > room:
            lines.append([])
            used = len(INDENT)
        lines[-1].append(column)
        used += width + len(GAP)
    return lines


def padded(cell: Text, width: int, numeric: bool) -> Text:
    cell = cell.copy()
    (cell.pad_left if numeric else cell.pad_right)(width - cell.cell_len)
    return cell


def wrapped(text: str, indent: str, width: int, style: str) -> Iterator[Text]:
    """Lines of at most `width`."""
    for line in textwrap.wrap(
        text, max(width, 20), initial_indent=indent, subsequent_indent=indent,
        break_on_hyphens=False,
    ):  # fmt: skip
        yield Text(line, style=style)
