"""A Triton driver that runs compiled kernels on the PTX machine, through Triton's own launcher.

Triton's CudaUtils and CudaLauncher run as they are shipped, with the C code of the installed
version. That code is compiled at run time, against this package's library in the place of
libcuda.so.1:

- it is linked with the library, by its soname, which is already loaded;
- where it opens "libcuda.so.1" it opens the library's file;
- it is loaded with RTLD_DEEPBIND, so that a libcuda of the process cannot take its place.

The C code is unchanged otherwise, and the built module has an entry of its own in Triton's cache.
The compilation ends with PTX: a hook makes the stage "cubin" pass it on, and its key keeps these
entries of the cache apart from real cubins. Works with Triton 3.6 to 3.9.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler.compiler import CompiledKernel
from triton.runtime import _allocation, build

from . import ptx_library
from .arch import Arch
from .ptx_library import KernelFailure

PIPELINE = "deepkern: PTX in the place of the cubin"
# The names that Triton's driver module fills from its C module.
_TYPES = ("PyCUtensorMap", "PyKernelArg", "ARG_CONSTEXPR", "ARG_KERNEL", "ARG_TUPLE")
_MISSING: Any = object()


@contextlib.contextmanager
def activated(target: Arch) -> Iterator[None]:
    """Launches inside compile for `target` and run on the machine."""
    config = triton.runtime.driver
    driver, hook = config._active, knobs.runtime.add_stages_inspection_hook
    config.set_active(driver_for(target))
    knobs.runtime.add_stages_inspection_hook = stages_hook(hook)
    try:
        yield
    finally:
        knobs.runtime.add_stages_inspection_hook = hook
        config.set_active(driver)


@functools.cache
def driver_for(target: Arch) -> PtxDriver:
    return PtxDriver(target)


def stages_hook(previous: Callable | None) -> Callable:
    """The hook for Triton's pipeline that passes PTX on as the binary, after a `previous` one."""

    def hook(backend=None, stages=None, options=None, language=None, capability=None):
        if backend is None:  # Triton requests a key and a hash for its caches
            key, digest = previous() if previous else ("", "")
            return key + PIPELINE, digest + PIPELINE
        if previous:
            previous(backend, stages, options, language, capability)
        stages["cubin"] = lambda ptx, metadata: ptx.encode()

    return hook


class PtxDriver(nvidia.CudaDriver):
    """The active Triton driver inside `deepkern.compiled`."""

    def __init__(self, target: Arch):  # not CudaDriver's, which loads libcuda
        _keep_unloading_apart()
        self.target = target
        self.launcher_cls = Launcher

    @functools.cached_property
    def utils(self) -> Utilities:
        return Utilities()

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(self.target.target), self.target.warp_size)

    def get_current_device(self) -> str:
        """The key of Triton's cache of compiled kernels; a GPU has a number."""
        return f"compiled {self.target.name}"

    def set_current_device(self, device) -> None:
        pass

    def get_device_capability(self, device=None) -> tuple[int, int]:
        return divmod(int(self.target.target), 10)

    def get_current_stream(self, device=None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self):
        return DeviceInterface

    @staticmethod
    def is_active() -> bool:
        return True

    def get_benchmarker(self) -> Callable:
        return equal_times

    def get_empty_cache_for_benchmark(self):
        raise NotImplementedError("deepkern.compiled: nothing is timed on this machine")


class DeviceInterface:
    """In the place of torch.cuda; kernels run to their end inside the launch."""

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def synchronize(device=None) -> None:
        pass

    @staticmethod
    def Event(*args, **kwargs):
        raise NotImplementedError("deepkern.compiled: nothing is timed on this machine")


def equal_times(kernel_call: Callable, quantiles=None, **kwargs):
    """In the place of do_bench: runs nothing, so that autotuning takes its first configuration."""
    return [0.0] * len(quantiles) if quantiles else 0.0


class Utilities(nvidia.CudaUtils):
    """Triton's C functions over the machine's libcuda."""

    def __new__(cls):
        return object.__new__(cls)  # CudaUtils has one instance, that of a real GPU

    def __init__(self):
        with in_place_of_libcuda():
            super().__init__()
            self.types = {n: getattr(nvidia, n) for n in _TYPES if hasattr(nvidia, n)}
        load, properties = self.load_binary, self.get_device_properties
        self.load_binary = lambda name, ptx, shared, device: reported(load, name, ptx, shared, 0)
        self.get_device_properties = lambda device: properties(0)
        occupancy = self.cuOccupancyMaxActiveClusters
        self.cuOccupancyMaxActiveClusters = functools.partial(reported, occupancy)


