"""Compiles an op's Triton kernels for any GPU target, without a GPU.

The op's own launcher runs on CPU tensors that are allocated and not written, under a stub driver
that compiles for `target` and launches nothing. So we inspect exactly the kernels that a call
compiles, and no signature or tile is written twice.

    python -m bench.compiling        reads "op target" lines from stdin, writes a JSON line for each

It is a separate process because Triton must be imported without TRITON_INTERPRET, and because a
crash of a compiler must not end the run (see bench/inspect.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Iterator
from types import SimpleNamespace

import torch
import triton
from torch.utils._pytree import tree_map
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

import deepkern
from deepkern.runtime import arch
from deepkern.runtime.arch import Arch
from deepkern.testing.ops import facts

from . import assembly, triton_launcher


class StubDriver(DriverBase):
    """A Triton driver without a GPU: kernels compile for `target` and do not run."""

    def __init__(self, target: Arch):
        self.target = target
        self.utils = SimpleNamespace(
            # Triton compares a kernel's shared memory with this and raises OutOfResources.
            get_device_properties=lambda _: {"max_shared_mem": target.smem},
            load_binary=lambda *_: ("loaded", None, 0, 0, 1024),
            unload_module=lambda *_: None,
            **triton_launcher.utilities(),
        )

    def launcher_cls(self, source, metadata):
        """Triton's real launcher where there is one for NVIDIA; it checks and runs nothing."""
        if self.target.backend == "cuda":
            return triton_launcher.build(source, metadata)
        return lambda *args: None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget(self.target.backend, self.target.target, self.target.warp_size)

    def get_current_device(self) -> str:
        return self.target.name  # Triton caches compiled kernels by device: here by target

    def get_current_stream(self, device) -> int:
        return 0

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self):
        raise NotImplementedError("nothing is timed during inspection")


@contextlib.contextmanager
def stub_driver(target: Arch) -> Iterator[None]:
    """Launches inside compile for `target` and run nothing; each kernel compiles once."""
    triton.runtime.driver.set_active(StubDriver(target))
    with arch.compile_for(target):
        yield


@contextlib.contextmanager
def compiling(target: Arch) -> Iterator[list]:
    """Launches inside compile for `target`; yields the list of their CompiledKernels."""
    compiled = []
    launch = JITFunction.run

    def run(self, *args, **kwargs):
        kernel = launch(self, *args, **kwargs)
        compiled.append(kernel)
        return kernel

    JITFunction.run = run
    try:
        with stub_driver(target):
            yield compiled
    finally:
        JITFunction.run = launch


def unwritten_arguments(op_name: str, size: dict) -> tuple:
    """All arguments of the op at one size; the tensors have the right shapes and any content."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def real(x):
        if not isinstance(x, torch.Tensor):
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)

    try:
        with FakeTensorMode():
            args = facts(op_name).inputs(torch.Generator().manual_seed(0), **size)
        args = tree_map(real, args)
    except Exception:  # `inputs` reads values, which fake tensors do not have
        args = facts(op_name).inputs(torch.Generator().manual_seed(0), **size)
    return deepkern.OPS[op_name].positional(args)


def config(kernel) -> str:
    """The compile-time arguments of a kernel as text: tile sizes, flags, warps, stages."""
    source, metadata = kernel.src, kernel.metadata
    parameters = source.fn.params
    constants = {
        parameters[path[0]].name: getattr(value, "value", value)
        for path, value in source.constants.items()
        if len(path) == 1 and parameters[path[0]].is_constexpr and value is not None
    }
    words = [name if value is True else f"{name}={value}" for name, value in constants.items()
             if value is not False]  # fmt: skip
    default = {"cuda": 3, "hip": 2}[metadata.target.backend]
    stages = f" stages={metadata.num_stages}" if metadata.num_stages != default else ""
    return " ".join([*words, f"warps={metadata.num_warps}"]) + stages


def inspect(op_name: str, target_name: str) -> list[dict]:
    """One record per kernel and tile config that `op_name` launches at its inspect sizes."""
    target = arch.ARCHS[target_name]
    launcher = deepkern.OPS[op_name].launcher("triton")
    records: dict[str, dict] = {}
    for index, size in enumerate(facts(op_name).SIZES.inspect):
        label = {"op": op_name, "target": target_name, "size": index}
        compiled = []
        try:
            args = unwritten_arguments(op_name, size)
            with compiling(target) as compiled:
                launcher(*args)
        except Exception as error:
            records[f"error {index}"] = {**label, "kernel": "?", "config": str(size),
                                         "error": reason(error)}  # fmt: skip
        for kernel in compiled:
            if kernel.hash not in records:
                name = kernel.src.fn.__name__
                read = assembly.read(kernel, target)
                records[kernel.hash] = {**label, "kernel": name, "config": config(kernel), **read}
    return list(records.values())


def reason(error: BaseException) -> str:
    """The first error of a chain of compiler errors, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join("".join(traceback.format_exception_only(error)).split())
    return text if len(text) < 400 else f"{text[:120]} ... {text[-280:]}"


def serve() -> None:
    """Writes, for each "op target" line of stdin, one line with the JSON list of its records."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of the compilers on stdout must not mix with the answers
    for line in sys.stdin:
        answers.write(json.dumps(inspect(*line.split())) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
