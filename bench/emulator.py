"""Compiles csrc/sm90 for this machine: kernels run in csrc/emulator, ops run on CPU tensors."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

import deepkern
from deepkern.runtime import backends, native

ROOT = Path(__file__).parents[1]
CSRC, BUILD = ROOT / "csrc", ROOT / "build" / "emulator"
FLAGS = ["-std=c++17", "-O2", "-g0", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
FLAGS += ["-ffp-contract=off"]
ORDERS = {"random": 0, "earliest": 1, "latest": 2}  # emulator::Order
LIBRARY = "deepkern_emulated"


def compiler() -> str | None:
    """The C++ compiler, or None."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def sources() -> dict[str, str]:
    """The sources of the emulator and the kernels: path below csrc/ -> text."""
    paths = [p for p in (CSRC / "emulator").rglob("*") if p.is_file()]
    paths += [p for p in (CSRC / "sm90").iterdir() if p.suffix == ".cuh"]
    paths += [CSRC / "sm90" / f"{name}.h" for name in ("choose", "fp8_gemm_tiles", "launch")]
    paths += [CSRC / "fp8_gemm.h", CSRC / "ptx" / "tensor_core.cpp"]
    paths += [CSRC / "ptx" / f"{n}.h"
              for n in ("matrix_descriptor", "numbers", "program", "tensor_core")]  # fmt: skip
    found = {str(p.relative_to(CSRC)): p.read_text() for p in sorted(paths)}
    return {name: text for name, text in found.items() if not name.startswith("emulator/cuda/")}


def build(sources: dict[str, str], *flags: str) -> ctypes.CDLL:
    """Compiles `sources` (path below csrc/ -> text) to a library, once for each content.

    `flags` are compiler flags for the kernels. The emulator itself is compiled without them.
    """
    names = [name for name in sources if name.endswith(".cpp")]
    return ctypes.CDLL(
        str(link(compile_all({n: () if of_machine(n) else flags for n in names}, sources)))
    )


def compile_all(flags: dict[str, tuple[str, ...]], sources: dict[str, str]) -> list[Path]:
    """The objects of the sources in `flags`. Two processes that build the same share the work."""
    order = random.sample([*flags], len(flags))
    parts = {name: compile_one(name, sources, *flags[name]) for name in order}
    return [parts[name] for name in flags]


def compile_one(name: str, sources: dict[str, str], *flags: str) -> Path:
    # The emulator includes no kernel, so a changed kernel does not recompile it.
    included = [h for h in sorted(sources) if not h.endswith(".cpp")]
    headers = [sources[h] for h in included if of_machine(h) or not of_machine(name)]
    content = "\0".join([compiler(), *FLAGS, *flags, name, sources[name], *headers])
    done = BUILD / f"{hashlib.sha256(content.encode()).hexdigest()[:16]}.o"
    if not done.exists():
        with tempfile.TemporaryDirectory() as folder:
            for path, body in sources.items():
                Path(folder, path).parent.mkdir(parents=True, exist_ok=True)
                Path(folder, path).write_text(body)
            here = [f.replace("CSRC", folder) for f in flags]
            run([compiler(), *FLAGS, *here, "-x", "c++", "-c", str(Path(folder, name))], done)
    return done


def of_machine(name: str) -> bool:
    """Whether a source belongs to the emulator, not to a kernel that runs on it."""
    return name.startswith(("emulator/", "ptx/")) and name.count("/") == 1


def link(parts: list[Path], *flags: str) -> Path:
    digest = hashlib.sha256("".join(map(str, parts)).encode()).hexdigest()[:16]
    library = BUILD / f"{digest}.so"
    if not library.exists():
        run([compiler(), "-shared", *map(str, parts), *flags], library)
    return library


def run(command: list[str], output: Path) -> None:
    """Runs a compiler, unless `output` exists or another process builds it meanwhile.

    Replaces `output` atomically, so other builds see no partial file.
    """
    with alone(output):
        if output.exists():
            return
        fresh = output.with_suffix(f".{os.getpid()}")
        command = [*command, "-o", str(fresh)]
        got = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert got.returncode == 0, got.stderr[-3000:]
        os.replace(fresh, output)


@contextlib.contextmanager
def alone(output: Path) -> Iterator[None]:
    """Only one process at a time is in this block for `output`; the others wait."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{output}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@functools.cache
def ops() -> ctypes.CDLL:
    """The ops of csrc/sm90 with their launchers: torch.ops.deepkern_emulated, for CPU tensors."""
    paths = sorted(p for p in CSRC.rglob("*") if p.suffix in (".cpp", ".cu", ".cuh", ".h"))
    whole = {str(p.relative_to(CSRC)): p.read_text() for p in paths}
    torch_folder = Path(torch.__file__).parent
    flags = ["-ICSRC/emulator/cuda", "-isystem", str(torch_folder / "include"),
             "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-DDEEPKERN_SM90_LIBRARY={LIBRARY}",
             "-DDEEPKERN_SM90_DEVICE=CPU", '-DDEEPKERN_SM90_SOURCES=""']  # fmt: skip
    names = [n for n in whole if n.endswith(".cu") or n == "sm90/ops.cpp"]
    names += [n for n in whole if n.startswith("emulator/cuda/") and n.endswith(".cpp")]
    parts = compile_all(dict.fromkeys(names, tuple(flags)), whole)
    machine = sources()
    names = [n for n in machine if of_machine(n) and n.endswith(".cpp")]
    parts += compile_all(dict.fromkeys(names, ()), machine)
    library = link(parts, f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10")
    return load_ops(LIBRARY, library)


def load_ops(name: str, library: Path) -> ctypes.CDLL:
    """Loads a build of csrc/sm90/ops.cpp that registers its ops as torch.ops.`name`."""
    native.missing_reason()  # loads deepkern_native, which defines the schemas
    schemas = torch.library.Library(name, "DEF")
    for op in served():
        schema = str(getattr(torch.ops.deepkern_native, op).default._schema)
        schemas.define(schema.split("::", 1)[1])
    torch.ops.load_library(str(library))
    loaded = ctypes.CDLL(str(library))
    loaded.schemas = schemas  # the definitions live as long as this object
    return loaded


@functools.cache
def served() -> list[str]:
    """The ops that csrc/sm90 implements."""
    text = (CSRC / "sm90" / "ops.cpp").read_text()
    return [line.split('"')[1] for line in text.splitlines() if line.startswith('  m.impl("')]


@contextlib.contextmanager
def cuda_backend(
    seed: int = 0,
    order: str = "random",
    multiprocessors: int = 132,
    launches: bool = True,
) -> Iterator[None]:
    """Forces backend `cuda` to accept CPU tensors and to run its kernels in the emulator.

    With `launches=False` no kernel runs, only the host code of a call.
    """
    ops().emulate_how(ctypes.c_uint64(seed), ORDERS[order], multiprocessors, int(launches))
    on_gpu = backends.unsupported_on_device

    def unsupported(op, name, device):
        return None if name == "cuda" and op.name in served() else on_gpu(op, name, device)

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(backends, "unsupported_on_device", unsupported))
        for name in served():
            emulated = getattr(getattr(torch.ops, LIBRARY), name).default
            op = deepkern.OPS[name]
            patches.enter_context(mock.patch.dict(op.launchers, cuda=op._checked(emulated)))
        patches.enter_context(deepkern.backend("cuda"))
        yield
