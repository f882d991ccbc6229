"""Launches in the interpreter: autotuning, arguments, boolean operators, undoing the patches."""

import os
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl

from deepkern import interpreter

if not interpreter.active():
    pytest.skip("needs the interpreter: TRITON_INTERPRET=1", allow_module_level=True)


def configs(*blocks):
    return [triton.Config({"BLOCK": b}, num_warps=w) for w, b in enumerate(blocks, 1)]


@triton.autotune(configs(32, 16, 64), key=["n"])
@triton.heuristics({"EVEN": lambda args: args["n"] % args["BLOCK"] == 0})
@triton.jit
def tuned_kernel(x, out, n, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i, mask=i < n) + 1, mask=i < n)
    tl.store(out, BLOCK + EVEN)


@triton.autotune(
    configs(32, 16, 64),
    key=["n"],
    prune_configs_by={"early_config_prune": lambda configs, args, **_: configs[1:]},
    reset_to_zero=["x"],
)
@triton.jit
def pruned_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i, mask=i < n) + 1, mask=i < n)
    tl.store(out, BLOCK)


def test_autotune_runs_first_config_once():
    out = torch.zeros(1, dtype=torch.int32)
    for n in (48, 64):
        x = torch.zeros(n)
        tuned_kernel[lambda meta, n=n: (triton.cdiv(n, meta["BLOCK"]),)](x, out, n)
        assert (x == 1).all() and out.item() == 32 + (n == 64)
    assert tuned_kernel.best_config.kwargs == {"BLOCK": 32}
    x = torch.zeros(48)
    pruned_kernel[lambda meta: (triton.cdiv(48, meta["BLOCK"]),)](x, out, 48)
    assert (x == 1).all() and out.item() == 16


@triton.jit
def scale_kernel(x, out, scale, flag, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    scaled = tl.load(x + i) * scale
    tl.static_assert(scaled.dtype == tl.float32)
    if flag:
        scaled = scaled + 1
    tl.store(out + i, scaled)


def test_float_and_bool_arguments_have_types():
    # A compiled kernel receives a float32 scalar, so bf16 * scale is float32; a literal stays bf16.
    x, out = torch.randn(16).bfloat16(), torch.empty(16)
    for flag in (True, False):
        scale_kernel[(1,)](x, out, 0.1, flag, 16)
        assert torch.equal(out, x.float() * torch.tensor(0.1) + flag)


@triton.jit
def logic_kernel(x, out, n, ON: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i)
    inside = i < n and value > 0
    either = (i >= n or value < 0) and ON
    neither = not (inside or either)
    tl.store(out + i, inside.to(tl.int32) + 2 * either + 4 * neither)
    if n > 0 and not n > 50:
        tl.store(out, 8)


def test_and_or_not_are_elementwise():
    x = torch.tensor([1.0, -1.0, 0.0, 1.0] * 4)
    out = torch.empty(16, dtype=torch.int32)
    logic_kernel[(1,)](x, out, 10, True, 16)
    inside = (torch.arange(16) < 10) & (x > 0)
    either = (torch.arange(16) >= 10) | (x < 0)
    expected = inside.int() + 2 * either + 4 * ~(inside | either)
    expected[0] = 8
    assert torch.equal(out, expected)


@triton.jit
def print_kernel(x):
    tl.device_print("x", tl.load(x + tl.arange(0, 2)).to(tl.bfloat16))


def test_device_print_shows_values_of_bf16(capsys):
    print_kernel[(1,)](torch.tensor([1.5, -2.0]))
    assert "[ 1.5 -2. ]" in capsys.readouterr().out


@triton.jit
def helper(x, k):
    return x * k


@triton.jit
def loop_kernel(x, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, tl.cdiv(n, 4)):
        total += helper(i, k)
    for k in tl.range(0, n, 4):
        total += k
    tl.store(x + i, total)


def test_scalars_bound_loops():
    x = torch.empty(8)
    loop_kernel[(1,)](x, 10, 8)
    assert torch.equal(x, torch.arange(8) * 3.0 + 12)


def test_language_is_restored_after_launch():
    before = {name: getattr(tl, name) for name in ("load", "store", "range", "sum", "zeros")}
    core = {name: getattr(tl.core, name) for name in ("load", "reduce", "full")}
    loop_kernel[(1,)](torch.empty(8), 10, 8)
    with pytest.raises(interpreter.InterpreterMemoryError):
        loop_kernel[(1,)](torch.empty(7), 10, 8)
    assert all(getattr(tl, name) is value for name, value in before.items())
    assert all(getattr(tl.core, name) is value for name, value in core.items())


def test_other_errors_keep_their_type():
    @triton.jit
    def broken(x):
        tl.static_assert(False, "on purpose")

    with pytest.raises(triton.runtime.errors.InterpreterError, match="on purpose"):
        broken[(1,)](torch.empty(8))


def run(code, **environment):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_install_without_triton_interpret_is_no_op():
    code = """
import triton
from triton.runtime import driver
before = triton.runtime.autotuner.Autotuner.do_bench, driver._active
from deepkern import interpreter
print(interpreter.install(), interpreter.active(),
      before == (triton.runtime.autotuner.Autotuner.do_bench, driver._active))
"""
    assert run(code) == ["False", "False", "True"]


def test_install_twice_changes_nothing():
    load = triton.runtime.interpreter.InterpreterBuilder.create_masked_load
    assert interpreter.install() is True
    assert triton.runtime.interpreter.InterpreterBuilder.create_masked_load is load


def test_unsupported_version_raises():
    code = """
from triton.runtime import interpreter as stock
del stock.GridExecutor
try:
    from deepkern import interpreter
    interpreter.install()
except RuntimeError as error:
    print("raised" if "lacks GridExecutor" in str(error) else error)
"""
    assert run(code, TRITON_INTERPRET="1") == ["raised"]
