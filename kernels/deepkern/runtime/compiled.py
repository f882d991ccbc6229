"""Runs Triton kernels in their compiled form on a CPU: `deepkern.compiled`.

Inside `with deepkern.compiled("sm_90"):` a launch of any `@triton.jit` kernel on CPU tensors takes
the path that it takes on a GPU: Triton specializes the arguments, compiles for the target as far as
PTX, and calls its own NVIDIA launcher. The launcher calls this package's libcuda, which executes
the PTX (csrc/ptx). An op called inside with the `triton` backend runs in the same way.
DEEPKERN_COMPILED=sm_90 does this for every op that the `triton` backend serves on CPU tensors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from . import arch, native, ptx_library

TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
_INTERPRETING = ("1", "true", "on", "yes", "y")


@dataclass(frozen=True)
class Settings:
    """The arguments of `compiled`."""

    target: str
    seed: int
    order: str
    check_races: bool
    check_initialized: bool
    hardware_sums: bool
    resident_blocks: int
    max_instructions: int

    def __post_init__(self):
        if self.target not in TARGETS:
            raise ValueError(f"compiled: target: expected one of {TARGETS}, got {self.target!r}")
        if self.order not in ptx_library.ORDERS:
            expected = ptx_library.ORDERS
            raise ValueError(f"compiled: order: expected one of {expected}, got {self.order!r}")
        for name, least in (("seed", 0), ("resident_blocks", 1), ("max_instructions", 0)):
            if getattr(self, name) < least:
                value = getattr(self, name)
                raise ValueError(f"compiled: {name}: expected {least} or more, got {value}")


_active: list[Settings] = []


@contextlib.contextmanager
def compiled(
    target: str = "sm_90",
    *,
    seed: int = 0,
    order: str = "random",
    check_races: bool = True,
    check_initialized: bool = True,
    hardware_sums: bool = True,
    resident_blocks: int = 8,
    max_instructions: int = 0,
) -> Iterator[None]:
    """Runs Triton kernels on CPU tensors as compiled for a GPU target, inside the `with` block.

    Any `@triton.jit` kernel runs, ours or not. `triton.autotune` uses its first configuration, as
    nothing is timed. The choice is process-wide, like `deepkern.backend`.

    Args:
        target: sm_80, sm_89, sm_90, sm_100 or sm_120.
        seed: of the order in which warps, blocks and asynchronous copies run.
        order: `random`; `earliest` completes a copy or an MMA as it is issued, `latest` when
            nothing else can run.
        check_races: report races in shared and global memory.
        check_initialized: report reads of shared and tensor memory that nothing wrote.
        hardware_sums: tensor cores add as the target's hardware does, as far as that is published;
            else in float32, in the order of k.
        resident_blocks: blocks that run at the same time.
        max_instructions: a launch that executes more fails; 0 for no limit.

    Raises:
        RuntimeError: kernels cannot run here in compiled form; the message has the reason.
        KernelFailure: at a launch, see there.
    """
    settings = Settings(target, seed, order, check_races, check_initialized, hardware_sums,
                        resident_blocks, max_instructions)  # fmt: skip
    reason = unavailable_reason()
    if reason is not None:
        raise RuntimeError(f"deepkern.compiled: {reason}")
    from . import ptx_driver

    _active.append(settings)
    try:
        with ptx_driver.activated(arch.ARCHS[target]), arch.compile_for(arch.ARCHS[target]):
            ptx_library.apply(settings)
            yield
    finally:
        _active.pop()
        if _active:
            ptx_library.apply(_active[-1])


@contextlib.contextmanager
def reachable(**tensors: Tensor | tuple[Tensor, ...]) -> Iterator[None]:
    """Kernels in the `with` block may touch these tensors, which are no arguments of theirs.

    For memory that a kernel reaches through an address in memory or an integer argument. The
    keywords name the tensors in messages.
    """
    with ptx_library.registered(dict(tensors)):
        yield


def unavailable_reason() -> str | None:
    """Why kernels cannot run here in compiled form; None if they can."""
    if os.environ.get("TRITON_INTERPRET", "").lower() in _INTERPRETING:
        return (
            "TRITON_INTERPRET is set, so @triton.jit defines interpreted kernels, which have no "
            "compiled form: start Python without TRITON_INTERPRET"
        )
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return native.load("_ptx")[1]


def requested() -> str | None:
    """The target in DEEPKERN_COMPILED, or None."""
    target = os.environ.get("DEEPKERN_COMPILED") or None
    if target is not None and target not in TARGETS:
        raise ValueError(f"DEEPKERN_COMPILED: expected one of {TARGETS}, got {target!r}")
    return target


def run(launch: Callable, args: tuple):
    """Calls a Triton launcher on CPU tensors, as DEEPKERN_COMPILED says."""
    target = requested()
    if target is None or _active or arch.compiling_for():
        return launch(*args)
    with compiled(target):
        return launch(*args)


def current() -> Settings | None:
    """The settings of the innermost `compiled` block, or None."""
    return dataclasses.replace(_active[-1]) if _active else None
