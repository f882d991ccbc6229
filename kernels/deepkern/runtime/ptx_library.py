"""deepkern._ptx through ctypes: the machine that executes PTX, and the CUDA driver API over it.

The library exports the functions of libcuda that Triton's launcher calls (csrc/ptx/libcuda.cpp) and
the functions below. Failures raise `KernelFailure` with the library's message.

`PtxModule` runs kernels of PTX text without Triton:

    with deepkern.compiled("sm_90", seed=1):
        PtxModule(text).run_kernel("scale", x, ctypes.c_int32(64), grid=(4,), block=(32,))
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from . import native

if TYPE_CHECKING:
    from .compiled import Settings

ORDERS = ("random", "earliest", "latest")  # by the value of Options::Order


class KernelFailure(RuntimeError):
    """A kernel did what a GPU forbids or leaves undefined, or CUDA's driver refuses the call."""


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library; ImportError with the reason if it was not built."""
    module, reason = native.load("_ptx")
    if module is None or module.__file__ is None:
        raise ImportError(reason)
    functions = ctypes.CDLL(module.__file__)
    u32, u64, i32, pointer = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int, ctypes.c_void_p
    signatures = {
        "message": (ctypes.c_char_p, []),
        "clear_message": (None, []),
        "set_target": (i32, [i32]),
        "set_options": (i32, [u64, i32, i32, i32, i32, i32, u64]),
        "register": (u64, [u64, u64, ctypes.c_char_p]),
        "unregister": (i32, [u64]),
        "load": (pointer, [ctypes.c_char_p]),
        "unload": (i32, [pointer]),
        "profile": (None, [u32]),
        "take_profile": (ctypes.c_char_p, []),
        "launch": (i32, [pointer, ctypes.c_char_p, pointer, u32, i32, pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(functions, f"deepkern_ptx_{name}")
        function.restype, function.argtypes = result, arguments
    return functions


def path() -> str:
    """The library's file."""
    return library()._name


def message() -> str:
    """Why this thread's last call was refused or failed; empty if none was since the last clear."""
    return library().deepkern_ptx_message().decode(errors="replace")


def clear_message() -> None:
    library().deepkern_ptx_clear_message()


def check(code: int | None) -> None:
    """Raises KernelFailure if a function returned an error."""
    if code:
        raise KernelFailure(message())


def apply(settings: Settings) -> None:
    """Makes the device and the options those of `settings`."""
    check(library().deepkern_ptx_set_target(int(settings.target.removeprefix("sm_"))))
    check(
        library().deepkern_ptx_set_options(
            settings.seed,
            ORDERS.index(settings.order),
            settings.check_races,
            settings.check_initialized,
            settings.hardware_sums,
            settings.resident_blocks,
            settings.max_instructions,
        )
    )


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The address of the first element and the bytes up to the end of the last one."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), 0
    span = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.data_ptr(), span * tensor.element_size()


def tensors(name: str, argument: object) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors inside a kernel argument, as (name for messages, tensor)."""
    if isinstance(argument, (tuple, list)):
        fields = getattr(argument, "_fields", None)
        for i, item in enumerate(argument):
            yield from tensors(f"{name}.{fields[i]}" if fields else f"{name}[{i}]", item)
    elif isinstance(argument, torch.Tensor):
        yield name, argument
    elif isinstance(getattr(argument, "base", None), torch.Tensor):
        yield name, argument.base  # a host TensorDescriptor, or triton.reinterpret's wrapper


@contextlib.contextmanager
def registered(arguments: dict[str, object]) -> Iterator[None]:
    """Kernels may touch the tensors inside these arguments; their names appear in messages."""
    ids: list[int] = []
    try:
        for argument, value in arguments.items():
            for name, tensor in tensors(argument, value):
                if tensor.device.type != "cpu":
                    raise TypeError(
                        f"{name}: expected a CPU tensor inside deepkern.compiled, got one on "
                        f"{tensor.device}"
                    )
                address, size = extent(tensor)
                dtype = str(tensor.dtype).removeprefix("torch.")
                ids.append(register(address, size, f"{name} {dtype} {list(tensor.shape)}"))
        yield
    finally:
        for number in ids:
            unregister(number)


def register(address: int, size: int, name: str) -> int:
    """Kernels may touch `size` bytes at `address` until `unregister` of the returned number."""
    return library().deepkern_ptx_register(address, size, name.encode())


def unregister(number: int) -> None:
    check(library().deepkern_ptx_unregister(number))


def encode_tensor_map(
    address: int,
    data_type: int,
    shape: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    element_strides: Sequence[int] | None = None,
    interleave: int = 0,
    swizzle: int = 0,
    promotion: int = 0,
    fill: int = 0,
) -> bytes:
    """A CUtensorMap by cuTensorMapEncodeTiled; dimension 0 is the innermost, strides in bytes."""
    rank = len(shape)
    u64s, u32s = ctypes.c_uint64 * max(rank, 1), ctypes.c_uint32 * max(rank, 1)
    buffer = aligned_buffer(bytes(128), 128)
    encode = library().cuTensorMapEncodeTiled
    check(
        encode(
            ctypes.c_void_p(ctypes.addressof(buffer)),
            data_type,
            rank,
            ctypes.c_void_p(address),
            u64s(*shape),
            u64s(*strides),
            u32s(*box),
            u32s(*(element_strides or [1] * rank)),
            interleave,
            swizzle,
            promotion,
            fill,
        )
    )
    return buffer.raw


def aligned_buffer(content: bytes, alignment: int) -> ctypes.Array:
    """A ctypes buffer with this content whose address is a multiple of `alignment`."""
    memory = ctypes.create_string_buffer(len(content) + alignment)
    offset = -ctypes.addressof(memory) % alignment
    view = (ctypes.c_char * len(content)).from_buffer(memory, offset)
    view.raw = content
    return view


class PtxModule:
    """The kernels of a PTX text, loaded for the target of the surrounding `deepkern.compiled`."""

    def __init__(self, text: str):
        self.handle = None
        clear_message()
        self.handle = library().deepkern_ptx_load(text.encode())
        if not self.handle:
            raise KernelFailure(message())

    def run_kernel(
        self,
        kernel: str,
        *arguments: object,
        grid: Sequence[int] = (1,),
        block: Sequence[int] = (32,),
        cluster: Sequence[int] = (1,),
        shared: int = 0,
        programmatic: bool = False,
    ) -> None:
        """Runs one kernel. Arguments: tensors, ctypes scalars, bytes (a struct or tensor map)."""
        values = [_parameter(a) for a in arguments]
        pointers = (ctypes.c_void_p * max(len(values), 1))(*map(ctypes.addressof, values))
        sizes = [n for size in (grid, block, cluster) for n in (*size, 1, 1)[:3]]
        clear_message()
        with registered({f"argument {i}": a for i, a in enumerate(arguments)}):
            check(
                library().deepkern_ptx_launch(
                    self.handle, kernel.encode(), (ctypes.c_uint32 * 9)(*sizes), shared,
                    programmatic, pointers,
                )
            )  # fmt: skip

    def __del__(self):
        if self.handle:
            library().deepkern_ptx_unload(self.handle)


def _parameter(argument: object):
    """The ctypes object that holds one kernel parameter."""
    if isinstance(argument, torch.Tensor):
        return ctypes.c_uint64(argument.data_ptr())
    if isinstance(argument, bytes):
        return aligned_buffer(argument, 128)
    if isinstance(argument, ctypes._SimpleCData):
        return argument
    raise TypeError(f"expected a tensor, a ctypes scalar or bytes, got {type(argument).__name__}")
