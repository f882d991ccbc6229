"""csrc/sm90 compiled for this machine against csrc/emulator, and its kernels as functions."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
CSRC, BUILD = ROOT / "csrc", ROOT / "build" / "emulator"
FLAGS = ["-std=c++17", "-O2", "-g0", "-fPIC", "-Wall", "-Wextra", "-ffp-contract=off"]
ORDERS = {"random": 0, "earliest": 1, "latest": 2}  # emulator::Order
TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # sm90::Type
FORMS = (
    "128x128",
    "128x128, pairs of blocks",
    "64x64",
)  # as csrc/emulator/kernels/fp8_gemm_nt.cpp has them


def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    return found or pytest.skip("no C++ compiler")


def build(sources: dict[str, str]) -> ctypes.CDLL:
    """A library of `sources`, name below csrc/ -> text, compiled once for each content."""
    parts = [compile_one(name, text, sources) for name, text in sources.items()
             if name.endswith(".cpp")]  # fmt: skip
    digest = hashlib.sha256("".join(map(str, parts)).encode()).hexdigest()[:16]
    library = BUILD / f"{digest}.so"
    if not library.exists():
        run([compiler(), "-shared", *map(str, parts)], library)
    return ctypes.CDLL(str(library))


def compile_one(name: str, text: str, sources: dict[str, str]) -> Path:
    # The machine itself knows no kernel, so a changed kernel does not compile it anew.
    seen = ("emulator/", "sm90/") if name.startswith("emulator/kernels/") else ("emulator/",)
    headers = [sources[h] for h in sorted(sources) if not h.endswith(".cpp") and h.startswith(seen)]
    content = "\0".join([compiler(), *FLAGS, name, text, *headers])
    done = BUILD / f"{hashlib.sha256(content.encode()).hexdigest()[:16]}.o"
    if not done.exists():
        with tempfile.TemporaryDirectory() as folder:
            for path, body in sources.items():
                Path(folder, path).parent.mkdir(parents=True, exist_ok=True)
                Path(folder, path).write_text(body)
            run([compiler(), *FLAGS, "-c", str(Path(folder, name))], done)
    return done


def run(command: list[str], output: Path) -> None:
    """Runs a compiler; `output` is whole or not there, whoever else compiles it."""
    BUILD.mkdir(parents=True, exist_ok=True)
    fresh = output.with_suffix(f".{os.getpid()}")
    got = subprocess.run([*command, "-o", str(fresh)], capture_output=True, text=True, timeout=300)
    assert got.returncode == 0, got.stderr[-3000:]
    os.replace(fresh, output)


def sources() -> dict[str, str]:
    """The emulator and the kernels, name below csrc/ -> text."""
    paths = [p for p in (CSRC / "emulator").rglob("*") if p.is_file()]
    paths += (CSRC / "sm90").glob("*.cuh")
    return {str(p.relative_to(CSRC)): p.read_text() for p in sorted(paths)}


class GemmArguments(ctypes.Structure):
    """sm90::GemmArguments."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a_scale", "b_scale", "c", "out")),
        *((name, ctypes.c_int64) for name in ("a_scale_row", "a_scale_block", "b_scale_row",
                                              "b_scale_block", "c_row", "out_row")),
        *((name, ctypes.c_int) for name in ("M", "N", "K", "c_type", "out_type", "band")),
        ("store_by_tma", ctypes.c_bool),
    ]  # fmt: skip


class EmulatorFailure(AssertionError):
    """What the emulator found a kernel doing."""


def gemm_of(library: ctypes.CDLL) -> Callable[..., Tensor]:
    """fp8_gemm_nt as `library` has it."""

    def fp8_gemm_nt(
        a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype=torch.bfloat16,
        c: Tensor | None = None, *, form: str = FORMS[0], seed: int = 0, order: str = "random",
        blocks: int = 4, accumulator_bits: int = 0, by_tma: bool | None = None,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        (M, K), N = a.shape, b.shape[0]
        out = torch.full((M, N), torch.nan, dtype=out_dtype) if out is None else out
        p = GemmArguments(
            a_scale.data_ptr(), b_scale.data_ptr(), 0 if c is None else c.data_ptr(),
            out.data_ptr(), *a_scale.stride(), *b_scale.stride(), 0 if c is None else c.stride(0),
            N, M, N, K, 0 if c is None else TYPES[c.dtype], TYPES[out_dtype], 8,
            N * out.element_size() % 16 == 0 if by_tma is None else by_tma,
        )  # fmt: skip
        message = ctypes.create_string_buffer(4096)
        failed = library.emulate_fp8_gemm_nt(
            *(ctypes.c_void_p(x.data_ptr()) for x in (a, b)), ctypes.byref(p),
            *(ctypes.c_int64(x.stride(0)) for x in (a, b)), FORMS.index(form), blocks,
            ctypes.c_uint64(seed), ORDERS[order], accumulator_bits, message, len(message),
        )  # fmt: skip
        if failed:
            raise EmulatorFailure(message.value.decode())
        return out

    return fp8_gemm_nt


@pytest.fixture(scope="session")
def emulated() -> Callable[..., Tensor]:
    """fp8_gemm_nt of csrc/sm90, run in the emulator."""
    return gemm_of(build(sources()))
