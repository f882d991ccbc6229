"""`python -m bench profile OP`: what an op's compiled kernels execute, and what bounds their speed.

The op runs on the PTX machine (`deepkern.compiled`) and every launch is counted. `bench.limits`
turns the counts into times. Nothing is timed; registers come from the committed budgets.
"""

from __future__ import annotations

import contextlib
import linecache
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.runtime.jit import JITFunction

import deepkern
from deepkern.runtime import arch
from deepkern.runtime.profile import Launch, Statement, profiled, run_every
from deepkern.testing.costs import Cost
from deepkern.testing.ops import cost, facts

from . import budgets, compiling, hopper, limits

COUNTS = ("issued", "bytes", "sectors", "wavefronts", "least_wavefronts", "flops")
_CALLED = re.compile(r"@\[ (?:\S+?):(\d+):\d+")


@dataclass(frozen=True)
class Profile:
    """The launches of one call of an op, and its cost."""

    op: str
    target: str
    size: dict
    cost: Cost
    launches: list[Launch]
    configs: list[str]  # of the launches: tiles, flags, warps

    @property
    def arch(self) -> arch.Arch:
        return arch.ARCHS[self.target]

    @property
    def roof(self) -> float:
        return limits.roof(self.cost, self.arch)

    def times(self) -> list[dict[str, float]]:
        """Seconds of each launch for each limit."""
        return [limits.times(launch, self.arch) for launch in self.launches]

    def seconds(self, names: tuple[str, ...]) -> float:
        """The launches one after the other, each as long as its longest limit of `names`."""
        longest = (max((t[n] for n in names if n in t), default=0.0) for t in self.times())
        return max(sum(longest), self.roof)

    @property
    def bound(self) -> float:
        """No run has a larger share of the roof than this."""
        return self.roof / self.seconds(limits.CERTAIN) if self.launches else 1.0

    @property
    def predicted(self) -> float:
        """Share of the roof if each launch is as fast as all limits allow, estimates included."""
        every = limits.CERTAIN + limits.ESTIMATES
        return self.roof / self.seconds(every) if self.launches else 1.0


def run(
    op: str, target: str, size: dict, every: Mapping[str, int] | None = None, seed: int = 1
) -> Profile:
    """Runs the op once at `size`, with random inputs from `seed`.

    `every`: kernel -> n, to run every n-th cluster of its grids only.
    """
    generator = torch.Generator().manual_seed(seed)
    registered = deepkern.OPS[op]
    args = registered.positional(facts(op).inputs(generator, **size))
    before = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args)
    quick = {"check_races": False, "check_initialized": False}
    with (
        deepkern.backend("triton"),
        deepkern.compiled(target, **quick),
        profiled() as launches,
        launched(every or {}) as kernels,
    ):
        result = registered.launcher("triton")(*args)
    configs = [compiling.config(kernel) for kernel in kernels]
    work = cost(op, before, args if result is None else result)
    return Profile(op, target, size, work, launches, configs)


def run_hopper(op: str, size: dict, every: int = 1, seed: int = 1) -> Profile:
    """The same for an op of csrc/sm90, whose kernels nvcc compiles.

    `every`: run every n-th cluster of the op's main kernel only.
    """
    generator = torch.Generator().manual_seed(seed)
    registered = deepkern.OPS[op]
    args = registered.positional(facts(op).inputs(generator, **size))
    before = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args)
    with (
        hopper.cuda_backend(every=every, check_races=False, check_initialized=False),
        profiled() as launches,
    ):
        result = registered.launcher("cuda")(*args)
    return Profile(op, "sm_90", size, cost(op, before, result), launches, [""] * len(launches))


@contextlib.contextmanager
def launched(every: Mapping[str, int]) -> Iterator[list]:
    """The CompiledKernels of the launches inside the block."""
    kernels: list = []
    launch = JITFunction.run

    def run(self, *args, **kwargs):
        run_every(every.get(self.__name__, 1))
        kernel = launch(self, *args, **kwargs)
        kernels.append(kernel)
        return kernel

    JITFunction.run = run
    try:
        yield kernels
    finally:
        JITFunction.run = launch


# What a launch does, as numbers with names.


def by_kind(launch: Launch) -> dict[str, int]:
    """Executed instructions of warps by kind, the most frequent first."""
    kinds = {s.kind for s in launch.statements}
    return dict(sorted(((k, launch.total("issued", k)) for k in kinds), key=lambda x: -x[1]))


