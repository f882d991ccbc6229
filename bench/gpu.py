"""`python -m bench gpu`: everything to run on a GPU machine, in stages; one command, resumable.

The machine needs torch, Triton and pytest, and no network. Each stage is one process. A stage that
ended with exit code 0 is not repeated by the next call, unless the commit, the GPU or the versions
have changed. With `--minutes`, no stage is started that has less than a third of its limit left;
the next call goes on there. Stages that give the most information come first.

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

from . import machine
from .command_line import screen
from .families import FAMILIES, ops_of
from .machine import ROOT
from .results import write_text

FOLDER = ROOT / "build" / "gpu"
LIMIT = 590  # seconds of a stage
IDENTITY = ("commit", "gpu", "torch", "triton", "python")  # a change of these starts all over


class Stage(NamedTuple):
    """One process. `limit`: seconds after which it is killed."""

    name: str
    command: list[str]
    limit: int = LIMIT


def stages(out: Path) -> list[Stage]:
    """All stages, in the order in which they run."""
    python = sys.executable
    bench = [python, "-m", "bench"]
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []  # compiling is slow
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers, "-m", "gpu"]
    folder = ["--folder", str(out)]
    tests = [Stage(f"tests {family}", [*pytest, f"tests/{family}"], 400) for family in FAMILIES]
    speeds = [
        Stage(f"speed {family}", [*bench, "op", *ops_of(family), *folder], 400)
        for family in FAMILIES
    ]
    published = [
        Stage(f"speed {name}", [*bench, "op", "--shapes", name, *folder], 400)
        for name in ("deepgemm", "flashmla")
    ]
    return [
        Stage("build", [python, "setup.py", "--quiet", "build_ext", "--inplace", "--force"]),
        Stage("checks", [*bench, "run", "--no-speed", "--no-model", *folder], 300),
        Stage("tests hopper", [python, "-m", "bench.verify"], 400),
        *speeds,
        *published,
        *tests,
        Stage("tests model", [*pytest, "tests/model", "tests/bench"], 300),
        Stage("model", [*bench, "model", *folder], 200),
        Stage("tune", [*bench, "tune", *folder]),
        Stage("accumulation", [python, "-m", "bench.studies.accumulation", *folder], 200),
        Stage("launch", [python, "-m", "bench.studies.launch", *folder], 200),
    ]


def run_stage(command: Sequence[str], log: Path, limit: float) -> dict:
    """Runs a command with its output in `log`; kills it after `limit` seconds. Its record."""
    start, paths = time.monotonic(), [str(ROOT / "kernels"), str(ROOT)]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        try:
            code: int | str = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = f"killed after {limit:.0f} s"
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
    if machine.device().type != "cuda":
        console.print("gpu: needs a GPU, and there is none here; nothing was run")
        return 2
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
        remaining = end - time.monotonic()
        if remaining < stage.limit / 3:
            left.append(stage.name)
            continue
        log = out / f"{stage.name.replace(' ', '-')}.log"
        record = run_stage(stage.command, log, min(stage.limit, remaining))
        progress.add(stage.name, record)
        console.print(f"{stage.name:18} exit {record['exit']}, {record['seconds']} s: "
                      f"{record['last']}", markup=False, soft_wrap=True)  # fmt: skip
    if left:
        console.print(f"no time left for: {', '.join(left)}; run the command again", markup=False)
    console.print(f"written: {out}", soft_wrap=True)
    failed = [stage.name for stage in chosen if not progress.done(stage.name)]
    return 1 if failed else 0
