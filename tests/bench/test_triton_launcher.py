"""The kernels reach Triton's own launcher in a form that it accepts, without a GPU.

`bench inspect` launches every kernel, target and inspected size in this way (test_budgets.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from bench import triton_launcher

ROOT = Path(__file__).parent.parent.parent
FINDS_TUPLES = tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 8)


@pytest.fixture(scope="module")
def errors() -> dict[str, str | None]:
    """What launch_checks.py reports."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'kernels'}{os.pathsep}{ROOT}"}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(Path(__file__).with_name("launch_checks.py"))]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_descriptor_argument_is_accepted(errors):
    assert errors["separate"] is None


@pytest.mark.skipif(FINDS_TUPLES, reason="Triton 3.8 and newer find descriptors inside tuples")
def test_descriptor_in_a_tuple_is_refused(errors):
    assert errors["in a tuple"].startswith("AssertionError")


def test_overlapping_rows_are_refused(errors):
    assert "rows must not overlap" in errors["overlapping"]


@pytest.mark.parametrize("rows", ["contiguous", "expanded", "sliding", "one row"])
def test_gemm_launches_with_any_rows(errors, rows):
    assert errors[f"gemm {rows}"] is None


GOOD = {"address": 4096, "swizzle": 3, "elem_size": 1, "elem_type": 0, "box": [64, 128],
        "shape": [100, 256], "strides": [256, 1], "padding": 0}  # fmt: skip


def test_tensor_map_rules_accept_a_valid_map():
    assert triton_launcher.fill_tensor_map(**GOOD).shape == (100, 256)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"address": 4104}, "address: multiple of 16"),
        ({"strides": [264, 1]}, "strides: multiples of 16 bytes"),
        ({"strides": [2**40, 1]}, "strides: less than 2\\^40"),
        ({"strides": [128, 1]}, "strides: rows must not overlap"),
        ({"strides": [0, 1]}, "strides: rows must not overlap"),
        ({"shape": [0, 256]}, "shape: 1 to 2\\^32"),
        ({"box": [512, 128]}, "box: 1 to 256"),
        ({"box": [64, 8]}, "box: rows of a multiple of 16 bytes"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_tensor_map_rules_refuse(change, rule):
    with pytest.raises(ValueError, match=rule):
        triton_launcher.fill_tensor_map(**{**GOOD, **change})


def test_launch_checks_the_argument_types():
    arg = triton_launcher.KernelArg(None, "kernel")
    signature = triton_launcher.Signature(["*fp32", "i32"])
    with pytest.raises(TypeError, match="argument 1: expected i32, got str"):
        triton_launcher.check_launch([arg, arg], signature, [16, "three"])
    with pytest.raises(TypeError, match="expected 2 arguments, got 1"):
        triton_launcher.check_launch([arg], signature, [16])
