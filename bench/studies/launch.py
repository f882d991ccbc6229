"""The host time of a call: before the GPU starts, or of a native CPU op at its smallest size.

    python -m bench.studies.launch [OP ...] [--seconds 0.3] [--keep] [--folder DIR]

It uses no GPU. Triton calls run under a driver that compiles for sm_90 and launches nothing. Calls
of the Hopper kernels run against the emulator's replacement of CUDA, with launches switched off.
The figures include all of deepkern's host code and Triton's choice of the compiled kernel and its
argument handling. They exclude CUDA's driver (launches, and tensor maps, which the emulator
encodes) and Triton's C launcher. Those of a CPU include the kernel, for one token.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":  # interpreted kernels are not launched; read when Triton is imported
    os.environ.pop("TRITON_INTERPRET", None)

import torch
import typer
from rich.console import Console
from torch.utils.benchmark import Timer

import deepkern
from deepkern.runtime import arch, backends, native
from deepkern.testing.ops import facts, inputs

from .. import compiling, emulator, machine, results
from ..command_line import FOLDER, KEEP, SECONDS, bar, known_ops, screen
from ..listing import Listing

# What one layer of a decoding step calls.
OPS = ("rmsnorm_cast", "cast_per_token", "fp8_gemm_nt", "mla_cache_append", "mla_decode",
       "route_topk", "expert_dispatch", "m_grouped_fp8_gemm_nt_contiguous", "swiglu_cast",
       "expert_combine")  # fmt: skip
_NAMES = typer.Argument(None, help="ops; those of a decoding step by default")
# Small, because a CPU's allocator is slow for large tensors; aligned, so that nothing is copied.
SIZES = {
    "fp8_gemm_nt": {"M": 16, "N": 256, "K": 512},
    "m_grouped_fp8_gemm_nt_contiguous": {"M": 16, "N": 256, "K": 512, "G": 4},
    "mla_decode": {"lengths": (100, 100), "H": 16},
}
ONE_TOKEN = {
    "rmsnorm_cast": {"M": 1, "K": 256, "residual": True},
    "cast_per_token": {"M": 1, "K": 256},
    "fp8_gemm_nt": {"M": 1, "N": 256, "K": 256},
    "mla_cache_append": {"T": 1},
    "mla_decode": {"lengths": (16,), "H": 4, "R": 64, "D": 16},
    "route_topk": {"T": 1, "E": 16, "topk": 4},
    "expert_dispatch": {"T": 1, "K": 256, "E": 16, "topk": 4},
    "m_grouped_fp8_gemm_nt_contiguous": {"M": 4, "N": 256, "K": 256, "G": 4},
    "swiglu_cast": {"M": 1, "I": 256},
    "expert_combine": {"T": 1, "K": 256, "topk": 4},
}
GOALS = {"cuda, in C++": 5.0, "triton": 15.0}  # microseconds


def microseconds(call: Callable[[], object], seconds: float) -> float:
    """The median thread time of one call, which other work on the machine does not lengthen."""
    call()
    timer = Timer("call()", globals={"call": call}, timer=time.thread_time)
    return timer.blocked_autorange(min_run_time=seconds).median * 1e6


def by_triton(name: str, seconds: float) -> float:
    """The public function with Triton kernels that are compiled already."""
    target = arch.ARCHS["sm_90"]
    args = compiling.unwritten_arguments(name, inputs_of(name))
    with compiling.stub_driver(target), deepkern.backend("triton"):
        return microseconds(lambda: getattr(deepkern, name)(*args), seconds)


def by_cuda(name: str, seconds: float) -> tuple[float, float]:
    """The Hopper kernels: the op in C++ alone, and the public function."""
    args = compiling.unwritten_arguments(name, inputs_of(name))
    native = getattr(torch.ops.deepkern_emulated, name).default
    with emulator.cuda_backend(launches=False):
        in_cpp = microseconds(lambda: native(*args), seconds)
        return in_cpp, microseconds(lambda: getattr(deepkern, name)(*args), seconds)


def by_cpu(name: str, seconds: float) -> tuple[float, float]:
    """The native CPU op alone, and the public function; one token."""
    generator = torch.Generator().manual_seed(0)
    args = inputs(name, generator, **ONE_TOKEN[name])
    op = native.native_op(name)
    with torch.inference_mode(), deepkern.backend("auto"):
        alone = microseconds(lambda: op(*args), seconds)
        return alone, microseconds(lambda: getattr(deepkern, name)(*args), seconds)


def inputs_of(name: str) -> dict:
    """The size of an op's arguments."""
    return SIZES.get(name) or facts(name).SIZES.small[0]


def table(rows: list[dict]) -> Listing:
    view = Listing("Host time of a call, µs, without the driver")
    columns = ("triton", "cuda, in C++", "cuda", "cpu, in C++", "cpu")
    view.add_columns("op")
    view.add_columns(*columns, numeric=True)
    for row in rows:
        view.add_row(row["op"], *(f"{row[c]:.1f}" if c in row else "" for c in columns))
    return view


def run(
    names: list[str] | None = None,
    keep: bool = False,
    seconds: float = 0.5,
    folder: Path = results.FOLDER,
    console: Console | None = None,
) -> int:
    """Times, prints, and writes a record."""
    if backends.interpreting():
        raise RuntimeError("TRITON_INTERPRET was set when Triton was imported: unset it")
    console, about, rows = console or screen(), machine.describe(), []
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
            if name in ONE_TOKEN and native.native_op(name) is not None:
                row["cpu, in C++"], row["cpu"] = by_cpu(name, seconds)
            rows.append(row)
            step(name)
    console.print(table(rows))
    for column, goal in GOALS.items():
        times = [row[column] for row in rows if column in row]
        if times:
            console.print(f"{column}: goal {goal:.0f} µs, slowest {max(times):.1f} µs")
    file = results.path(about, keep, folder)
    file = file.with_stem(f"{file.stem}-launch")
    results.write([{"kind": "machine", **about}, *rows], file)
    console.print(f"written: {file}", soft_wrap=True)
    return 0


def main(
    names: list[str] = _NAMES,
    keep: bool = KEEP,
    seconds: float = SECONDS,
    folder: Path = FOLDER,
) -> None:
    """Times the host side of a call, without a GPU: of Triton kernels and of the Hopper ones."""
    raise typer.Exit(run(known_ops(names) if names else None, keep, seconds, folder))


if __name__ == "__main__":
    typer.run(main)
