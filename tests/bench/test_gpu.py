"""The stages for a GPU machine: their commands, and the record of one that fails or hangs."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch
from rich.console import Console

import deepkern
from bench import gpu


@pytest.mark.parametrize("family", ["quant", "matmul", "attention", "experts"])
def test_commands_name_existing_files_and_ops(family, tmp_path):
    known = gpu.commands(family, tmp_path)
    assert tuple(known) == (gpu.STAGES[:6] if family == "matmul" else gpu.STAGES[:4])
    assert (gpu.ROOT / known["tests"][-1]).is_dir()
    ops = known["speed"][known["speed"].index("ops") + 1 : known["speed"].index("--folder")]
    assert ops == gpu.ops_of(family)
    assert known["ops"][-1].split(" or ") == ops


def test_stages_of_hopper(tmp_path):
    known = gpu.commands("hopper", tmp_path)
    assert tuple(known) == ("build", "verify", "speed")
    assert gpu.ops_of("hopper") == [op for op in known["speed"] if op in deepkern.OPS]


def test_every_op_has_a_family():
    families = [f for f in gpu.FAMILIES if f != "hopper"]
    assert sorted(op for f in families for op in gpu.ops_of(f)) == sorted(deepkern.OPS)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def run(known, tmp_path, stages=()) -> tuple[int, dict, str]:
    output = io.StringIO()
    code = gpu.run_stages("quant", known, stages, tmp_path, Console(file=output, width=200))
    return code, json.loads((tmp_path / "quant.json").read_text()), output.getvalue()


def test_records_of_stages(tmp_path):
    known = {"build": python("print('built')"), "tests": python("print('1 failed'); exit(3)")}
    code, records, output = run(known, tmp_path)
    assert code == 1 and records["machine"]["torch"] == torch.__version__
    assert records["build"]["exit"] == 0 and records["build"]["last"] == "built"
    assert records["tests"]["exit"] == 3 and records["tests"]["last"] == "1 failed"
    assert "exit 3" in output and "built" in (tmp_path / "quant.log").read_text()
    # Running one stage again keeps the record of the other.
    known["tests"] = python("print('passed')")
    code, records, _ = run(known, tmp_path, ["tests"])
    assert code == 0 and records["build"]["last"] == "built"
    assert records["tests"]["last"] == "passed"


def test_a_stage_that_hangs_is_killed(tmp_path):
    child = f"[{sys.executable!r}, '-c', 'import time; time.sleep(60)']"
    code = f"import subprocess; print('waiting', flush=True); subprocess.run({child})"
    record = gpu.run_stage(python(code), tmp_path / "log", limit=2)
    assert record["exit"] == "killed after 2 s" and record["seconds"] < 30
    assert record["last"] == "waiting"
