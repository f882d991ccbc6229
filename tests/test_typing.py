"""The public functions are typed: mypy accepts a correct user's file and rejects wrong calls."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import deepkern

ROOT = Path(__file__).parent.parent
RIGHT = """
import torch
import deepkern

x = torch.randn(64, 256)
x8, x_scale = deepkern.cast_per_token(x)
w8, w_scale = deepkern.cast_per_block(torch.randn(512, 256), scale_format="ue8m0")
y: torch.Tensor = deepkern.fp8_gemm_nt(x8, x_scale, w8, w_scale, out_dtype=torch.float32, c=None)
index = torch.zeros(64, 2, dtype=torch.int64)
rows, scale, group_index, counts, handle = deepkern.expert_dispatch(x, index, num_experts=8)
if scale is not None:
    print(scale.shape)
print(deepkern.explain(deepkern.fp8_gemm_nt, x8, x_scale, w8, w_scale).tile)
with deepkern.backend("torch"):
    z: torch.Tensor = deepkern.fp8_linear(x, torch.randn(8, 256))
oracle: torch.Tensor = deepkern.reference.fp8_gemm_nt(x8, x_scale, w8, w_scale)
"""
WRONG = {
    "keyword": ("deepkern.cast_per_token(x, scale_formats='fp32')", "call-arg"),
    "missing": ("deepkern.fp8_gemm_nt(x, x, x)", "call-arg"),
    "type": ("deepkern.cast_per_token(x, scale_format=3)", "arg-type"),
    "dtype": ("deepkern.fp8_gemm_nt(x, x, x, x, 'bfloat16')", "arg-type"),
    "none": ("deepkern.fp8_gemm_nt(x, None, x, x)", "arg-type"),
    "outputs": ("a, b, c = deepkern.cast_per_token(x)", "misc"),
    "optional": ("deepkern.expert_dispatch(x, x, 8)[1].shape", "union-attr"),
}


def mypy(tmp_path: Path, text: str) -> tuple[int, str]:
    """The exit code and the output of `mypy --strict` on a file with this text."""
    file = tmp_path / "user.py"
    file.write_text(text)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache")]
    env = {**os.environ, "MYPYPATH": str(ROOT / "kernels")}
    options = ["--follow-imports", "silent", str(file)]
    done = subprocess.run(command + options, capture_output=True, text=True, env=env, check=False)
    return done.returncode, done.stdout + done.stderr


needs_mypy = pytest.mark.skipif(
    importlib.util.find_spec("mypy") is None, reason="mypy is not installed"
)


@needs_mypy
@pytest.mark.slow
def test_mypy_accepts_a_users_file(tmp_path):
    code, output = mypy(tmp_path, RIGHT)
    assert code == 0, output


@needs_mypy
@pytest.mark.slow
def test_mypy_rejects_wrong_calls(tmp_path):
    lines = ["import torch", "import deepkern", "x = torch.ones(2, 2)"]
    code, output = mypy(tmp_path, "\n".join(lines + [call for call, _ in WRONG.values()]) + "\n")
    assert code == 1, output
    for number, (name, (_, error)) in enumerate(WRONG.items(), len(lines) + 1):
        assert any(f"user.py:{number}: error" in x and error in x for x in output.splitlines()), (
            f"{name}: {output}"
        )


@pytest.mark.parametrize("name", sorted(deepkern.OPS))
def test_op_is_a_documented_function(name):
    function = getattr(module_of(name), name)
    assert inspect.isfunction(function) and function is getattr(deepkern, name, function)
    signature = inspect.signature(function)
    assert [*signature.parameters] == [*deepkern.OPS[name].names]
    assert all(p.annotation is not p.empty for p in signature.parameters.values())
    assert signature.return_annotation is not signature.empty
    assert inspect.getdoc(function)


def module_of(name: str):
    """The module of an op: importing it gives a module and not the function."""
    module = inspect.getmodule(deepkern.OPS[name].describe)
    assert inspect.ismodule(importlib.import_module(module.__name__))
    return module


def test_public_names_are_listed_once():
    names = deepkern.__all__
    assert len(names) == len(set(names))
    forward = {name for name in deepkern.OPS if hasattr(deepkern, name)}
    assert forward == set(deepkern.OPS)
    assert set(deepkern.OPS) <= set(names)


@pytest.mark.slow
def test_import_does_not_load_triton():
    script = "import sys, deepkern; print('triton' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert done.stdout.split() == ["False"]
