"""`python -m bench gpu FAMILY`: builds, tests, times and tunes a family of ops on a GPU machine.

The machine needs torch and Triton and no network. Each stage is one process; it is killed after
ten minutes. All output goes to one folder of a few small files: `<family>.log`, `<family>.json`
(the machine, and the exit code, seconds and last line of each stage), figures and pictures of the
speeds and of the errors of FP8 sums, and the tuned tiles, to copy into
kernels/deepkern/runtime/configs/. `--dry-run` prints the stages and runs none.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

import deepkern

from . import machine, tune
from .command_line import screen
from .inspect import ROOT

FAMILIES = ("quant", "matmul", "attention", "experts", "hopper")
STAGES = ("build", "tests", "ops", "speed", "tune", "accumulation", "verify")
LIMIT = 590  # seconds for a stage


def ops_of(family: str) -> list[str]:
    """The ops in the family's folder; for hopper, the ops with a Hopper kernel."""
    if family == "hopper":
        return [*tune.OPS, "mla_decode", "mla_prefill", "mla_prefill_backward"]
    modules = {name: getattr(deepkern, name).__module__ for name in sorted(deepkern.OPS)}
    return [name for name, module in modules.items() if module.split(".")[1] == family]


def commands(family: str, out: Path) -> dict[str, list[str]]:
    """The command of each stage. Only the FP8 GEMMs have tiles to tune."""
    python, ops = sys.executable, ops_of(family)
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []  # compiling is slow
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers]
    stages = {
        "build": [python, "setup.py", "--quiet", "build_ext", "--inplace", "--force"],
        "tests": [*pytest, f"tests/{family}"],
        "ops": [*pytest, "tests/test_every_op.py", "-k", " or ".join(ops)],
        "speed": [python, "-m", "bench", "ops", *ops, "--folder", str(out)],
    }
    if family == "hopper":  # csrc/sm90, timed next to the Triton kernels of the same ops
        verify = [python, "-m", "bench", "verify"]
        return {"build": stages["build"], "verify": verify, "speed": stages["speed"]}
    if set(ops) & set(tune.OPS):
        accumulation = [python, "-m", "bench.studies.accumulation"]
        stages["tune"] = [python, "-m", "bench", "tune", "--folder", str(out)]
        stages["accumulation"] = [*accumulation, "--folder", str(out)]
    return stages


def run_stage(command: Sequence[str], log: Path, limit: float = LIMIT) -> dict:
    """Runs a command with its output appended to `log`; kills it after `limit` s. Its record."""
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
            code = f"killed after {limit} s"
    output = log.read_text(errors="replace").split("\n$ ")[-1].splitlines()[1:]
    last = next((line for line in reversed(output) if line.strip()), "")
    return {"exit": code, "seconds": round(time.monotonic() - start), "last": last[:200]}


def run(
    family: str,
    stages: Sequence[str],
    out: Path,
    dry_run: bool = False,
    console: Console | None = None,
) -> int:
    """The command. Exit code 2 without a GPU, 1 if a stage failed."""
    console = console or screen()
    if dry_run:
        for stage, command in commands(family, out).items():
            if not stages or stage in stages:
                text = f"{stage} (at most {LIMIT} s): {shlex.join(command)}"
                console.print(text, markup=False, soft_wrap=True, highlight=False)
        return 0
    if machine.device().type != "cuda":
        console.print("gpu: needs a GPU, and there is none here; nothing was run")
        return 2
    return run_stages(family, commands(family, out), stages, out, console)


def run_stages(
    family: str,
    known: dict[str, list[str]],
    stages: Sequence[str],
    out: Path,
    console: Console,
) -> int:
    """Runs `stages` (all of `known` by default) and writes their records."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{family}.json"
    records = json.loads(file.read_text()) if file.exists() else {}
    records["machine"] = machine.describe()
    for stage in stages or known:
        if stage not in known:
            continue
        records[stage] = run_stage(known[stage], out / f"{family}.log")
        file.write_text(json.dumps(records, indent=1) + "\n")  # kept if the next stage is killed
        r = records[stage]
        console.print(f"{stage:6} exit {r['exit']}, {r['seconds']} s: {r['last']}", markup=False)
    console.print(f"written: {out}", soft_wrap=True)
    return 1 if any(records[stage]["exit"] != 0 for stage in known if stage in records) else 0
