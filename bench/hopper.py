"""Runs csrc/sm90 as nvcc compiles it: host code and PTX, on CPU tensors, over the PTX machine.

nvcc compiles csrc/sm90/*.cu with the flags of the wheel, but keeps the PTX in the fatbin. The
objects link to cudart.cpp in the place of CUDA's runtime. So tile choice, tensor maps and launch
configurations are those of the wheel, and the machine executes the PTX.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

import deepkern
from deepkern.runtime import backends, ptx_library

from .emulator import CSRC, ROOT, compiler, load_ops, run, served

HERE, BUILD = CSRC / "ptx" / "hopper", ROOT / "build" / "hopper"
NVCC = shutil.which("nvcc")
# The flags of setup.py, with PTX in the place of machine code, and line numbers.
NVCC_FLAGS = ["-gencode", "arch=compute_90a,code=compute_90a", "-no-compress", "-lineinfo"]
# Without -fno-gnu-unique, the pointer to cuTensorMapEncodeTiled would be the emulator's.
NVCC_FLAGS += ["-std=c++17", "-O3", "--fmad=false", "-Xcompiler", "-fPIC,-fno-gnu-unique"]
HOST_FLAGS = ["-std=c++17", "-O1", "-g0", "-fPIC", "-Wall", "-Wextra"]
LIBRARY = "deepkern_machine"
# Of cudart.cpp: each returns a launcher of csrc/sm90, in the order of machine_use.
NAMES = ("fp8_gemm", "mla", "mla_prefill", "mla_prefill_backward")
LAUNCHERS = tuple(f"machine_{name}_launcher" for name in NAMES)


@functools.cache
def sources() -> dict[str, str]:
    """What nvcc compiles: path below csrc/ -> text."""
    paths = [p for p in (CSRC / "sm90").iterdir() if p.suffix in (".cu", ".cuh", ".h")]
    return {str(p.relative_to(CSRC)): p.read_text() for p in (*paths, CSRC / "fp8_gemm.h")}


@functools.cache
def toolkit() -> Path:
    """The folder of the CUDA toolkit."""
    assert NVCC is not None
    output = subprocess.run([NVCC, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    return Path(output.split("#$ TOP=")[1].splitlines()[0]).resolve()


def cached(content: list[str], suffix: str) -> Path:
    digest = hashlib.sha256("\0".join(content).encode()).hexdigest()
    return BUILD / f"{digest[:16]}{suffix}"


def compile_kernels(name: str, changed: dict[str, str], flags: tuple[str, ...]) -> Path:
    """sm90/`name`.cu with its headers, compiled by nvcc once for each content."""
    texts = {p: t for p, t in (sources() | changed).items() if p == name or not p.endswith(".cu")}
    if "mla" in name:  # does not depend on the tiles, which its headers may still include
        texts["sm90/fp8_gemm_tiles.h"] = sources()["sm90/fp8_gemm_tiles.h"]
    assert NVCC is not None
    done = cached([*NVCC_FLAGS, *flags, *(x for item in sorted(texts.items()) for x in item)], ".o")
    if not done.exists():
        with tempfile.TemporaryDirectory() as folder:
            for path, text in texts.items():
                Path(folder, path).parent.mkdir(parents=True, exist_ok=True)
                Path(folder, path).write_text(text)
            run([NVCC, *NVCC_FLAGS, *flags, "-c", str(Path(folder, name))], done)
    return done


def compile_host(source: Path, *flags: str) -> Path:
    """A C++ source, compiled once for each content of it and of the headers in csrc/sm90."""
    cxx = compiler()
    assert cxx is not None
    headers = [t for p, t in sources().items() if p.endswith(".h")]
    headers.append((CSRC / "arguments.h").read_text())
    done = cached([cxx, *flags, torch.__version__, source.read_text(), *headers], ".o")
    if not done.exists():
        run([cxx, *HOST_FLAGS, *flags, f"-I{CSRC}", "-c", str(source)], done)
    return done


def link(parts: list[Path], *flags: str) -> Path:
    machine = Path(ptx_library.path())
    library = cached([*map(str, parts), str(machine)], ".so")
    if not library.exists():
        # The machine is loaded already; the loader finds it by its soname.
        there = [f"-L{machine.parent}", f"-l:{machine.name}"]
        run(["g++", "-shared", "-Wl,-Bsymbolic", *map(str, parts), *flags, *there], library)
    return library


@functools.cache
def kernels(bug: str = "", of: str = "", tiles: str = "") -> ctypes.CDLL:
    """The launchers and kernels of csrc/sm90 over the machine.

    `bug` is a hook of sm90/`of`.cu that plants it, `tiles` replaces the list of tiles.
    """
    changed = {"sm90/fp8_gemm_tiles.h": tiles} if tiles else {}
    parts = []
    for name in ("fp8_gemm", "mla_decode", "mla_prefill", "mla_prefill_backward"):
        flags = (f"-DPLANT_{bug}=1",) if name == of else ()
        parts.append(compile_kernels(f"sm90/{name}.cu", changed, flags))
    parts.append(compile_host(HERE / "cudart.cpp", "-isystem", str(toolkit() / "include")))
    loaded = ctypes.CDLL(str(link(parts)), mode=os.RTLD_NOW | os.RTLD_LOCAL)
    loaded.machine_launches.restype = ctypes.c_char_p
    for name in LAUNCHERS:
        getattr(loaded, name).restype = ctypes.c_void_p
    return loaded


@functools.cache
def ops() -> ctypes.CDLL:
    """torch.ops.deepkern_machine: the ops of csrc/sm90/ops.cpp for CPU tensors."""
    folder = Path(torch.__file__).parent
    include = ["-isystem", str(folder / "include")]
    named = ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-DDEEPKERN_SM90_LIBRARY={LIBRARY}",
             "-DDEEPKERN_SM90_DEVICE=CPU", '-DDEEPKERN_SM90_SOURCES=""']  # fmt: skip
    parts = [
        compile_host(CSRC / "sm90" / "ops.cpp", *include, *named),
        compile_host(HERE / "ops.cpp", *include),
    ]
    library = link(parts, f"-L{folder / 'lib'}", "-ltorch_cpu", "-lc10")
    loaded = load_ops(LIBRARY, library)
    loaded.machine_use.argtypes = [ctypes.c_void_p] * len(LAUNCHERS)
    return loaded


@contextlib.contextmanager
def cuda_backend(
    library: ctypes.CDLL | None = None,
    seed: int = 0,
    order: str = "random",
    multiprocessors: int = 132,
    every: int = 0,
    **settings,
) -> Iterator[None]:
    """Forces backend `cuda` to accept CPU tensors and to run its kernels on the machine.

    `every`: inside `deepkern.profiled`, run every n-th cluster of an op's main kernel only.
    """
    used = library or kernels()
    ops().machine_use(*(getattr(used, name)() for name in LAUNCHERS))
    used.machine_set_multiprocessors(multiprocessors)
    used.machine_run_every(every)
    used.machine_launches()
    on_gpu = backends.unsupported_on_device

    def unsupported(op, name, device):
        return None if name == "cuda" and op.name in served() else on_gpu(op, name, device)

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(backends, "unsupported_on_device", unsupported))
        for name in served():
            op = deepkern.OPS[name]
            checked = op._checked(functools.partial(call, name))
            patches.enter_context(mock.patch.dict(op.launchers, cuda=checked))
        patches.enter_context(deepkern.backend("cuda"))
        patches.enter_context(deepkern.compiled("sm_90", seed=seed, order=order, **settings))
        yield


def call(name: str, *args):
    """The op of ops.cpp; its kernels may touch its arguments and what it allocates."""
    parameters = [parameter for parameter, _ in deepkern.OPS[name].parameters]
    with ptx_library.registered(dict(zip(parameters, args, strict=True))):
        ops().machine_begin_op()
        try:
            return getattr(getattr(torch.ops, LIBRARY), name).default(*args)
        finally:
            ops().machine_end_op()


def tiles() -> list[str]:
    """The lines of the list of tiles."""
    lines = sources()["sm90/fp8_gemm_tiles.h"].splitlines()
    return [line for line in lines if line.startswith("TILE(")]


def tile_of(kernel: str) -> str | None:
    """The line of the tile in a mangled name of a kernel; None for other kernels."""
    found = re.search(r"11GemmVariantE(\d)E((?:Li\d+E){5})Lb(\d)ELi(\d+)E", kernel)
    if found is None:
        return None
    variant, numbers, swapped, b_rows = found.groups()
    sizes = re.findall(r"\d+", numbers)
    names = ("dense", "contiguous", "masked", "k_grouped")  # deepkern::GemmVariant
    swaps = "true" if swapped == "1" else "false"
    return f"TILE({', '.join([names[int(variant)], *sizes, swaps, b_rows])})"


def launches(library: ctypes.CDLL | None = None) -> list[tuple[int, int, str]]:
    """The launches since the last call: blocks, blocks of a cluster, mangled name."""
    lines = (library or kernels()).machine_launches().decode().splitlines()
    return [(int(grid), int(cluster), name) for grid, cluster, name in map(str.split, lines)]
