"""The program of docs/compiled.md gives the report that the page shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent.parent
_, PROGRAM, _, REPORT, *_ = (ROOT / "docs" / "compiled.md").read_text().split("```", 4)
PROGRAM = PROGRAM.removeprefix("python\n")


def run(folder: Path, program: str) -> subprocess.CompletedProcess:
    (folder / "my_kernel.py").write_text(program)
    env = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "my_kernel.py"]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def without_address(text: str) -> str:
    return re.sub("0x[0-9a-f]+", "0x", text)


def test_program_gives_the_report(tmp_path):
    result = run(tmp_path, PROGRAM)
    report = REPORT.strip().removeprefix("deepkern.KernelFailure: ")
    assert result.returncode == 1
    assert without_address(report) in without_address(result.stderr)


def test_corrected_program_runs(tmp_path):
    load = "offsets)  # the mask is missing"
    assert load in PROGRAM
    corrected = PROGRAM.replace(load, "offsets, mask=offsets < columns, other=0.0)")
    check = "\ntorch.testing.assert_close(out, x.sum(1))\n"
    result = run(tmp_path, corrected + check)
    assert result.returncode == 0, result.stderr
