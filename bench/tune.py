"""`python -m bench tune`: finds the fastest tile of each FP8 GEMM on this GPU.

We run and time every tile that a shape can use, and require the bits of the cost model's choice. A
tile that is faster by more than NOISE goes to kernels/deepkern/runtime/configs/, which a launch
reads before it evaluates the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

import deepkern
from deepkern.runtime import arch, tiles, tuned
from deepkern.runtime.tiles import GemmTile
from deepkern.runtime.tuned import Tuned
from deepkern.testing import compare
from deepkern.testing.ops import facts
from deepkern.testing.timing import time_call

from . import checks, machine
from .command_line import bar, screen
from .listing import Listing
from .results import write_text

OPS = (
    "fp8_gemm_nt",
    "k_grouped_fp8_gemm_nt",
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_masked",
)
NOISE = 0.02  # a committed tile is faster than the model's by more than this fraction
Time = Callable[[Callable[[], object]], float]  # microseconds of a call


@dataclass(frozen=True)
class Timed:
    """One shape: the model's choice, and each tile's microseconds or the reason why it has none."""

    op: str
    size: dict
    shape: tuple  # M, N, K, b_rows, groups, variant: arguments of `tiles.choose_gemm_tile`
    model: GemmTile
    times: dict[GemmTile, float]
    failed: dict[GemmTile, str]

    @property
    def best(self) -> GemmTile:
        return min(self.times, key=self.times.get)

    @property
    def gain(self) -> float:
        """The model's time over the best one."""
        return self.times[self.model] / self.times[self.best]

    def line(self, on: str) -> Tuned:
        """Its line in a config."""
        M, N, K, b_rows, groups, variant = self.shape
        tile, (best, model) = self.best, (self.times[t] for t in (self.best, self.model))
        choice = tile.BLOCK_M, tile.BLOCK_N, tile.parallel_splits
        return Tuned(variant, b_rows, groups, M, N, K, choice, round(best, 2), round(model, 2), on)


def time_tiles(op: str, size: dict, device: torch.device, time: Time) -> Timed:
    """Runs and times every tile that `op` can use at `size`."""
    call, choices = getattr(deepkern, op), []
    args = deepkern.OPS[op].positional(
        facts(op).inputs(torch.Generator(device).manual_seed(1), **size)
    )

    def model(target, *shape):
        choices.append((target, shape))
        return tiles.fastest_modelled_tile(target, *shape)

    with torch.no_grad(), deepkern.backend("triton"), tiles.override_tile_choice(model):
        want = call(*args)
    target, shape = choices[0]
    M, N, K, b_rows, _, variant = shape
    timed = Timed(op, size, shape, tiles.fastest_modelled_tile(target, *shape), {}, {})
    for tile in tiles.candidate_tiles(target, N, K, b_rows, variant):
        with (
            torch.no_grad(),
            deepkern.backend("triton"),
            tiles.override_tile_choice(lambda *_, tile=tile: tile),
        ):
            try:
                compare.assert_bitwise(call(*args), want, "bits compared with the model's tile")
                timed.times[tile] = time(lambda: call(*args))
            except Exception as error:  # tuning continues with the next tile
                timed.failed[tile] = f"{type(error).__name__}: {error}"[:200]
    if timed.model not in timed.times:
        raise RuntimeError(f"{op} {checks.text(size)}: {timed.failed[timed.model]}")
    return timed


def table(timed: Sequence[Timed]) -> Listing:
    view = Listing("Tiles (ratio: the model's time over the best)")
    for name in ("the model's", "µs", "best", "µs", "ratio"):
        view.add_columns(name, numeric=name in ("µs", "ratio"))
    for t in timed:
        names = [_name(tile) for tile in (t.model, t.best)]
        failed = "; ".join(f"{_name(tile)}: {why}" for tile, why in t.failed.items())
        times = [f"{t.times[tile]:.1f}" for tile in (t.model, t.best)]
        view.add_row(names[0], times[0], names[1], times[1], f"{t.gain:.2f}",
                     heading=f"{t.op} {checks.text(t.size)}", note=failed)  # fmt: skip
    return view


def _name(tile: GemmTile) -> str:
    return f"{tile.BLOCK_M}x{tile.BLOCK_N}{' at once' if tile.parallel_splits else ''}"


def write(timed: Sequence[Timed], on: str, file: Path) -> int:
    """Writes the tiles that are faster than the model's to `file`; returns its number of lines.

    The old line of a timed shape is removed; lines of other shapes stay.
    """
    timed_shapes = {t.shape for t in timed}
    lines = [x for x in tuned.read(file) if _shape(x) not in timed_shapes]
    fresh = {t.shape: t.line(on) for t in timed if t.gain > 1 + NOISE}
    lines = sorted([*lines, *fresh.values()], key=_shape)
    rows = ",\n".join(f"  {json.dumps(line.record())}" for line in lines)
    text = f'{{\n "target": {json.dumps(file.stem)},\n "tiles": [\n{rows}\n ]\n}}\n'
    write_text(text, file)
    return len(lines)


def _shape(line: Tuned) -> tuple:
    return line.M, line.N, line.K, line.b_rows, line.groups, line.variant


def measured_on(about: dict) -> str:
    """GPU, versions, commit and day, for a line of a config."""
    versions = f"torch {about['torch']}, triton {about['triton']}"
    return f"{about['gpu']['name']}, {versions}, {about['commit']}, {about['time'][:10]}"


def plan(ops: Sequence[str], sizes: Sequence[dict]) -> Iterator[tuple[str, dict]]:
    """Each op at `sizes`, by default at its gpu sizes."""
    return ((op, size) for op in ops for size in sizes or facts(op).SIZES.gpu)


def run(
    ops: Sequence[str],
    sizes: Sequence[dict],
    seconds: float = 0.3,
    folder: Path = tuned.FOLDER,
    console: Console | None = None,
) -> int:
    """The command. Exit code 2 without a GPU, 1 if a shape could not be timed."""
    console, device = console or screen(), machine.device()
    if device.type != "cuda":
        console.print("tune: needs a GPU, and there is none here; nothing was timed or written")
        return 2
    about, jobs, timed, wrong = machine.describe(), list(plan(ops, sizes)), [], []
    file = folder / f"{arch.of(device).name}.json"
    with bar(console, "tuning", len(jobs)) as step:
        for op, size in jobs:
            step(f"{op} {checks.text(size)}")
            try:
                time = lambda call: time_call(call, device, seconds).median  # noqa: E731
                timed.append(time_tiles(op, size, device, time))
                write(timed, measured_on(about), file)  # a run that ends keeps its tiles
            except Exception as error:
                wrong.append(f"{op} {checks.text(size)}: {type(error).__name__}: {error}"[:300])
    console.print(table(timed))
    for line in wrong:
        console.print(line, style="red", markup=False, soft_wrap=True)
    lines = write(timed, measured_on(about), file)
    console.print(f"{file}: {lines} tiles that are not the model's", soft_wrap=True)
    return 1 if wrong else 0
