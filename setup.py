"""Builds the package's C++ parts; pyproject.toml has everything else.

deepkern._C (native ops on torch's stable ABI) needs a C++ compiler, and for its Hopper kernels nvcc
13. deepkern._host (pybind11) also needs Python's headers. deepkern._ptx, the machine that executes
PTX, needs the compiler alone; it is a library that ctypes and Triton's launcher call. A part that
cannot be built is left out: the build prints the reason, the package reports it at run time, and
the other backends work.
DEEPKERN_REQUIRE_NATIVE=1 makes that an error. DEEPKERN_BUILD_CUDA=0 leaves the Hopper kernels out,
1 makes it an error if they cannot be built, auto (the default) builds them if nvcc is found.
DEEPKERN_SANITIZE=address or thread builds deepkern._C alone, without the Hopper kernels, for
`make sanitize`: with AddressSanitizer and UndefinedBehaviorSanitizer, or with ThreadSanitizer.
"""

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# -ffp-contract=off: results are bit-exact, so only explicit fused multiply-adds are allowed.
# -fno-trapping-math: with trapping math GCC does not vectorize a select between two sums, and no
# code reads the floating-point exception flags.
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-ffp-contract=off", "-fno-trapping-math"]
FLAGS += ["-fvisibility=hidden", "-g0", "-Wall", "-Wextra"]
# Vectors are arguments of inlined functions alone, so their ABI does not matter. The second warning
# is about intrinsics of GCC 12 whose undefined lanes are not used.
FLAGS += ["-Wno-psabi", "-Wno-maybe-uninitialized"]


SANITIZE = os.environ.get("DEEPKERN_SANITIZE")
# nonnull-attribute: memset and memcpy of no bytes of an empty tensor, at null, are harmless.
SANITIZERS = {
    "address": [
        "-fsanitize=address,undefined",
        "-fno-sanitize=nonnull-attribute",
        "-fno-sanitize-recover=undefined",
    ],
    "thread": ["-fsanitize=thread"],
}
if SANITIZE:
    FLAGS += [*SANITIZERS[SANITIZE], "-O1", "-g1", "-fno-omit-frame-pointer"]
    os.environ["DEEPKERN_BUILD_CUDA"] = "0"

NVCC_FLAGS = ["-gencode", "arch=compute_90a,code=sm_90a", "-O3", "-std=c++17", "--fmad=false"]
NVCC_FLAGS += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]


def sources(folder: str) -> list[str]:
    return sorted(str(p) for p in Path("csrc", folder).glob("*.cpp"))


def system_include(folder: str) -> list[str]:
    """Flags to include headers of a folder without their warnings or its path in the .so."""
    return ["-isystem", folder, f"-ffile-prefix-map={folder}/="]


def cuda_toolkit() -> Path | None:
    """The CUDA 13 toolkit of the nvcc on PATH, or None to leave the Hopper kernels out."""
    setting = os.environ.get("DEEPKERN_BUILD_CUDA", "auto")
    if setting not in ("0", "1", "auto"):
        sys.exit(f"deepkern: DEEPKERN_BUILD_CUDA: expected 0, 1 or auto, got {setting!r}")
    if setting == "0":
        return None
    nvcc = shutil.which("nvcc")
    root = None
    if nvcc:
        # nvcc may be a wrapper script, so ask it for its toolkit folder.
        output = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
        tops = [line.split("TOP=")[1] for line in output.splitlines() if line.startswith("#$ TOP=")]
        root = Path(tops[0]).resolve() if tops else None
    if root and any(root.glob("lib*/libcudart_static.a")) and "release 13" in version(nvcc):
        return root
    if setting == "1":
        sys.exit("deepkern: DEEPKERN_BUILD_CUDA=1: no nvcc of a CUDA 13 toolkit on PATH")
    return None


def version(nvcc: str) -> str:
    return subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout


def hash_of_sm90() -> str:
    """The version of csrc/sm90; runtime/verified.py compares it with the one verified on a GPU."""
    files = sorted(Path("csrc", "sm90").iterdir())
    return hashlib.sha256(b"\0".join(f.read_bytes() for f in files)).hexdigest()[:16]


