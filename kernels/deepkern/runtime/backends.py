"""Which backend serves an op: `cuda`, `triton`, `cpu` or `torch` (the reference).

`auto`, the default, takes the fastest that can serve the device. `DEEPKERN_BACKEND=triton` or
`with deepkern.backend("triton"):` force one, and then it is an error if that one cannot serve.
The choice is process-wide, as torch.backends' switches are, so that backward passes, which torch
runs on threads of its own, see it too.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from . import arch, evidence, native

BACKENDS = ("cuda", "triton", "cpu", "torch")
# Fastest first. Interpreted Triton is a check, not a way to compute: auto never takes it.
_AUTO = {"cuda": ("cuda", "triton", "torch"), "cpu": ("cpu", "torch")}
_forced: list[str] = []


class BackendError(RuntimeError):
    """The backend asked for cannot serve the call."""


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
    """The backend asked for: the innermost `with backend(...)`, then DEEPKERN_BACKEND, or auto."""
    return _forced[-1] if _forced else _known(os.environ.get("DEEPKERN_BACKEND") or "auto")


def choose(op, device: torch.device, args: tuple | None = None) -> str:
    """The backend for a call of `op` on `device`; BackendError if the forced one cannot serve.

    `args`: all of the call's arguments, by position, not yet checked; a backend may decline them.
    """
    name = requested()
    if name == "auto":
        candidates = _AUTO.get(device.type, ("torch",))
        return next(
            c for c in candidates if why_not(op, c, device, args) is None and trusted(op, c)
        )
    reason = why_not(op, name, device, args)
    if reason is not None:
        raise BackendError(f"{op.name}: backend {name!r} was asked for but cannot serve: {reason}")
    return name


def trusted(op, name: str) -> bool:
    """Whether auto may take backend `name`: the Hopper kernels only once a GPU has proven them."""
    return name != "cuda" or evidence.why_unproven(op.name) is None


def why_not(op, name: str, device: torch.device, args: tuple | None = None) -> str | None:
    """Why `name` cannot serve `op` on `device`, or this call of it; None if it can."""
    reason = _why_not_at_all(op, name, device)
    if reason is None and args is not None and name in op.declines:
        return op.declines[name](*args)
    return reason


def _why_not_at_all(op, name: str, device: torch.device) -> str | None:
    if name == "torch":
        return None
    if name == "triton":
        if "triton" not in op.launchers:
            return "it has no Triton kernel"
        if device.type == "cuda":
            return arch.why_unknown(device)
        if device.type == "cpu":
            needs = "CPU tensors need TRITON_INTERPRET=1 set before import"
            return None if interpreting() or arch.compiling_for() else needs
        return f"Triton does not reach {device.type} tensors"
    wanted = "cpu" if name == "cpu" else "cuda"
    if device.type != wanted:
        return f"it takes {wanted} tensors, not {device.type}"
    if native.why_absent():
        return native.why_absent()
    if wanted not in op.launchers and native.native_op(op.name, wanted) is None:
        return f"the package holds no native {wanted.upper()} kernel of this op"
    if name == "cuda" and arch.of(device).name != "sm_90":
        return f"its kernels are for sm_90, not {arch.of(device).name}"
    return None


def interpreting() -> bool:
    """Whether Triton kernels run in the interpreter (decided when Triton is imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def find(op_name: str, name: str) -> Callable:
    """The launcher that is found by the op's name: the reference or the native op."""
    if name == "torch":
        return getattr(importlib.import_module("deepkern.reference"), op_name)
    return native.native_op(op_name, name)


@dataclass(frozen=True)
class Explanation:
    """What a call would run and why; `str()` of it is a readable page."""

    op: str
    backend: str
    reasons: dict[str, str]  # per backend: "serves" or why not
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
    """Says what a call would run: the backend, why not the others, and the tile.

    `op` is a public function (`deepkern.fp8_gemm_nt`) or its name; the rest are its arguments.
    Raises what the call itself would raise for bad arguments or a forced backend that cannot serve.
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
        reason = why_not(described, name, device, args)
        serves = "serves" if requested() != "auto" or name == chosen else "serves, but slower"
        if not trusted(described, name):
            serves = f"serves if forced; {evidence.why_unproven(described.name)}"
        reasons[name] = reason or serves
    if chosen not in ("cuda", "triton"):
        return Explanation(described.name, chosen, reasons, str(device), None)
    # Those of the Hopper kernels are chosen in C++ (csrc/sm90/choose.h).
    tile = described.tile(*args) if described.tile and chosen == "triton" else None
    return Explanation(described.name, chosen, reasons, arch.of(device).name, tile)
