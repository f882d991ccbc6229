"""`python -m bench gpu`: everything to run on a GPU machine, in stages; one command, resumable.

The machine needs no network; `REQUIRED` lists the packages. Each stage is one process. A stage that
ended with exit code 0 is not repeated by the next call, unless the commit, the GPU or the versions
have changed. With `--minutes`, no stage is started that has less than a third of its limit left;
the next call goes on there. Stages that give the most information come first. A copy of the tree
without git receives its commit: `DEEPKERN_COMMIT=$(git rev-parse --short=12 HEAD)`.

All output goes to one folder, build/gpu by default: `stages.json` (the machine, and the exit code,
seconds and last line of each stage), one log per stage, the results of the benchmarks as JSON lines
and pictures, and the tuned tiles. `--dry-run` prints the stages and runs none.
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
from typing import NamedTuple

from rich.console import Console

import deepkern

from . import machine, shapes, tune
from .command_line import screen
from .families import FAMILIES
from .machine import ROOT
from .results import write_text

FOLDER = ROOT / "build" / "gpu"
LIMIT = 590  # seconds of a stage
REQUIRED = ("torch", "triton", "numpy", "pytest", "hypothesis", "rich", "typer", "jinja2",
            "matplotlib", "safetensors", "tokenizers", "pybind11", "setuptools")  # fmt: skip
MODEL_TESTS = (
    "tests/model/test_deepseek.py", "tests/model/test_graph.py", "tests/bench/test_facts.py",
    "tests/bench/test_providers.py", "tests/bench/test_timing.py", "tests/bench/test_tune.py",
)  # fmt: skip
HOPPER = (*tune.OPS, "mla_decode", "mla_sparse_decode", "mla_sparse_prefill", "mla_prefill",
          "mla_prefill_backward")  # with a CUDA kernel  # fmt: skip
IDENTITY = ("commit", "gpu", "torch", "triton", "python")  # a change of these starts all over


class Stage(NamedTuple):
    """One process. `limit`: seconds after which it is killed."""

    name: str
    command: list[str]
    limit: int = LIMIT


def stages(out: Path) -> list[Stage]:
    """All stages, in the order in which they run. A fault of an op ends its stage only."""
    python = sys.executable
    bench = [python, "-m", "bench"]
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []  # compiling is slow
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers, "-m", "gpu"]
    folder = ["--folder", str(out)]
    check = [*bench, "run", "--no-speed", "--no-model", "--backend"]
    hopper = ["--backend", "cuda", "--against", "eager", *folder]
    return [
        Stage("build", [python, "setup.py", "--quiet", "build_ext", "--inplace", "--force"]),
        Stage("checks triton", [*check, "triton", *folder], 300),
        Stage("tests hopper", [python, "-m", "bench.verify", *folder], 400),
        *(Stage(f"tests {name}", [*pytest, f"tests/{name}"], 400) for name in FAMILIES),
        Stage("tests model", [*pytest, *MODEL_TESTS], 200),
        *(Stage(f"speed {op}", [*bench, "op", op, "--backend", "triton", *folder], 200)
          for op in sorted(deepkern.OPS)),
        *(Stage(f"speed {op} cuda", [*bench, "op", op, *hopper], 200) for op in HOPPER),
        *(Stage(f"speed {op} {name}", [*bench, "op", op, "--shapes", name, *folder], 200)
          for name in ("deepgemm", "flashmla") for op in sorted(shapes.SETS[name])),
        Stage("model", [*bench, "model", *folder], 200),
        *(Stage(f"tune {op}", [*bench, "tune", op, "--folder", str(out / "configs")])
          for op in tune.OPS),
        Stage("accumulation", [python, "-m", "bench.studies.accumulation", *folder], 200),
        Stage("launch", [python, "-m", "bench.studies.launch", *folder], 200),
    ]  # fmt: skip


def run_stage(command: Sequence[str], log: Path, limit: float, commit: str | None = None) -> dict:
    """Runs a command with its output in `log`; kills it after `limit` seconds. Its record.

    `commit` is the one that its results name: a stage before may have written into the tree.
    """
    start, paths = time.monotonic(), [str(ROOT / "kernels"), str(ROOT)]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1",
                 **({"DEEPKERN_COMMIT": commit} if commit else {})},
        )  # fmt: skip
        try:
            code: int | str = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = f"killed after {limit:.0f} s"
        except BaseException:  # such as Ctrl-C: the GPU must be free for the next call
            os.killpg(process.pid, signal.SIGKILL)
            raise
    lines = log.read_text(errors="replace").splitlines()
    last = next((line for line in reversed(lines) if line.strip()), "")
    return {"exit": code, "seconds": round(time.monotonic() - start), "last": last[:200]}


class Progress:
    """The records of the stages in `stages.json`; those of another commit or GPU are dropped."""

    def __init__(self, folder: Path, about: dict) -> None:
        self.file = folder / "stages.json"
        before = json.loads(self.file.read_text()) if self.file.exists() else {}
        known = before.get("machine", {})
        self.resumed = bool(before) and all(known.get(key) == about[key] for key in IDENTITY)
        self.records: dict[str, dict] = before.get("stages", {}) if self.resumed else {}
        self.about = about

    def done(self, name: str) -> bool:
        return self.records.get(name, {}).get("exit") == 0

    def add(self, name: str, record: dict) -> None:
        """Writes the file at once, so that it survives a kill in the next stage."""
        self.records[name] = record
        tree = {"machine": self.about, "stages": self.records}
        write_text(json.dumps(tree, indent=1) + "\n", self.file)


def run(
    names: Sequence[str] = (),
    out: Path = FOLDER,
    minutes: float | None = None,
    dry_run: bool = False,
    console: Console | None = None,
) -> int:
    """The command. Exit code 2 without a GPU, 1 if a stage failed or is left for the next call."""
    console = console or screen()
    chosen = [stage for stage in stages(out) if not names or stage.name in names]
    if dry_run:
        for stage in chosen:
            text = f"{stage.name} (at most {stage.limit} s): {shlex.join(stage.command)}"
            console.print(text, markup=False, soft_wrap=True, highlight=False)
        return 0
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if machine.device().type != "cuda" or missing:
        what = f"the packages {', '.join(missing)}" if missing else "a GPU, and there is none here"
        console.print(f"gpu: needs {what}; nothing was run", markup=False)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a stage is killed, too
    return run_stages(chosen, out, machine.describe(), minutes, console, again=bool(names))


def run_stages(
    chosen: Sequence[Stage],
    out: Path,
    about: dict,
    minutes: float | None,
    console: Console,
    again: bool = False,
) -> int:
    """Runs the stages that are not done, or all with `again`; says what is left."""
    out.mkdir(parents=True, exist_ok=True)
    progress = Progress(out, about)
    if progress.resumed:
        console.print(f"going on with {progress.file}", soft_wrap=True)
    end = time.monotonic() + 60 * minutes if minutes else float("inf")
    left = []
    for stage in chosen:
        if progress.done(stage.name) and not again:
            console.print(f"{stage.name:18} done before", markup=False)
            continue
        before = progress.records.get(stage.name, {}).get("exit")
        remaining = end - time.monotonic()
        if remaining < stage.limit / 3:
            left.append(stage.name)
            continue
        log = out / f"{stage.name.replace(' ', '-')}.log"
        record = run_stage(stage.command, log, min(stage.limit, remaining), about["commit"])
        progress.add(stage.name, record)
        again_text = "" if before is None else f" (before: {before})"
        console.print(f"{stage.name:18} exit {record['exit']}{again_text}, {record['seconds']} s: "
                      f"{record['last']}", markup=False, soft_wrap=True)  # fmt: skip
    if left:
        console.print(f"no time left for: {', '.join(left)}; run the command again", markup=False)
    console.print(f"written: {out}", soft_wrap=True)
    failed = [stage.name for stage in chosen if not progress.done(stage.name)]
    return 1 if failed else 0
