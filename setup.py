"""Builds the package's C++ parts; everything else stands in pyproject.toml.

deepkern._C (native ops on torch's stable ABI) needs a C++ compiler, and for its Hopper kernels nvcc
13; deepkern._host (pybind11) needs Python's headers too. What cannot be built is left out, and the
package says so, here and at run time: its other backends work. DEEPKERN_REQUIRE_NATIVE=1 makes it
an error. DEEPKERN_BUILD_CUDA=0 leaves the Hopper kernels out, =1 makes it an error if they cannot
be built; auto, the default, builds them where there is an nvcc.
"""

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Bits are promised: no fused multiply-add but those the code asks for. Nobody reads floating-point
# exception flags, and as long as they count GCC does not vectorise a choice between two sums.
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-ffp-contract=off", "-fno-trapping-math"]
FLAGS += ["-fvisibility=hidden", "-g0", "-Wall", "-Wextra"]


NVCC_FLAGS = ["-gencode", "arch=compute_90a,code=sm_90a", "-O3", "-std=c++17", "--fmad=false"]
NVCC_FLAGS += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]


def sources(folder: str) -> list[str]:
    return sorted(str(p) for p in Path("csrc", folder).glob("*.cpp"))


def foreign_headers(folder: str) -> list[str]:
    """Flags to include from a folder of this machine, whose warnings and name stay out of here."""
    return ["-isystem", folder, f"-ffile-prefix-map={folder}/="]


def cuda_toolkit() -> Path | None:
    """The CUDA toolkit whose nvcc is on PATH, if the Hopper kernels are to be built."""
    wanted = os.environ.get("DEEPKERN_BUILD_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        sys.exit(f"deepkern: DEEPKERN_BUILD_CUDA: expected 0, 1 or auto, got {wanted!r}")
    if wanted == "0":
        return None
    nvcc = shutil.which("nvcc")
    root = None
    if nvcc:
        # nvcc may be a script that calls the real one elsewhere; only that one knows where.
        said = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
        tops = [line.split("TOP=")[1] for line in said.splitlines() if line.startswith("#$ TOP=")]
        root = Path(tops[0]).resolve() if tops else None
    if root and any(root.glob("lib*/libcudart_static.a")) and "release 13" in version(nvcc):
        return root
    if wanted == "1":
        sys.exit("deepkern: DEEPKERN_BUILD_CUDA=1, but no CUDA 13 toolkit has its nvcc on PATH")
    return None


def version(nvcc: str) -> str:
    return subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout


def hash_of_sm90() -> str:
    """By which runtime/evidence.py knows whether it was these kernels that a GPU has proven."""
    files = sorted(Path("csrc", "sm90").iterdir())
    return hashlib.sha256(b"\0".join(f.read_bytes() for f in files)).hexdigest()[:16]


class BuildExt(build_ext):
    """Compiles csrc/sm90 with nvcc and links it into deepkern._C."""

    def build_extension(self, extension: Extension) -> None:
        toolkit = cuda_toolkit() if extension.name == "deepkern._C" else None
        if toolkit:
            folder = Path(self.build_temp, "sm90")
            folder.mkdir(parents=True, exist_ok=True)
            for source in sorted(Path("csrc", "sm90").glob("*.cu")):
                done = folder / f"{source.stem}.o"
                self.spawn(["nvcc", *NVCC_FLAGS, "-c", str(source), "-o", str(done)])
                extension.extra_objects.append(str(done))
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
        # torch 2.11's stable ABI: the oldest that the package supports.
        define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000")],
        extra_compile_args=[*FLAGS, *foreign_headers(str(root / "include"))],
        # No rpath: the package imports torch before this, and with it these libraries.
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
        extra_compile_args=[*FLAGS, "-pthread", *foreign_headers(pybind11.get_include())],
        extra_link_args=["-pthread"],
        language="c++",
    )


def leave_out(what: str, lost: str, remedy: str) -> None:
    message = f"deepkern: {what}, so {lost}. To have that: {remedy}, then install deepkern again."
    if os.environ.get("DEEPKERN_REQUIRE_NATIVE") == "1":
        sys.exit(message)
    # pip runs this file three times; twice only for what the package is called and needs.
    if not {"egg_info", "dist_info"} & set(sys.argv):
        print(message, file=sys.stderr)


def extensions() -> list[Extension]:
    named = os.environ.get("CXX")
    known = [named] if named else [sysconfig.get_config_var("CXX"), "g++", "c++", "clang++"]
    tried = [c for c in known if c]
    compiler = next((c for c in tried if shutil.which(shlex.split(c)[0])), None)
    if compiler is None:
        leave_out(
            f"no C++ compiler ({', '.join(dict.fromkeys(tried))} not found)",
            "deepkern._C and deepkern._host are not built: the cpu backend and the host planners "
            "will be absent; triton and torch work",
            "apt-get install g++, or set CXX",
        )
        return []
    os.environ["CXX"] = compiler

    headers = Path(sysconfig.get_path("include"), "Python.h")
    planners = "deepkern._host is not built: the host planners will be absent"
    if not headers.exists():
        remedy = f"apt-get install python{sysconfig.get_python_version()}-dev"
        leave_out(f"no {headers}", planners, remedy)
        return [native_ops()]
    if importlib.util.find_spec("pybind11") is None:
        leave_out("no pybind11", planners, "pip install pybind11")
        return [native_ops()]
    return [native_ops(), host_planners()]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExt})
