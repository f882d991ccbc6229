"""Backend choice: forced, auto, and what `explain` reports."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest
import torch

import deepkern
from deepkern.runtime import arch, backends
from deepkern.runtime.op import OPS

OP = OPS["cast_per_token"]


@pytest.fixture
def x(device) -> torch.Tensor:
    return torch.ones(2, 128, device=device)


def record(monkeypatch, name: str) -> list:
    """Replaces the launcher of a backend by one that records its calls."""
    calls, launch = [], OP.launcher(name)

    def recording(*args):
        calls.append(name)
        return launch(*args)

    monkeypatch.setitem(OP.launchers, name, recording)
    return calls


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_forced_backend_runs(name, x, monkeypatch):
    calls = record(monkeypatch, name)
    with deepkern.backend(name):
        deepkern.cast_per_token(x)
    assert calls == [name]
    monkeypatch.setenv("DEEPKERN_BACKEND", name)
    deepkern.cast_per_token(x)
    assert calls == [name, name]


def test_innermost_backend_wins(x, monkeypatch):
    calls = record(monkeypatch, "torch")
    with deepkern.backend("triton"):
        with pytest.raises(ZeroDivisionError), deepkern.backend("torch"):
            deepkern.cast_per_token(x)
            raise ZeroDivisionError
        assert backends.requested() == "triton"
    assert calls == ["torch"] and backends.requested() == "auto"


def test_unsupported_forced_backend_raises(x):
    wrong = "cuda" if x.device.type == "cpu" else "cpu"
    with deepkern.backend(wrong), pytest.raises(deepkern.BackendError) as caught:
        deepkern.cast_per_token(x)
    assert "cast_per_token" in str(caught.value) and wrong in str(caught.value)


def test_unknown_backend_raises(x, monkeypatch):
    with pytest.raises(ValueError, match="expected one of"), deepkern.backend("tpu"):
        pass
    monkeypatch.setenv("DEEPKERN_BACKEND", "tpu")
    with pytest.raises(ValueError, match="expected one of"):
        deepkern.cast_per_token(x)


def test_triton_on_cpu_tensors_needs_the_interpreter():
    script = (
        "import torch, deepkern\n"
        "with deepkern.backend('triton'):\n"
        "    try: deepkern.cast_per_token(torch.ones(1, 128))\n"
        "    except deepkern.BackendError as error: print(error)\n"
    )
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert "TRITON_INTERPRET=1" in done.stdout, done.stderr


def test_auto_never_uses_the_interpreter():
    assert backends.choose(OP, torch.device("cpu")) in ("cpu", "torch")


def test_explain_names_the_backend_that_runs(x, monkeypatch):
    for name in ("torch", "triton"):
        with deepkern.backend(name):
            explanation = deepkern.explain(deepkern.cast_per_token, x)
        assert explanation.backend == name and explanation.reasons[name] == "supported"
    chosen = deepkern.explain("cast_per_token", x)
    calls = record(monkeypatch, chosen.backend)
    deepkern.cast_per_token(x)
    assert calls == [chosen.backend]
    assert set(chosen.reasons) == set(backends.BACKENDS)
    assert chosen.op in str(chosen) and chosen.where in str(chosen)


def test_explain_raises_what_the_call_raises(x):
    with pytest.raises(TypeError, match="cast_per_token: x: expected dtype"):
        deepkern.explain("cast_per_token", x.double())
    with pytest.raises(ValueError, match="no op"):
        deepkern.explain("cast_per_tokem", x)


def test_arguments_are_named_in_errors(x):
    with pytest.raises(TypeError, match="unexpected"):
        OP.positional((x, "fp32", "row", 3))
    with pytest.raises(TypeError, match="missing"):
        OP.positional(())
    assert OP.positional((), {"x": x}) == (x, "fp32", "row")


def test_debug_checks_contents(x, monkeypatch):
    def refuse(*args):
        raise ValueError("cast_per_token: x: contents")

    monkeypatch.setattr(OP, "debug_check", refuse)
    deepkern.cast_per_token(x)
    monkeypatch.setenv("DEEPKERN_DEBUG", "1")
    with pytest.raises(ValueError, match="contents"):
        deepkern.cast_per_token(x)


def test_compile_for_sets_the_target():
    assert arch.of(torch.device("cpu")).name == "sm_90"
    with arch.compile_for(arch.ARCHS["sm_80"]):
        assert arch.of(torch.device("cpu")).name == "sm_80"
        assert not arch.of(torch.device("cpu")).native_fp8
    assert arch.compiling_for() is None


def test_launch_on_the_device_of_the_tensors(x, monkeypatch):
    """Runs without a GPU: the calls that make a device current are replaced."""
    seen = []

    @contextlib.contextmanager
    def current(device):
        seen.append(device)
        yield

    monkeypatch.setattr(OP, "device", lambda args: torch.device("cuda", 1))
    monkeypatch.setattr(backends, "choose", lambda op, device, args: "torch")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", current)
    OP.run(x)
    assert seen == [torch.device("cuda", 1)]


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        (([1.0],), {}, "x: expected Tensor, got list"),
        ((torch.ones(1, 1),), {"scale_format": 3}, "scale_format: expected str, got int"),
        ((torch.ones(1, 1),), {"foo": 1}, "foo"),
        ((), {}, "missing"),
    ],
)
def test_arguments_of_the_wrong_type(args, kwargs, words):
    with pytest.raises(TypeError, match=f"^cast_per_token: .*{words}"):
        deepkern.cast_per_token(*args, **kwargs)