class BuildExt(build_ext):
    """Compiles several files at once, and csrc/sm90 with nvcc for deepkern._C."""

    def build_extension(self, extension: Extension) -> None:
        compile_files = self.compiler.compile

        def compile_in_parallel(files, **options):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(lambda file: compile_files([file], **options), files))
            return sum(objects, [])

        self.compiler.compile = compile_in_parallel
        try:
            self.build_with_sm90(extension)
        finally:
            self.compiler.compile = compile_files

    def build_with_sm90(self, extension: Extension) -> None:
        toolkit = cuda_toolkit() if extension.name == "deepkern._C" else None
        if toolkit:
            folder = Path(self.build_temp, "sm90")
            folder.mkdir(parents=True, exist_ok=True)
            kernels = sorted(Path("csrc", "sm90").glob("*.cu"))
            targets = [str(folder / f"{source.stem}.o") for source in kernels]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                commands = (
                    ["nvcc", *NVCC_FLAGS, "-c", str(source), "-o", target]
                    for source, target in zip(kernels, targets, strict=True)
                )
                list(pool.map(self.spawn, commands))
            extension.extra_objects += targets
            extension.sources += sources("sm90")
            extension.define_macros.append(("DEEPKERN_SM90_SOURCES", f'"{hash_of_sm90()}"'))
            extension.library_dirs += [
                str(p.parent) for p in toolkit.glob("lib*/libcudart_static.a")
            ]
            extension.libraries += ["cudart_static", "rt", "pthread", "dl"]
        super().build_extension(extension)


def native_ops() -> Extension:
    import torch

    root = Path(torch.__file__).parent
    return Extension(
        "deepkern._C",
        ["csrc/ops.cpp", *sources("cpu")],
        depends=sorted(str(p) for p in Path("csrc").rglob("*.[hc]*")),
        include_dirs=["csrc"],
        # The stable ABI of torch 2.11, the oldest supported version.
        define_macros=[
            ("TORCH_TARGET_VERSION", "0x020b000000000000"),
            *([("DEEPKERN_OWN_THREADS", "1")] if SANITIZE == "thread" else []),
        ],
        extra_compile_args=[*FLAGS, *system_include(str(root / "include"))],
        # No rpath: the package imports torch first, which loads these libraries.
        extra_link_args=SANITIZERS.get(SANITIZE, []),
        library_dirs=[str(root / "lib")],
        libraries=["torch", "torch_cpu", "c10"],
        language="c++",
        py_limited_api=True,
    )


def host_planners() -> Extension:
    import pybind11

    return Extension(
        "deepkern._host",
        sources("host"),
        depends=sorted(str(p) for p in Path("csrc", "host").glob("*.h")),
        extra_compile_args=[*FLAGS, "-pthread", *system_include(pybind11.get_include())],
        extra_link_args=["-pthread"],
        language="c++",
    )


def ptx_machine() -> Extension:
    return Extension(
        "deepkern._ptx",
        sources("ptx"),
        depends=sorted(map(str, [*Path("csrc", "ptx").glob("*.h"), "csrc/python_module.h"])),
        extra_compile_args=[*FLAGS, "-pthread"],
        # The soname: Triton's launcher is linked with it (runtime/ptx_driver.py). -Bsymbolic: its
        # calls of CUDA functions are to its own, even if the process has NVIDIA's libcuda.
        extra_link_args=["-pthread", "-Wl,-soname,deepkern_ptx.so", "-Wl,-Bsymbolic"],
        language="c++",
        py_limited_api=True,
    )


def leave_out(reason: str, missing: str, remedy: str) -> None:
    """Reports a part that is not built: exits if DEEPKERN_REQUIRE_NATIVE=1, else prints."""
    message = f"deepkern: {reason}, so {missing}. To build it: {remedy}, then reinstall deepkern."
    if os.environ.get("DEEPKERN_REQUIRE_NATIVE") == "1":
        sys.exit(message)
    # pip runs this file three times, twice for metadata only.
    if not {"egg_info", "dist_info"} & set(sys.argv):
        print(message, file=sys.stderr)


def extensions() -> list[Extension]:
    cxx = os.environ.get("CXX")
    names = [cxx] if cxx else [sysconfig.get_config_var("CXX"), "g++", "c++", "clang++"]
    candidates = [c for c in names if c]
    compiler = next((c for c in candidates if shutil.which(shlex.split(c)[0])), None)
    if compiler is None:
        if os.environ.get("DEEPKERN_BUILD_CUDA") == "1":
            sys.exit("deepkern: DEEPKERN_BUILD_CUDA=1: no C++ compiler")
        leave_out(
            f"no C++ compiler ({', '.join(dict.fromkeys(candidates))} not found)",
            "deepkern._C, _host and _ptx are not built: the cpu backend, the host planners and "
            "deepkern.compiled are missing; triton and torch work",
            "apt-get install g++, or set CXX",
        )
        return []
    os.environ["CXX"] = compiler

    if SANITIZE:
        return [native_ops()]
    # Triton, whose kernels the machine executes, is for Linux.
    parts = [native_ops(), *([ptx_machine()] if sys.platform == "linux" else [])]
    headers = Path(sysconfig.get_path("include"), "Python.h")
    planners = "deepkern._host is not built: the host planners are missing"
    if not headers.exists():
        remedy = f"apt-get install python{sysconfig.get_python_version()}-dev"
        leave_out(f"no {headers}", planners, remedy)
        return parts
    if importlib.util.find_spec("pybind11") is None:
        leave_out("no pybind11", planners, "pip install pybind11")
        return parts
    return [*parts, host_planners()]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExt})
