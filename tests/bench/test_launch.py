"""`python -m bench.studies.launch` times the host side of calls and writes a record."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from bench import emulator
from bench.machine import ROOT


@pytest.mark.proof
def test_times_triton_and_cuda(tmp_path):
    """In a separate process, because this one's Triton interprets kernels."""
    command = [sys.executable, "-m", "bench.studies.launch", "cast_per_token", "fp8_gemm_nt"]
    options = ["--seconds", "0.01", "--folder", str(tmp_path)]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("*-launch.jsonl")
    machine, *rows = map(json.loads, file.read_text().splitlines())
    assert machine["kind"] == "machine" and not machine["interpreted_triton"]
    assert [row["op"] for row in rows] == ["cast_per_token", "fp8_gemm_nt"]
    assert all(0 < row["triton"] < 1e5 for row in rows)
    if emulator.compiler():
        assert 0 < rows[1]["cuda, in C++"] < rows[1]["cuda"] < 1e5
