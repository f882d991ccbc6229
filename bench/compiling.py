"""Compiles an op's Triton kernels for any GPU target, with no GPU.

The op's own launcher runs, on CPU tensors that are allocated and never written, under a stub driver
that compiles as for `target` and launches nothing. So what is inspected is exactly what a call
would compile: no signature or tile is written down twice.

    python -m bench.compiling        serves "op target" lines from stdin, a JSON line for each

serves from a process of its own, because Triton must have been imported without TRITON_INTERPRET
and because a crash of a compiler must not end the run (see `bench/inspect.py`).
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
from deepkern.testing import inputs

from . import assembly, triton_launcher


class StubDriver(DriverBase):
    """A Triton driver for a GPU that is not there: kernels compile for it and are not run."""

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
        return self.target.name  # Triton keeps compiled kernels by device: so by target

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
    """Launches inside compile for `target`, once each, and run nothing."""
    triton.runtime.driver.set_active(StubDriver(target))
    with arch.compile_for(target):
        yield


@contextlib.contextmanager
def compiling(target: Arch) -> Iterator[list]:
    """Launches inside compile for `target`; yields the list of CompiledKernel they come to."""
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
    """All of the op's arguments at one size: tensors of the right shapes, whatever they hold."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def real(x):
        if not isinstance(x, torch.Tensor):
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)

    try:
        with FakeTensorMode():
            made = inputs.make(op_name, torch.Generator().manual_seed(0), **size)
        made = tree_map(real, made)
    except Exception:  # the maker reads values: then they have to be made
        made = inputs.make(op_name, torch.Generator().manual_seed(0), **size)
    return deepkern.OPS[op_name].positional(made)


def config(kernel) -> str:
    """The compile-time choices of a compiled kernel, as text: tile sizes, flags, warps, stages."""
    source, metadata = kernel.src, kernel.metadata
    parameters = source.fn.params
    chosen = {
        parameters[path[0]].name: getattr(value, "value", value)
        for path, value in source.constants.items()
        if len(path) == 1 and parameters[path[0]].is_constexpr and value is not None
    }
    words = [name if value is True else f"{name}={value}" for name, value in chosen.items()
             if value is not False]  # fmt: skip
    default = {"cuda": 3, "hip": 2}[metadata.target.backend]
    stages = f" stages={metadata.num_stages}" if metadata.num_stages != default else ""
    return " ".join([*words, f"warps={metadata.num_warps}"]) + stages


def inspect(op_name: str, target_name: str) -> list[dict]:
    """One record per kernel and tile config that `op_name` launches at its `inspect` sizes."""
    target = arch.ARCHS[target_name]
    launch = deepkern.OPS[op_name].launcher("triton")
    records: dict[str, dict] = {}
    for index, size in enumerate(inputs.sizes(op_name).inspect):
        where = {"op": op_name, "target": target_name, "size": index}
        compiled = []
        try:
            args = unwritten_arguments(op_name, size)
            with compiling(target) as compiled:
                launch(*args)
        except Exception as error:
            records[f"error {index}"] = {**where, "kernel": "?", "config": str(size),
                                         "error": reason(error)}  # fmt: skip
        for kernel in compiled:
            if kernel.hash not in records:
                name = kernel.src.fn.__name__
                read = assembly.read(kernel, target)
                records[kernel.hash] = {**where, "kernel": name, "config": config(kernel), **read}
    return list(records.values())


def reason(error: BaseException) -> str:
    """The error that a chain of compiler errors began with, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join("".join(traceback.format_exception_only(error)).split())
    return text if len(text) < 400 else f"{text[:120]} ... {text[-280:]}"


def serve() -> None:
    """Answers each "op target" line of stdin with one line: the JSON list of its records."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what compilers print on stdout must not mix with the answers
    for line in sys.stdin:
        answers.write(json.dumps(inspect(*line.split())) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
