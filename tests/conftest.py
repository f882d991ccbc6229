"""Seeds, poison and the choice between a GPU and the interpreter, for all tests."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import numpy as np
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Must be set before deepkern imports Triton: without a GPU its kernels run interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")
# The processes of pytest-xdist divide the cores. More threads than cores wait for each other.
PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if PROCESSES > 1:
    threads = max(1, (os.cpu_count() or 1) // PROCESSES)
    torch.set_num_threads(threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # of the processes that tests start
# Error messages of commands on one line: their tests must not depend on the width of the terminal.
os.environ["TERMINAL_WIDTH"] = "500"

import pytest  # noqa: E402

import deepkern  # noqa: E402
from deepkern.runtime import native  # noqa: E402
from deepkern.testing import compare, isas  # noqa: E402


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def device() -> torch.device:
    """Where tests put their tensors."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture
def seed(request) -> int:
    """A fresh seed per test, printed when the test fails; DEEPKERN_SEED=n repeats one."""
    value = int(os.environ.get("DEEPKERN_SEED") or torch.seed() % 2**31)
    request.node.user_properties.append(("seed", value))
    return value


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    """NumPy's generator from the test's seed."""
    return np.random.default_rng(seed)


@pytest.fixture
def generator(seed: int, device: torch.device) -> torch.Generator:
    """A generator on the test's device, from the test's seed."""
    return torch.Generator(device).manual_seed(seed)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    seeds = [v for k, v in item.user_properties if k == "seed"]
    if report.failed and seeds:
        report.sections.append(("seed", f"repeat with DEEPKERN_SEED={seeds[0]}"))
    return report


def force_isa(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forces an instruction set of the native CPU ops; skips the test if this CPU lacks it."""
    if not isas.supported(name):
        pytest.skip(f"this CPU lacks {name}")
    monkeypatch.setenv("DEEPKERN_CPU_ISA", name)


@pytest.fixture(params=isas.ISAS)
def isa(request, monkeypatch) -> str:
    """Forces each instruction set of the native CPU ops in turn, as far as this CPU has it."""
    force_isa(request.param, monkeypatch)
    return request.param


# The native CPU ops under the best instruction set of this CPU, and under each lower one.
CPU_BACKENDS = [
    "cpu",
    *(pytest.param(f"cpu-{isa}", marks=pytest.mark.proof) for isa in ("portable", "avx2")),
]


@pytest.fixture(params=["torch", "triton", *CPU_BACKENDS])
def backend(request, device, monkeypatch) -> Iterator[str]:
    """Forces each backend in turn around the test."""
    with force_backend(request.param, device, monkeypatch) as name:
        yield name


@pytest.fixture(params=["triton", *CPU_BACKENDS])
def kernel_backend(request, device, monkeypatch) -> Iterator[str]:
    """`backend` for a test that only compares with the reference, which `torch` runs."""
    with force_backend(request.param, device, monkeypatch) as name:
        yield name


@contextlib.contextmanager
def force_backend(
    parameter: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    name, _, isa = parameter.partition("-")
    if name == "cpu":
        if device.type != "cpu":
            pytest.skip("the cpu backend takes CPU tensors")
        if native.missing_reason():
            pytest.skip(native.missing_reason())
        if isa == isas.cpu_isas()[-1]:
            pytest.skip(f"{isa} is the best instruction set here: the backend cpu runs it")
        if isa:
            force_isa(isa, monkeypatch)
    with deepkern.backend(name):
        yield name


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty and the like give NaN, so that an element left unwritten shows."""
    with compare.poison():
        yield
