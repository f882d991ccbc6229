"""Times every op and its PyTorch baselines.

An op whose check failed is not timed, nor is interpreted Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import torch

import deepkern
from deepkern.runtime import arch, backends
from deepkern.testing.costs import Cost
from deepkern.testing.ops import by_name, cost, facts
from deepkern.testing.timing import Timing, time_call

from . import checks, machine


@dataclass(frozen=True)
class Speed:
    """One op at one size on one backend; `note` says why it or its baseline has no speed."""

    op: str
    backend: str
    size: str
    ok: bool = True
    microseconds: float | None = None
    iqr_ratio: float | None = None  # interquartile range over median
    gb_per_s: float | None = None
    tflops: float | None = None
    roof: float | None = None  # the least time the hardware needs, over ours: 1 is the best
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
    """The backends to time: on a CPU the one that auto chooses, on a GPU all kernels."""
    registered = deepkern.OPS[op]
    names = ("cuda", "triton") if device.type == "cuda" else ("cpu",)
    if backends.interpreting():
        names = tuple(name for name in names if name != "triton")
    return [
        name for name in names if backends.unsupported_reason(registered, name, device) is None
    ] or ["torch"]


def plan(ops: list[str], device: torch.device) -> list[tuple[str, dict, str]]:
    """(op, size, backend) for everything to time."""
    return [
        (op, size, backend)
        for op in ops
        for size in (facts(op).SIZES.gpu if device.type == "cuda" else facts(op).SIZES.cpu)
        for backend in timed_backends(op, device)
    ]


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a copy within the device's memory; reads and writes both count."""
    source = torch.ones(1 << (28 if device.type == "cuda" else 26), device=device)
    target = torch.empty_like(source)
    seconds = time_call(lambda: target.copy_(source), device, 0.3).median / 1e6
    return 2 * source.nbytes / seconds / 1e9


def time_op(
    op: str, size: dict, backend: str, device: torch.device, bandwidth: float, seconds: float
) -> list[Speed]:
    """Times `op` and each of its providers, after a check that the results agree at this size.

    Returns nothing if the backend serves the op but not these arguments.
    """
    label = (op, backend, checks.text(size))
    registered, call = deepkern.OPS[op], getattr(deepkern, op)
    with torch.no_grad(), deepkern.backend(backend):
        try:
            given = facts(op).inputs(torch.Generator(device).manual_seed(1), **size)
            args = registered.positional(given)
            if backends.unsupported_reason(registered, backend, device, args):
                return []
            got = checks.outputs(call, args)
            want = checks.outputs(facts(op).baseline, args)
            agrees, _, reason = checks.compare_plain(op, args, got, want)
            if agrees is False:
                return [Speed(*label, ok=False, note=f"not timed: {reason}")]
            ours = time_call(lambda: call(*args), device, seconds)
            theirs = time_providers(op, args, device, seconds)
        except Exception as error:
            return [Speed(*label, ok=False, note=f"{type(error).__name__}: {error}"[:300])]
    elapsed, work = ours.median / 1e6, cost(op, args, got)
    speed = Speed(
        *label,
        microseconds=ours.median,
        iqr_ratio=ours.iqr_ratio,
        gb_per_s=work.bytes / elapsed / 1e9,
        tflops=work.flops / elapsed / 1e12 if work.flops else None,
        roof=_roof(work, device, bandwidth, elapsed),
    )
    return [
        replace(speed, baseline=words, note=t)
        if isinstance(t, str)
        else replace(speed, baseline=words, baseline_microseconds=t.median,
                     ratio=t.median / ours.median)
        for words, t in theirs.items()
    ]  # fmt: skip


def providers(op: str, args: tuple) -> dict[str, Callable[[], object]]:
    """The calls to compare `op` with, by description: its baseline and its `others`."""
    baseline, others = facts(op).baseline, getattr(facts(op), "others", None)
    description = baseline.__doc__.splitlines()[0].rstrip(".")
    calls: dict[str, Callable[[], object]] = {description: lambda: baseline(*args)}
    if others is not None:
        try:
            calls |= others(**by_name(op, args))
        except Exception as error:
            calls["further baselines"] = _raising(error)
    return calls


def _raising(error: Exception) -> Callable[[], object]:
    """A call that raises `error`, so that the report shows it."""

    def call():
        raise error

    return call


def time_providers(
    op: str, args: tuple, device: torch.device, seconds: float
) -> dict[str, Timing | str]:
    """The time of each of the op's providers, or the reason why it cannot run."""
    theirs: dict[str, Timing | str] = {}
    for words, call in providers(op, args).items():
        try:
            call()  # the first call prepares
            theirs[words] = time_call(call, device, seconds)
        except Exception as error:
            lines = str(error).splitlines() or [""]
            theirs[words] = f"{type(error).__name__}: {lines[0]}"[:200]
    return theirs


def _roof(work: Cost, device: torch.device, bandwidth: float, elapsed: float) -> float | None:
    """The least time by a copy's bandwidth and the device's peak rate, over `elapsed` seconds.

    None for an op that multiplies on a CPU, whose peak rate we do not know.
    """
    memory = work.bytes / (bandwidth * 1e9)
    if not work.flops:
        return memory / elapsed
    if device.type != "cuda":
        return None
    target = arch.of(device)
    rate = target.fp8_tflops if work.fp8 and target.fp8_tflops else target.bf16_tflops
    return max(memory, work.flops / (rate * 1e12)) / elapsed


def time_all(
    jobs: list[tuple[str, dict, str]], failed: set[tuple[str, str]], seconds: float
) -> Iterator[Speed]:
    """Times `jobs` except those whose (op, backend) is in `failed`."""
    device = machine.device()
    bandwidth = copy_bandwidth(device)
    for op, size, backend in jobs:
        if (op, backend) in failed:
            yield Speed(
                op, backend, checks.text(size), ok=False, note="not timed: its check failed"
            )
        else:
            yield from time_op(op, size, backend, device, bandwidth, seconds)
