"""`python -m bench.verify`: runs the GPU tests of the Hopper kernels and records if all pass.

The record goes to bench/results/ and to kernels/deepkern/runtime/verified_kernels.json. `auto` uses
the Hopper kernels while that file names them and their sources are unchanged.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import typer
from rich.console import Console

import deepkern
from deepkern.runtime import native, verified

from . import machine, results
from .command_line import FOLDER, screen

COUNTS = ("tests", "failures", "errors", "skipped")


def pytest_counts() -> dict[str, int]:
    """Runs the tests and counts their outcomes."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu",
                   "tests/hopper", f"--junitxml={report}"]  # fmt: skip
        subprocess.run(command, cwd=machine.ROOT)
        if not report.exists():
            return dict.fromkeys(COUNTS, 0)
        suite = ET.parse(report).getroot().find("testsuite")
        return {name: int(suite.get(name)) for name in COUNTS}


def run(
    run_tests: Callable[[], dict[str, int]] = pytest_counts,
    folder: Path = results.FOLDER,
    file: Path | None = None,
    console: Console | None = None,
) -> int:
    """The command. The record goes to `file`: into `folder`, if that is not bench/results.

    Exit code 2 without a Hopper GPU or its kernels, 1 if a test did not pass."""
    console = console or screen()
    file = file or (verified.FILE if folder == results.FOLDER else folder / verified.FILE.name)
    about = machine.describe()
    gpu = about["gpu"]
    if gpu is None or gpu["target"] != "sm_90" or verified.compiled_sources() is None:
        reason = (
            "no Hopper GPU" if verified.compiled_sources() else "deepkern._C has no Hopper kernels"
        )
        console.print(f"verify: {reason}; nothing was run")
        return 2
    counts = run_tests()
    if not counts["tests"] or any(counts[name] for name in COUNTS[1:]):
        console.print(f"verify: not verified: {counts}", style="red")
        return 1
    ops = [op for op in sorted(deepkern.OPS) if native.native_op(op, "cuda")]
    result = results.path(about, False, folder)
    record = {"kind": "verification", "ops": ops, "sources": verified.compiled_sources(), **counts}
    results.write([{"kind": "machine", **about}, record], result)
    record_of_run = {
        "gpu": gpu["name"],
        "ops": ops,
        "sources": verified.compiled_sources(),
        "result": result.name,
    }
    results.write_text(json.dumps(record_of_run, indent=1) + "\n", file)
    console.print(f"verify: {counts['tests']} tests passed; written: {result}, {file}")
    return 0


def main(folder: Path = FOLDER) -> None:
    """Runs the GPU tests of the Hopper kernels; if all pass, `auto` uses these kernels."""
    raise typer.Exit(run(folder=folder))


if __name__ == "__main__":
    typer.run(main)
