"""`python -m bench launch`: what a call costs on the host before the GPU has anything to do.

No GPU is needed and none is used. Triton calls run under a driver that compiles for sm_90 and then
launches nothing; calls of the Hopper kernels run against the emulator's stand-in for CUDA, with
launches switched off. So all of deepkern's own time is in the figures, and Triton's choice of the
compiled kernel and its handling of arguments; the time of CUDA's driver is not (a launch, and the
encoding of tensor maps, which the stand-in does), nor that of Triton's C launcher.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.benchmark import Timer

import deepkern
from deepkern.runtime import arch, backends
from deepkern.testing import inputs

from . import compiling, emulator, machine, results
from .progress import bar, screen

# What one layer of a decoding step calls.
OPS = ("rmsnorm_cast", "cast_per_token", "fp8_gemm_nt", "mla_cache_append", "mla_decode",
       "route_topk", "expert_dispatch", "m_grouped_fp8_gemm_nt_contiguous", "swiglu_cast",
       "expert_combine")  # fmt: skip
# Small, for a CPU's allocator takes its time over large tensors, and such that nothing is copied.
SIZES = {
    "fp8_gemm_nt": {"M": 16, "N": 256, "K": 512},
    "m_grouped_fp8_gemm_nt_contiguous": {"M": 16, "N": 256, "K": 512, "G": 4},
    "mla_decode": {"lengths": (100, 100), "H": 16},
}
GOALS = {"cuda, in C++": 5.0, "triton": 15.0}  # microseconds


def microseconds(call: Callable[[], object], seconds: float) -> float:
    """The median time of one call, as the thread's own: others may use the processor meanwhile."""
    call()
    timer = Timer("call()", globals={"call": call}, timer=time.thread_time)
    return timer.blocked_autorange(min_run_time=seconds).median * 1e6


def by_triton(name: str, seconds: float) -> float:
    """A call of the public function that launches Triton kernels, compiled before."""
    target = arch.ARCHS["sm_90"]
    args = compiling.unwritten_arguments(name, inputs_of(name))
    with compiling.stub_driver(target), deepkern.backend("triton"):
        return microseconds(lambda: getattr(deepkern, name)(*args), seconds)


def by_cuda(name: str, seconds: float) -> tuple[float, float]:
    """A call of the Hopper kernels: of the op in C++, and of the public function."""
    args = compiling.unwritten_arguments(name, inputs_of(name))
    native = getattr(torch.ops.deepkern_emulated, name).default
    with emulator.cuda_backend(launches=False):
        in_cpp = microseconds(lambda: native(*args), seconds)
        return in_cpp, microseconds(lambda: getattr(deepkern, name)(*args), seconds)


def inputs_of(name: str) -> dict:
    """The size that calls of an op are made at."""
    return SIZES.get(name) or inputs.sizes(name).small[0]


def table(rows: list[dict]) -> Table:
    view = Table(title="host time of a call, µs, without the driver")
    for column in ("op", "triton", "cuda, in C++", "cuda"):
        view.add_column(column, justify="left" if column == "op" else "right")
    for row in rows:
        view.add_row(row["op"], *(f"{row[c]:.1f}" if c in row else "" for c in
                                  ("triton", "cuda, in C++", "cuda")))  # fmt: skip
    return view


def run(
    names: list[str] | None = None,
    keep: bool = False,
    seconds: float = 0.5,
    folder: Path = results.FOLDER,
    console: Console | None = None,
) -> int:
    """The command: time, print, and leave a record behind."""
    if backends.interpreting():
        raise RuntimeError("Triton was imported for its interpreter: nothing would be launched")
    console, facts, rows = console or screen(), machine.describe(), []
    names = names or list(OPS)
    served = emulator.served() if emulator.compiler() else []
    if not served:
        console.print("no C++ compiler: the Hopper kernels' host side is left out")
    with bar(console, "calling", len(names)) as step:
        for name in names:
            row = {"kind": "launch", "op": name, "triton": by_triton(name, seconds)}
            if name in served:
                emulator.ops()
                row["cuda, in C++"], row["cuda"] = by_cuda(name, seconds)
            rows.append(row)
            step(name)
    console.print(table(rows))
    for column, goal in GOALS.items():
        had = [row[column] for row in rows if column in row]
        if had:
            console.print(f"{column}: at most {goal:.0f} µs wanted, {max(had):.1f} at most had")
    file = results.path(facts, keep, folder)
    file = file.with_stem(f"{file.stem}-launch")
    results.write([{"kind": "machine", **facts}, *rows], file)
    console.print(f"written: {file}", soft_wrap=True)
    return 0