class Launcher(nvidia.CudaLauncher):
    """Triton's launcher of one kernel; the tensors of a launch are the memory that it may touch."""

    def __init__(self, src, metadata):
        self.names = [str(name) for name in src.signature]
        with in_place_of_libcuda(triton.runtime.driver.active.utils.types):
            super().__init__(src, metadata)

    def __call__(self, grid_x, grid_y, grid_z, stream, function, *args):
        arguments = dict(zip(self.names, args[4:], strict=True))
        launch = super().__call__
        with ptx_library.registered(arguments), checked_scratch():
            reported(launch, grid_x, grid_y, grid_z, stream, function, *args)


def reported(function: Callable, *args):
    """Calls a C function of Triton; what the machine or its libcuda refuses is a KernelFailure."""
    ptx_library.clear_message()
    try:
        return function(*args)
    except (RuntimeError, ValueError) as error:
        reason = ptx_library.message()
        if not reason:
            raise
        raise KernelFailure(reason) from error


class Scratch:
    """Memory from Triton's allocator, at an address with the requested alignment."""

    def __init__(self, buffer, size: int, alignment: int):
        self.buffer = buffer  # keeps the memory alive
        self.address = -(-buffer.data_ptr() // alignment) * alignment
        self.number = ptx_library.register(self.address, size, f"global scratch, {size} bytes")

    def data_ptr(self) -> int:
        return self.address


@contextlib.contextmanager
def checked_scratch() -> Iterator[None]:
    """Memory that the launch takes from Triton's allocator is memory that the kernel may touch.

    CUDA allocates with an alignment of 256 bytes, torch on a CPU with 64; device-side descriptors
    need 128.
    """
    allocate, taken = _allocation._allocator.get(), []

    def allocate_aligned(size: int, alignment: int, stream):
        scratch = Scratch(allocate(size + alignment, alignment, stream), size, alignment)
        taken.append(scratch)
        return scratch

    token = _allocation._allocator.set(allocate_aligned)
    try:
        yield
    finally:
        _allocation._allocator.reset(token)
        for scratch in taken:
            ptx_library.unregister(scratch.number)


# The build of Triton's C code.


@contextlib.contextmanager
def in_place_of_libcuda(types: dict[str, Any] | None = None) -> Iterator[None]:
    """What Triton's driver module compiles inside is built over this package's library."""
    library = Path(ptx_library.path())
    parts = {
        "libraries": [library.name],
        "library_dirs": lambda: [nvidia.libdevice_dir, str(library.parent)],
        "compile_module_from_src": compile_module,
        "compile_module_from_file": compile_module_from_file,
        **(types or dict.fromkeys(_TYPES)),
    }
    before = {name: getattr(nvidia, name, _MISSING) for name in parts}
    parts = {name: part for name, part in parts.items() if before[name] is not _MISSING}
    vars(nvidia).update(parts)
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_NOW | os.RTLD_DEEPBIND)
    try:
        yield
    finally:
        sys.setdlopenflags(flags)
        vars(nvidia).update({name: before[name] for name in parts})


def compile_module(src: str, name: str, **options):
    """Triton's compile_module_from_src, of C code that opens this package's library."""
    opened = '"libcuda.so.1"'
    if opened not in src:
        raise RuntimeError(f"deepkern.compiled: the C code of Triton {triton.__version__} does not "
                           f"open {opened}: this version is not supported")  # fmt: skip
    src = src.replace(opened, json.dumps(ptx_library.path()))
    try:
        return build.compile_module_from_src(src=src, name=name, **options)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(
            "deepkern.compiled: Triton's launcher does not compile (see above); it needs a C "
            "compiler and Python's headers (python3-dev)"
        ) from error


def compile_module_from_file(src_path: str, name: str, **options):
    """Triton's function of this name (3.8 and newer), as `compile_module`."""
    return compile_module(Path(src_path).read_text(), name, **options)


@functools.cache
def _keep_unloading_apart() -> None:
    """Triton 3.8 and newer unload a kernel by the driver active then, which may be another one."""
    unload = getattr(CompiledKernel, "__del__", None)
    if unload is None:
        return

    def unload_by_own_driver(self):
        if isinstance(getattr(self, "_run", None), Launcher):
            if self.module is not None:
                ptx_library.library().deepkern_ptx_unload(self.module)
                self.module = None
            return
        unload(self)

    CompiledKernel.__del__ = unload_by_own_driver
