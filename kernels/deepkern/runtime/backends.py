"""Which backend serves an op: `cuda`, `triton`, `cpu` or `torch` (the reference).

`auto`, the default, uses the fastest backend that supports the call. `DEEPKERN_BACKEND=triton` or
`with deepkern.backend("triton"):` forces one; a call that it does not support is then an error.
The choice is process-wide, like the switches of torch.backends, because torch runs backward passes
on other threads.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from . import arch, compiled, native, verified

BACKENDS = ("cuda", "triton", "cpu", "torch")
# Fastest first. auto never uses Triton on CPU tensors: the interpreter is for tests.
_AUTO = {"cuda": ("cuda", "triton", "torch"), "cpu": ("cpu", "torch")}
_forced: list[str] = []
# The dict under os.environ, where CPython has one: a variable that is not set costs 0.04 µs there
# and 1 µs in os.environ, which raises KeyError inside. A call of a native op looks at two.
_ENVIRONMENT = getattr(os.environ, "_data", os.environ)
_BACKEND, _DEBUG = (
    os.environ.encodekey(name) if _ENVIRONMENT is not os.environ else name
    for name in ("DEEPKERN_BACKEND", "DEEPKERN_DEBUG")
)


class BackendError(RuntimeError):
    """The forced backend does not support the call."""


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces a backend (`cuda`, `triton`, `cpu`, `torch`) or `auto` inside the `with` block."""
    _forced.append(_known(name))
    try:
        yield
    finally:
        _forced.pop()


def _known(name: str) -> str:
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"backend: expected one of {(*BACKENDS, 'auto')}, got {name!r}")
    return name


def requested() -> str:
    """The innermost `with backend(...)`, else DEEPKERN_BACKEND, else auto."""
    return _forced[-1] if _forced else _known(os.environ.get("DEEPKERN_BACKEND") or "auto")


def auto_or_cpu() -> bool:
    """Whether calls on CPU tensors may go to the native ops directly: no other backend is forced,
    and DEEPKERN_DEBUG, which checks contents in Python, is not set."""
    if _DEBUG in _ENVIRONMENT:
        return False
    if _forced:
        return _forced[-1] in ("auto", "cpu")
    return _BACKEND not in _ENVIRONMENT or requested() in ("auto", "cpu")


def choose(op, device: torch.device, args: tuple | None = None) -> str:
    """The backend for a call of `op` on `device`.

    `args`: all arguments of the call, by position, unchecked. Raises BackendError if the forced
    backend does not support the call.
    """
    name = requested()
    if name == "auto":
        candidates = _AUTO.get(device.type, ("torch",))
        return next(
            c
            for c in candidates
            if unsupported_reason(op, c, device, args) is None and is_verified(op, c)
        )
    reason = unsupported_reason(op, name, device, args)
    if reason is not None:
        raise BackendError(
            f"{op.name}: the forced backend {name!r} does not support this: {reason}"
        )
    return name


def is_verified(op, name: str) -> bool:
    """Whether auto may use backend `name`: Hopper kernels must have passed their GPU tests."""
    return name != "cuda" or verified.unverified_reason(op.name) is None


def unsupported_reason(
    op, name: str, device: torch.device, args: tuple | None = None
) -> str | None:
    """Why `name` does not support `op` on `device` (with `args`, if given); None if it does."""
    reason = unsupported_on_device(op, name, device)
    if reason is None and args is not None and name in op.limits:
        return op.limits[name](*args)
    return reason


def unsupported_on_device(op, name: str, device: torch.device) -> str | None:
    """Why `name` does not support `op` on `device` for any arguments; None if it does."""
    if name == "torch":
        return None
    if name == "triton":
        if "triton" not in op.launchers:
            return "it has no Triton kernel"
        if device.type == "cuda":
            return arch.unknown_gpu_reason(device)
        if device.type == "cpu":
            return _unsupported_on_cpu()
        return f"Triton does not support {device.type} tensors"
    wanted = "cpu" if name == "cpu" else "cuda"
    if device.type != wanted:
        return f"it supports {wanted} tensors, not {device.type}"
    if native.missing_reason():
        return native.missing_reason()
    if wanted not in op.launchers and native.native_op(op.name, wanted) is None:
        return f"the package holds no native {wanted.upper()} kernel of this op"
    if name == "cuda" and arch.of(device).name != "sm_90":
        return f"its kernels are for sm_90, not {arch.of(device).name}"
    return None


def _unsupported_on_cpu() -> str | None:
    """Why Triton kernels do not run on CPU tensors; None if they do."""
    if arch.compiling_for():  # deepkern.compiled, or bench inspect
        return None
    if compiled.requested() is not None:
        reason = compiled.unavailable_reason()
        return reason and f"DEEPKERN_COMPILED is set, but {reason}"
    if interpreting():
        return None
    return "CPU tensors need TRITON_INTERPRET=1 set before import, or `with deepkern.compiled():`"


def interpreting() -> bool:
    """Whether Triton kernels run in the interpreter (decided when Triton is imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def find_launcher(op_name: str, name: str) -> Callable:
    """The launcher looked up by the op's name: the reference or the native op."""
    if name == "torch":
        return getattr(importlib.import_module("deepkern.reference"), op_name)
    return native.native_op(op_name, name)


@dataclass(frozen=True)
class Explanation:
    """Which backend and tile a call would use, and why. `str()` formats it for reading."""

    op: str
    backend: str
    reasons: dict[str, str]  # by backend: "supported", or why it is not used
    where: str  # the GPU target, or the device where no GPU kernel runs
    tile: object | None

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend} on {self.where}"]
        for name, reason in self.reasons.items():
            lines.append(f"  {'->' if name == self.backend else '  '} {name:7}{reason}")
        if self.tile is not None:
            lines.append(f"     tile   {self.tile}")
        return "\n".join(lines)


def explain(op, *args, **kwargs) -> Explanation:
    """Reports which backend and tile a call would use, and why not the other backends.

    Args:
        op: a public function (`deepkern.fp8_gemm_nt`) or its name.
        args, kwargs: the arguments of the call.

    Returns:
        An `Explanation`; print it.

    Raises what the call itself would raise for wrong arguments, or BackendError for a forced
    backend that does not support the call.
    """
    from .op import OPS

    name = op if isinstance(op, str) else op.__name__
    if name not in OPS:
        raise ValueError(f"explain: no op {name!r}; there are {', '.join(sorted(OPS))}")
    described = OPS[name]
    args = described.positional(args, kwargs)
    device = described.device(args)
    described.check(*args)
    chosen = choose(described, device, args)
    reasons = {}
    for name in BACKENDS:
        reason = unsupported_reason(described, name, device, args)
        status = "supported" if requested() != "auto" or name == chosen else "supported, slower"
        if not is_verified(described, name):
            status = f"supported if forced; {verified.unverified_reason(described.name)}"
        reasons[name] = reason or status
    if chosen not in ("cuda", "triton"):
        return Explanation(described.name, chosen, reasons, str(device), None)
    # The tiles of the Hopper kernels are chosen in C++ (csrc/sm90/choose.h).
    tile = None
    if described.choose_tile is not None and chosen == "triton":
        tile = described.choose_tile(*args)
    return Explanation(described.name, chosen, reasons, arch.of(device).name, tile)
