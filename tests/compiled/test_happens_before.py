"""Vector clocks and shadows of memory: every rule, and random programs against a naive model."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
PTX = FOLDER.parent.parent / "csrc" / "ptx"
COMPILER = shutil.which(os.environ.get("CXX") or "g++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled test program."""
    result = tmp_path_factory.mktemp("happens_before") / "happens_before_test"
    sources = [
        FOLDER / "happens_before_test.cpp",
        PTX / "happens_before.cpp",
        PTX / "global_order.cpp",
        PTX / "views.cpp",
    ]
    subprocess.run([str(COMPILER), "-O1", "-std=c++17", *sources, "-o", result], check=True)
    return result


def run(*command: str | Path) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_rules(program):
    run(program, "rules")


@pytest.mark.slow
def test_random_programs_against_a_model(program, seed):
    assert run(program, "random", str(seed)).count("conflicts") == 3
