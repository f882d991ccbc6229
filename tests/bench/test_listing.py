"""Tables at any width: no cell is cut, no line is longer than the terminal or padded."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from bench import command_line, report, summary
from bench.listing import Listing
from bench.timings import Speed
from tests.bench.synthetic_results import CPU, GPU, records


def shown(view, width: int) -> list[str]:
    output = io.StringIO()
    Console(file=output, width=width).print(view)
    return output.getvalue().splitlines()


def listing() -> Listing:
    view = Listing("A title of several words")
    view.add_columns("name")
    view.add_columns("first", "second", numeric=True)
    view.add_columns("words")
    view.add_row("a", "1", "[red]22,222", "x", heading="above", note="below this row")
    view.add_row("bb", "333.25", "4", "yes", heading="above")
    return view


def test_a_wide_table_has_one_line_per_row():
    assert shown(listing(), 60) == [
        "A title of several words",
        "name   first  second  words",
        "above",
        "a          1  22,222  x",
        "    below this row",
        "bb    333.25       4  yes",
    ]


def test_a_narrow_table_has_further_lines():
    assert shown(listing(), 20) == [
        "A title of several",
        "words",
        "name   first  second",
        "    words",
        "above",
        "a          1  22,222",
        "    x",
        "    below this row",
        "bb    333.25       4",
        "    yes",
    ]


def test_a_cell_longer_than_a_line_is_wrapped():
    view = Listing("")
    view.add_columns("name", "size")
    view.add_row("a", "M=1 N=2 skewed=True dtype=bf16")
    assert shown(view, 20) == ["name", "    size", "a", "    M=1 N=2", "skewed=True", "dtype=bf16"]


def speeds(found: list[dict]) -> list[Speed]:
    return [Speed(**{k: v for k, v in r.items() if k != "kind"}) for r in found
            if r["kind"] == "speed"]  # fmt: skip


@pytest.mark.parametrize("device", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("width", [80, 170])
def test_tables_of_a_run(device, width):
    """Of all ops: each number of a row is there, as it is in a table without a limit."""
    found = records(device)
    rows: dict[tuple, list[Speed]] = {}
    for s in speeds(found):
        rows.setdefault((s.op, s.size), []).append(s)
    for view in (
        report.timed(rows.values()),
        summary.agreement([r for r in found if r["kind"] == "check"]),
        summary.speed([r for r in found if r["kind"] == "speed"]),
        summary.model([r for r in found if r["kind"] == "model"]),
        summary.machine(found[0]),
    ):
        lines = shown(view, width)
        assert max(map(len, lines)) <= width
        assert all(line == line.rstrip() for line in lines)
        frame = str.maketrans("", "", "│╭╮╰╯─")
        narrow, wide = (sorted(" ".join(text).translate(frame).split())
                        for text in (lines, shown(view, 4000)))  # fmt: skip
        assert narrow == wide


@pytest.mark.parametrize(("columns", "width"), [(None, 170), ("80", 80), ("", 170)])
def test_the_width_of_a_pipe(columns, width, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert command_line.screen().width == width