@dataclass
class Access:
    """The accesses to global memory by one opcode at one place."""

    opcode: str
    location: str
    executed: int = 0  # by warps
    bytes: int = 0
    sectors: int = 0

    @property
    def used(self) -> float:
        """The part of the sectors that the lanes ask for, each lane counted."""
        return self.bytes / (limits.SECTOR * self.sectors)


def accesses(launch: Launch) -> list[Access]:
    """The accesses to global memory, those with most sectors first."""
    found: dict[tuple[str, str], Access] = {}
    for s in launch.statements:
        if s.sectors:
            place = s.location.split(" @[")[0]
            access = found.setdefault((s.opcode, place), Access(s.opcode, place))
            access.executed += s.warps
            access.bytes += s.bytes
            access.sectors += s.sectors
    return sorted(found.values(), key=lambda access: -access.sectors)


def source(s: Statement) -> tuple[str, int]:
    """The file and the line of a statement; of inlined library code, the line that calls it."""
    calls = _CALLED.findall(s.location)
    if calls and "site-packages" in s.file:
        name = re.findall(r"@\[ (\S+?):\d+:\d+", s.location)
        return name[-1], int(calls[-1])
    return s.file, s.source_line


@dataclass
class Line:
    """The counts of one source line."""

    file: str
    number: int
    text: str = ""
    issued: int = 0
    bytes: int = 0
    sectors: int = 0
    wavefronts: int = 0
    least_wavefronts: int = 0
    flops: int = 0


def lines(launch: Launch) -> list[Line]:
    """The source lines of a launch by executed instructions, most first."""
    files = {os.path.basename(s.file): s.file for s in launch.statements if s.file}
    found: dict[tuple[str, int], Line] = {}
    for s in launch.statements:
        file, number = source(s)
        file = files.get(file, file)
        line = found.setdefault((file, number), Line(file, number))
        for name in COUNTS:
            setattr(line, name, getattr(line, name) + getattr(s, name))
    for line in found.values():
        line.text = linecache.getline(current_file(line.file), line.number).strip()
    return sorted(found.values(), key=lambda line: -line.issued)


def current_file(file: str) -> str:
    """The file of this checkout that has the source of `file`.

    Triton caches a kernel by its source, not by its path. A cached kernel may name the file of
    another copy of the package, which may not exist anymore.
    """
    _, package, module = file.rpartition("/deepkern/")
    own = Path(deepkern.__file__).parent / module
    return str(own) if package and own.exists() else file


def registers(profile: Profile, index: int) -> int | None:
    """Registers per thread in the committed budgets; None if this variant is not there."""
    key = (profile.op, profile.launches[index].kernel, profile.configs[index], profile.target)
    budget = budgets.load().get(key)
    return budget["registers"] if budget and triton.__version__ == budgets.PINNED else None


def binding(times: dict[str, float]) -> str:
    return max(times, key=lambda name: times[name]) if times else ""


# JSON.


def record(profile: Profile) -> dict:
    """Everything in the report, for JSON."""
    return {
        "op": profile.op,
        "target": profile.target,
        "part": profile.arch.part,
        "size": {name: str(value) for name, value in profile.size.items()},
        "triton": triton.__version__,
        "least_bytes": profile.cost.bytes,
        "useful_flops": profile.cost.flops,
        "roof_seconds": profile.roof,
        "bound": profile.bound,
        "predicted": profile.predicted,
        "launches": [_launch_record(profile, i) for i in range(len(profile.launches))],
    }


def _launch_record(profile: Profile, index: int) -> dict:
    launch = profile.launches[index]
    times = limits.times(launch, profile.arch)
    known = registers(profile, index)
    resident = limits.resident_blocks(launch, profile.arch, known)
    plain = ("kernel", "grid", "block", "cluster", "shared", "blocks", "blocks_run", "sectors_read",
             "sectors_written")  # fmt: skip
    return {
        **{name: getattr(launch, name) for name in plain},
        "config": profile.configs[index],
        "uniform": launch.uniform,
        "registers": known,
        "blocks_per_sm": min(resident.values()),
        "imbalance": limits.imbalance(launch, profile.arch),
        "instructions": by_kind(launch),
        "totals": {name: launch.total(name) for name in COUNTS},
        "seconds": times,
        "binding": binding(times),
        "accesses": [{**vars(x), "used": x.used} for x in accesses(launch)],
        "lines": [vars(x) for x in lines(launch)],
    }


def short(file: str) -> str:
    return Path(file).name
