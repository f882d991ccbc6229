"""The time of a call: the median over repeated calls on a device.

On a GPU we use CUDA events and clear the L2 cache before every call (`triton.testing.do_bench`); on
a CPU `torch.utils.benchmark`. Both warm up first and repeat for `seconds`. A call on a CPU that
takes longer than that is measured once, without warm-up.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Microseconds per call; `iqr_ratio` is the interquartile range over the median."""

    median: float
    iqr_ratio: float
    samples: int


def time_call(call: Callable[[], object], device: torch.device, seconds: float = 0.5) -> Timing:
    """Times `call`, which runs on `device`, for about `seconds`."""
    samples = _on_gpu(call, seconds) if device.type == "cuda" else _on_cpu(call, seconds)
    median = statistics.median(samples)
    quartiles = statistics.quantiles(samples, n=4) if len(samples) > 1 else (median, 0, median)
    iqr_ratio = (quartiles[2] - quartiles[0]) / median if median else 0.0
    return Timing(median * 1e6, iqr_ratio, len(samples))


def _on_gpu(call: Callable[[], object], seconds: float) -> list[float]:
    from triton.testing import do_bench

    return [
        ms / 1e3 for ms in do_bench(call, warmup=100, rep=int(seconds * 1e3), return_mode="all")
    ]


def _on_cpu(call: Callable[[], object], seconds: float) -> list[float]:
    from torch.utils.benchmark import Timer

    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    first = timer.timeit(1).median
    if first > seconds:
        return [first]
    return timer.blocked_autorange(min_run_time=seconds).times
