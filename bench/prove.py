"""`python -m bench prove`: the GPU tests of the Hopper kernels, and if all pass, a record of it.

The record goes to bench/results/ and to
kernels/deepkern/runtime/verified_kernels.json. From then on
`auto` uses these kernels, until their sources change.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

import deepkern
from deepkern.runtime import native, verified

from . import machine, results
from .progress import screen

COUNTS = ("tests", "failures", "errors", "skipped")


def pytest_counts() -> dict[str, int]:
    """Runs the tests; how many there were, and how many went how."""
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
    file: Path = verified.FILE,
    console: Console | None = None,
) -> int:
    """The command: 2 without a Hopper GPU or its kernels, 1 if a test did not pass."""
    console = console or screen()
    about = machine.describe()
    gpu = about["gpu"]
    if gpu is None or gpu["target"] != "sm_90" or verified.compiled_sources() is None:
        why = (
            "no Hopper GPU"
            if verified.compiled_sources()
            else "deepkern._C holds no Hopper kernels"
        )
        console.print(f"prove: {why}; nothing was run")
        return 2
    counts = run_tests()
    if not counts["tests"] or any(counts[name] for name in COUNTS[1:]):
        console.print(f"prove: not proven: {counts}", style="red")
        return 1
    ops = [op for op in sorted(deepkern.OPS) if native.native_op(op, "cuda")]
    result = results.path(about, False, folder)
    record = {"kind": "evidence", "ops": ops, "sources": verified.compiled_sources(), **counts}
    results.write([{"kind": "machine", **about}, record], result)
    found = {
        "gpu": gpu["name"],
        "ops": ops,
        "sources": verified.compiled_sources(),
        "result": result.name,
    }
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    fresh.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(fresh, file)
    console.print(f"prove: {counts['tests']} tests passed; written: {result}, {file}")
    return 0
