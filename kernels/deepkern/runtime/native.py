"""The compiled parts of the package, which may be absent: deepkern._C, _host and _ptx.

A missing module is not an error at import. The reason is raised, or reported, at first use.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from types import ModuleType

import torch

NEEDS = {
    "_C": "g++",
    "_host": "g++, pybind11 and Python's headers (python3-dev)",
    "_ptx": "g++",
}


@functools.cache
def load(name: str) -> tuple[ModuleType | None, str | None]:
    """The extension module, or None and the reason."""
    try:
        return importlib.import_module(f"deepkern.{name}"), None
    except ModuleNotFoundError:
        return None, f"deepkern.{name} was not built: install {NEEDS[name]}, then deepkern again"
    except ImportError as error:  # built for another torch, a missing library, ...
        return None, f"deepkern.{name} does not load with torch {torch.__version__}: {error}"


def missing_reason() -> str | None:
    """Why there are no native ops at all, or None if there are."""
    return load("_C")[1]


@functools.cache
def native_op(name: str, device: str = "cpu"):
    """The native overload of op `name` if it serves `device` ("cpu" or "cuda"), or None."""
    if load("_C")[0] is None or not hasattr(torch.ops.deepkern_native, name):
        return None
    key = {"cpu": "CPU", "cuda": "CUDA"}[device]
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"deepkern_native::{name}", key):
        return None
    return getattr(torch.ops.deepkern_native, name).default


def poison(enable: bool) -> None:
    """Whether the native CPU ops fill new tensors with NaN, for tests."""
    module, _ = load("_C")
    if module is not None:
        ctypes.CDLL(module.__file__).deepkern_poison_new_tensors(int(enable))


def host() -> ModuleType:
    """deepkern._host; ImportError with the reason if it is absent."""
    module, reason = load("_host")
    if module is None:
        raise ImportError(reason)
    return module
