"""`python -m bench tune`: the fastest tile of each product on this GPU, beside the model's pick.

Every tile that a shape may take is run, its result held to the bits of the model's pick, and timed.
Where one is faster by more than noise, it goes into kernels/deepkern/runtime/configs/, which
launches look into before they ask the model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import deepkern
from deepkern.runtime import arch, tiles, tuned
from deepkern.runtime.tiles import GemmTile
from deepkern.runtime.tuned import Tuned
from deepkern.testing import compare, inputs
from deepkern.testing.timing import time_call

from . import checks, machine
from .progress import bar, screen

OPS = (
    "fp8_gemm_nt",
    "k_grouped_fp8_gemm_nt",
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_masked",
)
NOISE = 0.02  # a tile must be faster than the model's by this share to be committed
Time = Callable[[Callable[[], object]], float]  # microseconds of a call


@dataclass(frozen=True)
class Timed:
    """One shape: what the model picks, and the microseconds of each tile or why it has none."""

    op: str
    size: dict
    shape: tuple  # M, N, K, b_rows, groups, form: as `tiles.choose_gemm_tile` was asked
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
        """What a config says of it."""
        M, N, K, b_rows, groups, form = self.shape
        tile, (best, model) = self.best, (self.times[t] for t in (self.best, self.model))
        return Tuned(form, b_rows, groups, M, N, K, (tile.BLOCK_M, tile.BLOCK_N, tile.parallel_splits),
                     round(best, 2), round(model, 2), on)  # fmt: skip


def time_tiles(op: str, size: dict, device: torch.device, time: Time) -> Timed:
    """Runs and times every tile that `op` may take at `size`."""
    call, asked = deepkern.OPS[op], []
    args = call.positional(inputs.make(op, torch.Generator(device).manual_seed(1), **size))

    def model(target, *shape):
        asked.append((target, shape))
        return tiles.fastest_modelled_tile(target, *shape)

    with torch.no_grad(), deepkern.backend("triton"), tiles.override_tile_choice(model):
        want = call(*args)
    target, shape = asked[0]
    M, N, K, b_rows, _, form = shape
    found = Timed(op, size, shape, tiles.fastest_modelled_tile(target, *shape), {}, {})
    for tile in tiles.candidate_tiles(target, N, K, b_rows, form):
        with (
            torch.no_grad(),
            deepkern.backend("triton"),
            tiles.override_tile_choice(lambda *_, tile=tile: tile),
        ):
            try:
                compare.assert_bitwise(call(*args), want, "bits beside the model's tile")
                found.times[tile] = time(lambda: call(*args))
            except Exception as error:  # a tile that does not run must not end the tuning
                found.failed[tile] = f"{type(error).__name__}: {error}"[:200]
    if found.model not in found.times:
        raise RuntimeError(f"{op} {checks.text(size)}: {found.failed[found.model]}")
    return found


def table(found: Sequence[Timed]) -> Table:
    view = Table(title="Tiles (ratio: the model's time over the best)", title_justify="left")
    for name in ("op", "size", "the model's", "µs", "best", "µs", "ratio", "failed"):
        view.add_column(name, justify="right" if name in ("µs", "ratio") else "left")
    for t in found:
        names = [_name(tile) for tile in (t.model, t.best)]
        failed = "; ".join(f"{_name(tile)}: {why}" for tile, why in t.failed.items())
        times = [f"{t.times[tile]:.1f}" for tile in (t.model, t.best)]
        view.add_row(t.op, checks.text(t.size), names[0], times[0], names[1], times[1],
                     f"{t.gain:.2f}", failed)  # fmt: skip
    return view


def _name(tile: GemmTile) -> str:
    return f"{tile.BLOCK_M}x{tile.BLOCK_N}{' at once' if tile.parallel_splits else ''}"


def write(found: Sequence[Timed], on: str, file: Path) -> int:
    """Puts what is faster than the model into `file`, all or nothing; how many lines it then has.

    A shape that was timed loses the line it had; lines of other shapes stay.
    """
    anew = {t.shape for t in found}
    lines = [x for x in tuned.read(file) if _shape(x) not in anew]
    fresh = {t.shape: t.line(on) for t in found if t.gain > 1 + NOISE}
    lines = sorted([*lines, *fresh.values()], key=_shape)
    rows = ",\n".join(f"  {json.dumps(line.record())}" for line in lines)
    text = f'{{\n "target": {json.dumps(file.stem)},\n "tiles": [\n{rows}\n ]\n}}\n'
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    return len(lines)


def _shape(line: Tuned) -> tuple:
    return line.M, line.N, line.K, line.b_rows, line.groups, line.form


def measured_on(facts: dict) -> str:
    """The GPU, versions, commit and day, as a line of a config has them."""
    versions = f"torch {facts['torch']}, triton {facts['triton']}"
    return f"{facts['gpu']['name']}, {versions}, {facts['commit']}, {facts['time'][:10]}"


def plan(ops: Sequence[str], sizes: Sequence[dict]) -> Iterator[tuple[str, dict]]:
    """Each op at `sizes`, or where there are none at those it is timed at on a GPU."""
    return ((op, size) for op in ops for size in sizes or inputs.sizes(op).gpu)


def run(
    ops: Sequence[str],
    sizes: Sequence[dict],
    seconds: float = 0.3,
    folder: Path = tuned.FOLDER,
    console: Console | None = None,
) -> int:
    """The command: 2 without a GPU, 1 if a shape could not be timed."""
    console, device = console or screen(), machine.device()
    if device.type != "cuda":
        console.print("tune: needs a GPU, and there is none here; nothing was timed or written")
        return 2
    facts, jobs, found, wrong = machine.describe(), list(plan(ops, sizes)), [], []
    with bar(console, "tuning", len(jobs)) as step:
        for op, size in jobs:
            step(f"{op} {checks.text(size)}")
            try:
                time = lambda call: time_call(call, device, seconds).median  # noqa: E731
                found.append(time_tiles(op, size, device, time))
            except Exception as error:
                wrong.append(f"{op} {checks.text(size)}: {type(error).__name__}: {error}"[:300])
    console.print(table(found))
    for line in wrong:
        console.print(line, style="red", markup=False, soft_wrap=True)
    file = folder / f"{arch.of(device).name}.json"
    lines = write(found, measured_on(facts), file)
    console.print(f"{file}: {lines} tiles that are not the model's", soft_wrap=True)
    return 1 if wrong else 0
