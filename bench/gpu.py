"""`python -m bench gpu FAMILY`: build, test, time and tune a family of ops on a machine with a GPU.

For a machine that has torch and Triton and no network. Each stage is a process of its own, ends
within ten minutes or is ended, and leaves its output in one folder of a few small files:
`<family>.log`, `<family>.json` (each stage's exit code, seconds and last line, and the machine),
figures and pictures of the speeds and of the errors of FP8 sums, and the tuned tiles, to be copied
into kernels/deepkern/runtime/configs/.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

import deepkern

from . import machine, tune
from .inspect import ROOT
from .progress import screen

FAMILIES = ("quant", "matmul", "attention", "experts", "hopper")
STAGES = ("build", "tests", "ops", "speed", "tune", "accumulation", "prove")
LIMIT = 590  # seconds of a stage


def ops_of(family: str) -> list[str]:
    """The ops whose files lie in the family's folder; for hopper, those that have such a kernel."""
    if family == "hopper":
        return [*tune.OPS, "mla_decode"]
    return [n for n, op in sorted(deepkern.OPS.items()) if op.__module__.split(".")[1] == family]


def commands(family: str, out: Path) -> dict[str, list[str]]:
    """What each stage runs; only the FP8 products have tiles to tune."""
    python, ops = sys.executable, ops_of(family)
    crew = ["-n", "8"] if importlib.util.find_spec("xdist") else []  # compiling takes the time
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *crew]
    found = {
        "build": [python, "setup.py", "--quiet", "build_ext", "--inplace", "--force"],
        "tests": [*pytest, f"tests/{family}"],
        "ops": [*pytest, "tests/test_every_op.py", "-k", " or ".join(ops)],
        "speed": [python, "-m", "bench", "ops", *ops, "--folder", str(out)],
    }
    if family == "hopper":  # csrc/sm90, beside the Triton kernels of the same ops
        build, speed = found["build"], found["speed"]
        return {"build": build, "prove": [python, "-m", "bench", "prove"], "speed": speed}
    if set(ops) & set(tune.OPS):
        for stage in ("tune", "accumulation"):
            found[stage] = [python, "-m", "bench", stage, "--folder", str(out)]
    return found


def run_stage(command: Sequence[str], log: Path, limit: float = LIMIT) -> dict:
    """Runs a command, appends what it prints to `log`; its record. One that hangs is ended."""
    start, paths = time.monotonic(), [str(ROOT / "kernels"), str(ROOT)]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    with log.open("a") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )  # fmt: skip
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = "ended after its time"
    said = log.read_text(errors="replace").split("\n$ ")[-1].splitlines()[1:]
    last = next((line for line in reversed(said) if line.strip()), "")
    return {"exit": code, "seconds": round(time.monotonic() - start), "last": last[:200]}


def run(family: str, stages: Sequence[str], out: Path, console: Console | None = None) -> int:
    """The command: 2 without a GPU, 1 if a stage failed."""
    console = console or screen()
    if machine.device().type != "cuda":
        console.print("gpu: needs a GPU, and there is none here; nothing was run")
        return 2
    return run_stages(family, commands(family, out), stages, out, console)


def run_stages(
    family: str, known: dict[str, list[str]], stages: Sequence[str], out: Path, console: Console
) -> int:
    """Runs `stages` (all of `known` if none is named) and leaves their records behind."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{family}.json"
    records = json.loads(file.read_text()) if file.exists() else {}
    records["machine"] = machine.describe()
    for stage in stages or known:
        if stage not in known:
            continue
        records[stage] = run_stage(known[stage], out / f"{family}.log")
        file.write_text(json.dumps(records, indent=1) + "\n")  # also if the next one is cut off
        r = records[stage]
        console.print(f"{stage:6} exit {r['exit']}, {r['seconds']} s: {r['last']}", markup=False)
    console.print(f"written: {out}", soft_wrap=True)
    return 1 if any(records[stage]["exit"] != 0 for stage in known if stage in records) else 0
