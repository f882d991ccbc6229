"""How fast every op is beside PyTorch.

No op is timed whose check failed, and none on a backend that is no way to compute: interpreted
Triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import torch

import deepkern
from deepkern.runtime import arch, backends
from deepkern.testing import inputs
from deepkern.testing.timing import Timing, time_call

from . import baselines, checks, costs, machine


@dataclass(frozen=True)
class Speed:
    """One op at one size on one backend; `note` says why it or its baseline has no speed."""

    op: str
    backend: str
    size: str
    ok: bool = True
    microseconds: float | None = None
    spread: float | None = None  # interquartile range over median
    gb_per_s: float | None = None
    tflops: float | None = None
    roof: float | None = None  # share of the time that the hardware needs at least, 1 = at the roof
    baseline: str = ""
    baseline_microseconds: float | None = None
    ratio: float | None = None  # baseline's time over ours: above 1, we are faster
    note: str = ""

    @property
    def label(self) -> tuple[str, str, str]:
        return self.op, self.size, self.backend

    def record(self) -> dict:
        return {"kind": "speed", **asdict(self)}


def timed_backends(op: str, device: torch.device) -> list[str]:
    """The backends whose speed says something: on a CPU what auto takes, on a GPU all kernels."""
    described = deepkern.OPS[op]
    names = ("cuda", "triton") if device.type == "cuda" else ("cpu",)
    if backends.interpreting():
        names = tuple(name for name in names if name != "triton")
    return [
        name for name in names if backends.unsupported_reason(described, name, device) is None
    ] or ["torch"]


def plan(ops: list[str], device: torch.device) -> list[tuple[str, dict, str]]:
    """(op, size, backend) for all that is to be timed."""
    return [
        (op, size, backend)
        for op in ops
        for size in (inputs.sizes(op).gpu if device.type == "cuda" else inputs.sizes(op).cpu)
        for backend in timed_backends(op, device)
    ]


def copy_bandwidth(device: torch.device) -> float:
    """GB/s that a copy within the device's memory reaches, reading and writing counted."""
    source = torch.ones(1 << (28 if device.type == "cuda" else 26), device=device)
    target = torch.empty_like(source)
    seconds = time_call(lambda: target.copy_(source), device, 0.3).median / 1e6
    return 2 * source.nbytes / seconds / 1e9


def time_op(
    op: str, size: dict, backend: str, device: torch.device, bandwidth: float, seconds: float
) -> list[Speed]:
    """Times `op` beside each of its baselines, after checking that they agree at this size.

    Nothing, where the backend serves the op but not these arguments.
    """
    label = (op, backend, checks.text(size))
    plain = baselines.BASELINES.get(op)
    call = deepkern.OPS[op]
    with torch.no_grad(), deepkern.backend(backend):
        try:
            made = inputs.make(op, torch.Generator(device).manual_seed(1), **size)
            args = deepkern.OPS[op].positional(made)
            if backends.unsupported_reason(call, backend, device, args):
                return []
            got = checks.outputs(call, args)
            if plain is not None:
                agreed, _, why = checks.roughly(op, args, got, checks.outputs(plain, args))
                if agreed is False:
                    return [Speed(*label, ok=False, note=f"not timed: {why}")]
            ours = time_call(lambda: call(*args), device, seconds)
            theirs = time_others(op, args, device, seconds)
        except Exception as error:
            return [Speed(*label, ok=False, note=f"{type(error).__name__}: {error}"[:300])]
    taken = ours.median / 1e6
    moved, operations = costs.cost(op, args, got)
    speed = Speed(
        *label,
        microseconds=ours.median,
        spread=ours.spread,
        gb_per_s=moved / taken / 1e9,
        tflops=operations / taken / 1e12 if operations else None,
        roof=_roof(op, moved, operations, device, bandwidth, taken),
    )
    beside = [
        replace(speed, baseline=words, note=t)
        if isinstance(t, str)
        else replace(speed, baseline=words, baseline_microseconds=t.median,
                     ratio=t.median / ours.median)
        for words, t in theirs.items()
    ]  # fmt: skip
    return beside or [speed]


def time_others(
    op: str, args: tuple, device: torch.device, seconds: float
) -> dict[str, Timing | str]:
    """The time of each of the op's baselines, or why it cannot run."""
    theirs: dict[str, Timing | str] = {}
    for words, other in baselines.calls(op, args).items():
        try:
            other()  # prepares
            theirs[words] = time_call(other, device, seconds)
        except Exception as error:
            lines = str(error).splitlines() or [""]
            theirs[words] = f"{type(error).__name__}: {lines[0]}"[:200]
    return theirs


def _roof(
    op: str, moved: int, operations: int, device: torch.device, bandwidth: float, taken: float
) -> float | None:
    """The least time this device could take, by a copy's bandwidth and its peak rate, over `taken`.

    No peak rate is known of a CPU, so an op that multiplies has no roof there.
    """
    memory = moved / (bandwidth * 1e9)
    if not operations:
        return memory / taken
    if device.type != "cuda":
        return None
    facts = arch.of(device)
    rate = facts.fp8_tflops if op in costs.FP8_PRODUCTS and facts.fp8_tflops else facts.bf16_tflops
    return max(memory, operations / (rate * 1e12)) / taken


def time_all(
    jobs: list[tuple[str, dict, str]], failed: set[tuple[str, str]], seconds: float
) -> Iterator[Speed]:
    """Times `jobs`, leaving out each (op, backend) that is in `failed`."""
    device = machine.device()
    bandwidth = copy_bandwidth(device)
    for op, size, backend in jobs:
        if (op, backend) in failed:
            yield Speed(
                op, backend, checks.text(size), ok=False, note="not timed: its check failed"
            )
        else:
            yield from time_op(op, size, backend, device, bandwidth, seconds)
