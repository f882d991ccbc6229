"""Exact counts of what compiled kernels execute: `deepkern.profiled`.

    with deepkern.compiled("sm_90"), deepkern.profiled() as launches:
        kernel[grid](...)
    for launch in launches:
        print(launch.kernel, launch.total("sectors"))

The counts are those of the PTX that the machine executes (csrc/ptx/profile.h). They do not depend
on the order in which warps run, except in loops that poll global memory.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from . import ptx_library


class Statement(NamedTuple):
    """The counts of one PTX instruction, over all warps of a launch."""

    line: int  # in the PTX text
    location: str  # "kernel.py:150 (called at moe.py:20)", "" if there is none
    file: str
    source_line: int
    kind: str  # integer, float, half, special, convert, move, predicate, shuffle, branch, ...
    opcode: str  # with its modifiers
    issued: int  # by a warp
    warps: int  # issued with at least one active lane
    lanes: int
    bytes: int  # that lanes ask for, that a copy moves, or operands of MMAs in shared memory
    sectors: int  # distinct 32-byte sectors of global memory in each execution
    wavefronts: int  # passes over the banks of shared memory
    least_wavefronts: int  # that the same words would take without bank conflicts
    flops: int  # of tensor cores


@dataclass(frozen=True)
class Launch:
    """The counts of one launch."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    shared: int  # bytes of a block
    sectors_read: int  # distinct ones of global memory in the whole launch
    sectors_written: int
    blocks: int  # of the grid
    blocks_run: int  # fewer with `every`
    least_issued: int  # instructions of the block that issued fewest
    most_issued: int
    statements: tuple[Statement, ...]

    def total(self, field: str, *kinds: str) -> int:
        """The sum of one count over the statements of some kinds, or of all."""
        return sum(getattr(s, field) for s in self.statements if not kinds or s.kind in kinds)

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.block[0] * self.block[1] * self.block[2]

    @property
    def scale(self) -> float:
        """Blocks of the grid over blocks that ran."""
        return self.blocks / max(self.blocks_run, 1)

    @property
    def uniform(self) -> bool:
        """Whether the blocks that ran issued equal numbers of instructions, within 2 %."""
        return self.most_issued <= 1.02 * self.least_issued


@contextlib.contextmanager
def profiled(every: int = 1) -> Iterator[list[Launch]]:
    """Counts the launches of the `with` block, inside `deepkern.compiled`.

    Yields a list that has the launches, in their order, once the block has ended.

    Args:
        every: run only the clusters 0, every, 2 * every, ... of each grid, for grids whose blocks
            do equal work. The results of the kernel are then incomplete, and a kernel that waits
            for another block does not end. `Launch.scale` is what to multiply the counts with.
    """
    if every < 1:
        raise ValueError(f"profiled: every: expected 1 or more, got {every}")
    library = ptx_library.library()
    library.deepkern_ptx_take_profile()
    launches: list[Launch] = []
    run_every(every)
    try:
        yield launches
    finally:
        run_every(0)
        text = library.deepkern_ptx_take_profile().decode(errors="replace")
        launches += map(_launch, json.loads(text))


def run_every(every: int) -> None:
    """Inside `profiled`: the argument `every` of the launches that follow."""
    ptx_library.library().deepkern_ptx_profile(every)


def _launch(record: dict) -> Launch:
    locations = record["locations"]

    def statement(line, location, *rest) -> Statement:
        where = locations[location] if location >= 0 else ("", "", 0)
        return Statement(line, *where, *rest)

    blocks = record["blocks"]
    return Launch(
        kernel=record["kernel"],
        grid=tuple(record["grid"]),
        block=tuple(record["block"]),
        cluster=tuple(record["cluster"]),
        shared=record["static_shared"] + record["dynamic_shared"],
        sectors_read=record["sectors_read"],
        sectors_written=record["sectors_written"],
        blocks=blocks["of"],
        blocks_run=blocks["ran"],
        least_issued=blocks["least"],
        most_issued=blocks["most"],
        statements=tuple(statement(*s) for s in record["statements"]),
    )
