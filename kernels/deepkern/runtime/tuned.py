"""Tuned tiles: those that `python -m bench tune` measured as faster than the cost model's choice.

`configs/<target>.json` holds one line per tuned shape: the variant, scales, groups and sizes of a
GEMM, the fastest tile on a GPU of that target, and the GPU. The size that varies from call to call
(M; K for k_grouped) is looked up at the nearest tuned size, within a factor of two. Everything else
must be equal, or the cost model in `tiles.py` chooses. A file is read once, at the first launch.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "configs"
VARIANTS = ("dense", "m_grouped", "k_grouped")
MAX_RATIO = 2  # between the size of a call and the tuned size


@dataclass(frozen=True)
class Tuned:
    """One line of a file. `time` and `model` (of the cost model's tile) are in microseconds."""

    variant: str
    b_rows: int  # rows of b per scale
    groups: int
    M: int  # sizes of one group, as for tiles.choose_gemm_tile
    N: int
    K: int
    tile: tuple[int, int, bool]  # BLOCK_M, BLOCK_N, parallel_splits
    time: float
    model: float
    on: str  # GPU, versions, commit and date
    file: str = ""  # the file of the line
    line: int = 0

    @property
    def key(self) -> tuple:
        """What a call must have in common with this line."""
        fixed = (self.M, self.N) if self.variant == "k_grouped" else (self.N, self.K)
        return self.variant, self.b_rows, self.groups, fixed

    @property
    def varying(self) -> str:
        """The size that may differ in a call, such as "M=64"."""
        return f"K={self.K}" if self.variant == "k_grouped" else f"M={self.M}"

    @property
    def size(self) -> int:
        return self.K if self.variant == "k_grouped" else self.M

    def error(self, expected: str, got: object) -> ValueError:
        """A ValueError that names the file and the line."""
        return ValueError(f"{self.file}: tiles[{self.line}]: expected {expected}, got {got!r}")

    def record(self) -> dict:
        """The line as written to a file."""
        fields = asdict(self)
        return {name: fields[name] for name in fields if name not in ("file", "line")}


def find(
    target: str, variant: str, b_rows: int, groups: int, M: int, N: int, K: int
) -> Tuned | None:
    """The line for this GEMM, the nearest in the size that varies; or None."""
    call = Tuned(variant, b_rows, groups, max(M, 1), N, max(K, 1), (0, 0, False), 0, 0, "")

    def distance(line: Tuned) -> float:
        return max(line.size / call.size, call.size / line.size)

    near = [x for x in load(target) if x.key == call.key and distance(x) <= MAX_RATIO]
    return min(near, key=distance, default=None)


@functools.cache
def load(target: str) -> tuple[Tuned, ...]:
    """The committed lines for `target`, read once."""
    return read(FOLDER / f"{target}.json")


def read(file: Path) -> tuple[Tuned, ...]:
    """The lines of `<target>.json`; none without a file. Raises ValueError for a damaged file."""
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
    check(".variant", line["variant"] in VARIANTS, f"one of {VARIANTS}", line["variant"])
    check(".on", isinstance(line["on"], str), "text", line["on"])
    tile = line["tile"]
    fits = isinstance(tile, list) and [type(x) for x in tile] == [int, int, bool]
    check(".tile", fits, "[BLOCK_M, BLOCK_N, parallel_splits]", tile)
    return Tuned(**{**line, "tile": tuple(tile)}, file=str(file), line=number)
