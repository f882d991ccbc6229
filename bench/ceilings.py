"""How fast this device copies and multiplies: the ceilings of an op's speed.

The least time of a call is the larger one of its bytes over the bandwidth and its FLOPs over the
rate of its multiplications; `Ceilings.roof` says which. On a GPU the rates are those of torch.mm in
bf16 and of F.scaled_mm in FP8. On a CPU they are those of F.linear in fp32 and in bf16, and the
faster one counts, because the native kernels may widen FP8 and bf16 to either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from deepkern.testing.costs import Cost
from deepkern.testing.timing import Timing, time_calls

from . import machine

SECONDS = 0.3  # of each measurement
ROUNDS = 200  # short ones: the least counts on a CPU
GPU_SIZE, CPU_SIZE = 8192, 512  # M = N = K; other work seldom delays a call of 2 ms
LOAD = 600  # products, about a second on an H200


class Roof(NamedTuple):
    microseconds: float  # the least time of a call
    limit: str  # "memory" or "compute"


@dataclass(frozen=True)
class Ceilings:
    """Measured rates. A dtype that the device cannot multiply is absent."""

    copy_gb_per_s: float  # reads and writes both count
    matmul_tflops: dict[str, float]  # "fp32", "bf16", "fp8"

    def record(self) -> dict:
        return asdict(self)

    def roof(self, work: Cost, device: torch.device) -> Roof:
        memory = work.bytes / self.copy_gb_per_s / 1e3
        rates = self.matmul_tflops
        if device.type == "cuda":
            rate = rates.get("fp8", rates["bf16"]) if work.fp8 else rates["bf16"]
        else:
            rate = max(rates.values())
        compute = work.flops / rate / 1e6
        return Roof(compute, "compute") if compute > memory else Roof(memory, "memory")


def best(a: Ceilings, b: Ceilings) -> Ceilings:
    """The larger one of each rate: other work can only lower a measured ceiling."""
    rates = {name: max(rate, b.matmul_tflops.get(name, 0.0))
             for name, rate in a.matmul_tflops.items()}  # fmt: skip
    return Ceilings(max(a.copy_gb_per_s, b.copy_gb_per_s), rates)


def measure(device: torch.device, seconds: float = SECONDS) -> Ceilings:
    """Times each rate for about `seconds`."""
    size = GPU_SIZE if device.type == "cuda" else CPU_SIZE
    rates = {}
    for name, product in products(device, size).items():
        try:
            product()
        except (RuntimeError, NotImplementedError, AttributeError):  # no such multiplication
            continue
        rates[name] = 2 * size**3 / _best(product, device, seconds) / 1e6
    return Ceilings(bandwidth(device, seconds), rates)


def clocks_under_load(device: torch.device) -> dict | None:
    """The GPU's clocks, and why they are throttled, while it multiplies; None on a CPU."""
    if device.type != "cuda":
        return None
    product = products(device, GPU_SIZE)["bf16"]
    for _ in range(LOAD):
        product()
    found = machine.clocks()
    torch.cuda.synchronize()
    return found


def bandwidth(device: torch.device, seconds: float = SECONDS) -> float:
    """GB/s of a copy within the device's memory, or on a CPU of reading, if that is faster."""
    source = torch.ones(
        1 << (30 if device.type == "cuda" else 27), dtype=torch.uint8, device=device
    )
    target = torch.empty_like(source)
    rate = 2 * source.nbytes / _best(lambda: target.copy_(source), device, seconds) / 1e3
    if device.type == "cuda":
        return rate
    words = source.view(torch.int64)
    return max(rate, source.nbytes / _best(lambda: words.sum(), device, seconds) / 1e3)


def products(device: torch.device, size: int) -> dict[str, Callable[[], object]]:
    """The multiplications to time, by dtype."""
    x = torch.randn(size, size, device=device)
    half = x.bfloat16()
    if device.type != "cuda":
        return {"fp32": lambda: F.linear(x, x), "bf16": lambda: F.linear(half, half)}
    quantized, scale = x.to(torch.float8_e4m3fn), torch.ones((), device=device)
    return {
        "bf16": lambda: torch.mm(half, half.t()),
        "fp8": lambda: torch._scaled_mm(
            quantized, quantized.t(), scale, scale, out_dtype=torch.bfloat16, use_fast_accum=True
        ),
    }


def time_of(timing: Timing, device: torch.device) -> float:
    """Microseconds that count: the median on a GPU, the least on a CPU, which other work delays."""
    return timing.median if device.type == "cuda" else timing.least


def _best(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    return time_of(time_calls({"": [call]}, device, seconds, ROUNDS)[""], device)
