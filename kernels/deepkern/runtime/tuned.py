"""Tiles that `python -m bench tune` found faster than the model's, as `configs/<target>.json`.

A file holds, for products of one form with given scales, groups and sizes, the tile that was the
fastest on a GPU of that target, and on which one. What varies from call to call (M; for groups of
columns K) is looked up at the nearest size that was tuned, within a factor of two; everything else
must be equal, or the model in `tiles.py` chooses. A file is read once, at the first launch.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "configs"
FORMS = ("dense", "m_grouped", "k_grouped")
REACH = 2  # how many times larger or smaller than the tuned size a call may be


@dataclass(frozen=True)
class Tuned:
    """One line of a file: the tile of one shape. Times in microseconds, `model` of the model's."""

    form: str
    b_rows: int  # rows of b that share a scale
    groups: int
    M: int  # as `tiles.gemm_tile` takes them: of one group
    N: int
    K: int
    tile: tuple[int, int, bool]  # BLOCK_M, BLOCK_N, spread
    time: float
    model: float
    on: str  # GPU, versions, commit and date
    file: str = ""  # where the line is from
    line: int = 0

    @property
    def key(self) -> tuple:
        """What a call must share with it."""
        fixed = (self.M, self.N) if self.form == "k_grouped" else (self.N, self.K)
        return self.form, self.b_rows, self.groups, fixed

    @property
    def varying(self) -> str:
        """The size that a call may differ in: 'M=64'."""
        return f"K={self.K}" if self.form == "k_grouped" else f"M={self.M}"

    @property
    def size(self) -> int:
        return self.K if self.form == "k_grouped" else self.M

    def error(self, expected: str, got: object) -> ValueError:
        """What is wrong with the line, and where it stands."""
        return ValueError(f"{self.file}: tiles[{self.line}]: expected {expected}, got {got!r}")

    def record(self) -> dict:
        """As it stands in a file."""
        fields = asdict(self)
        return {name: fields[name] for name in fields if name not in ("file", "line")}


def find(target: str, form: str, b_rows: int, groups: int, M: int, N: int, K: int) -> Tuned | None:
    """The line for this product, the nearest one in the size that varies, or None."""
    asked = Tuned(form, b_rows, groups, max(M, 1), N, max(K, 1), (0, 0, False), 0, 0, "")

    def distance(line: Tuned) -> float:
        return max(line.size / asked.size, asked.size / line.size)

    near = [x for x in load(target) if x.key == asked.key and distance(x) <= REACH]
    return min(near, key=distance, default=None)


@functools.cache
def load(target: str) -> tuple[Tuned, ...]:
    """What is committed for `target`, read once."""
    return read(FOLDER / f"{target}.json")


def read(file: Path) -> tuple[Tuned, ...]:
    """The lines of `<target>.json`, none if there is no file; ValueError if it is damaged."""
    try:
        text = file.read_text()
    except FileNotFoundError:
        return ()
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got an error: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("tiles"), list):
        raise ValueError(f"{file}: expected an object with a list 'tiles', got {text[:40]!r}")
    if content.get("target") != file.stem:
        raise ValueError(f"{file}: target: expected {file.stem!r}, got {content.get('target')!r}")
    return tuple(_line(file, number, line) for number, line in enumerate(content["tiles"]))


def _line(file: Path, number: int, line: object) -> Tuned:
    def check(name: str, holds: bool, expected: str, got: object) -> None:
        if not holds:
            raise ValueError(f"{file}: tiles[{number}]{name}: expected {expected}, got {got!r}")

    names = [name for name in Tuned.__dataclass_fields__ if name not in ("file", "line")]
    check("", isinstance(line, dict) and sorted(line) == sorted(names), f"{names}", line)
    for name in ("b_rows", "groups", "M", "N", "K"):
        check(f".{name}", type(line[name]) is int and line[name] > 0, "a number > 0", line[name])
    for name in ("time", "model"):
        fits = type(line[name]) in (int, float) and line[name] > 0
        check(f".{name}", fits, "microseconds > 0", line[name])
    check(".form", line["form"] in FORMS, f"one of {FORMS}", line["form"])
    check(".on", isinstance(line["on"], str), "text", line["on"])
    tile = line["tile"]
    fits = isinstance(tile, list) and [type(x) for x in tile] == [int, int, bool]
    check(".tile", fits, "[BLOCK_M, BLOCK_N, spread]", tile)
    return Tuned(**{**line, "tile": tuple(tile)}, file=str(file), line=number)
