"""Builds the package's C++ parts; everything else stands in pyproject.toml.

deepkern._C (native ops on torch's stable ABI) and deepkern._host (pybind11) are built when there is
a C++ compiler. Without one the package is built without them and says so, here and at run time:
its other backends work. DEEPKERN_REQUIRE_NATIVE=1 makes a missing compiler an error.
"""

import os
import shlex
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup

WARN = ["-Wall", "-Wextra", "-Wno-missing-field-initializers"]
# -ffp-contract=off: a fused multiply-add would change bits that are promised to be the same.
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", *WARN]


def sources(folder: str) -> list[str]:
    return sorted(str(p) for p in Path("csrc", folder).glob("*.cpp"))


def stable_abi_extension() -> Extension:
    import torch

    root = Path(torch.__file__).parent
    return Extension(
        "deepkern._C",
        ["csrc/ops.cpp", *sources("cpu")],
        depends=[str(p) for p in Path("csrc").rglob("*.h")],
        include_dirs=["csrc"],
        # torch 2.11's stable ABI: the oldest that the package supports.
        define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000")],
        extra_compile_args=[*FLAGS, "-isystem", str(root / "include")],
        library_dirs=[str(root / "lib")],
        libraries=["torch", "torch_cpu", "c10"],
        language="c++",
        py_limited_api=True,
    )


def host_extension() -> Extension:
    import pybind11

    include = ["-isystem", pybind11.get_include()]
    return Extension(
        "deepkern._host",
        sources("host"),
        extra_compile_args=[*FLAGS, *include],
        language="c++",
    )


def extensions() -> list[Extension]:
    compiler = shlex.split(os.environ.get("CXX") or "g++")[0]
    if shutil.which(compiler):
        return [stable_abi_extension(), host_extension()]
    message = (
        f"deepkern: no C++ compiler ({compiler} is not on PATH), so deepkern._C and deepkern._host "
        "are not built. The cpu backend and the host planners will be absent; triton and torch "
        "work. To have them: apt-get install g++, or set CXX, and install again."
    )
    if os.environ.get("DEEPKERN_REQUIRE_NATIVE") == "1":
        sys.exit(message)
    print(message, file=sys.stderr)
    return []


setup(ext_modules=extensions())
