"""Triton's own NVIDIA launcher, built and called on a machine without a GPU.

A compiled kernel reaches the GPU through `CudaLauncher`: it expands the kernel signature, encodes
tensor descriptors as CUDA tensor maps, flattens tuples and passes the arguments to a C function.
All of its Python code runs here as Triton ships it. Only the C functions, which need libcuda, are
replaced. The replacements check what CUDA's driver checks:

- every argument of the compiled kernel arrives, in its place and with its type;
- a tensor map has the alignment, strides and box that cuTensorMapEncodeTiled requires.

Supports Triton 3.6 (C launcher per kernel) and 3.7 or newer (one C launcher for all kernels).
Source of the tensor map rules: CUDA driver API, cuTensorMapEncodeTiled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import NamedTuple

from triton.backends.nvidia import driver


class KernelArg(NamedTuple):
    """In place of the C type that annotates one argument of a kernel."""

    nested_tuple: list | None
    type: str


class TensorMap(NamedTuple):
    """In place of CUtensorMap."""

    address: int
    shape: tuple[int, ...]


def check_launch(*args) -> None:
    """In place of the C launch function: checks the arguments, runs nothing."""
    if len(args) < 3 or not isinstance(args[-2], Signature):
        return  # Triton 3.6: the generated C code checks the arguments
    annotations, signature, values = args[-3:]
    flat = list(_flatten(annotations, values))
    if len(flat) != len(signature.types):
        raise TypeError(f"launch: expected {len(signature.types)} arguments, got {len(flat)}")
    for i, (kind, value) in enumerate(zip(signature.types, flat, strict=True)):
        if not _accepts(kind, value):
            raise TypeError(f"launch: argument {i}: expected {kind}, got {type(value).__name__}")


class Signature(NamedTuple):
    """The types of a kernel's arguments, tuples flattened and constants left out."""

    types: list[str]


def _flatten(annotations, values) -> Iterator[object]:
    for annotation, value in zip(annotations, values, strict=True):
        if annotation.type == "tuple":
            yield from _flatten(annotation.nested_tuple, value)
        elif annotation.type == "kernel":
            yield value


def _accepts(kind: str, value: object) -> bool:
    if kind.startswith("*"):
        return value is None or hasattr(value, "data_ptr") or isinstance(value, int)
    if kind == "nvTmaDesc":
        return isinstance(value, TensorMap)
    if kind.startswith(("i", "u")):
        return isinstance(value, int)
    return isinstance(value, (int, float))


def fill_tensor_map(
    address: int, swizzle: int, elem_size: int, elem_type: int, box, shape, strides, padding
) -> TensorMap:
    """In place of cuTensorMapEncodeTiled: raises ValueError for what the CUDA driver refuses.

    `shape` and `strides` are in elements; the last dimension is contiguous.
    """
    pitches = [stride * elem_size for stride in strides[:-1]]  # bytes
    rules = {
        "address: multiple of 16": address % 16 == 0,
        "shape: 1 to 2^32": all(1 <= size <= 2**32 for size in shape),
        "strides: multiples of 16 bytes": all(p % 16 == 0 for p in pitches),
        "strides: less than 2^40 bytes": all(p < 2**40 for p in pitches),
        "strides: rows must not overlap": all(
            p >= size * elem_size for p, size in zip(pitches, shape[1:], strict=True)
        ),
        "box: 1 to 256": all(1 <= size <= 256 for size in box),
        "box: rows of a multiple of 16 bytes": box[-1] * elem_size % 16 == 0,
        "swizzle: 0 to 3": 0 <= swizzle <= 3,
    }
    for rule, holds in rules.items():
        if not holds:
            raise ValueError(f"tensor map: expected {rule}, got shape {tuple(shape)}, strides "
                             f"{tuple(strides)}, box {tuple(box)}, address {address}")  # fmt: skip
    return TensorMap(address, tuple(shape))


def utilities() -> dict[str, Callable]:
    """The functions of the driver module that the launcher calls, by name."""
    return {
        "launch": check_launch,
        "build_signature_metadata": Signature,
        "fill_tma_descriptor": fill_tensor_map,
        "fill_tma_descriptor_tiled": fill_tensor_map,
    }


def build(source, metadata) -> Callable:
    """The launcher of a compiled kernel, as Triton's NVIDIA driver builds it.

    The active Triton driver must have the functions of `utilities` in its `utils`.
    """
    with _c_parts_replaced():
        return driver.CudaLauncher(source, metadata)


@contextlib.contextmanager
def _c_parts_replaced() -> Iterator[None]:
    """Replaces the names that Triton's driver module fills from C code."""
    parts = {
        "PyKernelArg": KernelArg,
        "ARG_CONSTEXPR": "constexpr",
        "ARG_KERNEL": "kernel",
        "ARG_TUPLE": "tuple",
        "PyCUtensorMap": TensorMap,
        "library_dirs": lambda: [],
        "compile_module_from_src": lambda **_: SimpleNamespace(launch=check_launch),
    }
    missing = object()
    before = {name: getattr(driver, name, missing) for name in parts}
    vars(driver).update(parts)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is missing:
                delattr(driver, name)
            else:
                setattr(driver, name, value)
