"""How long a call takes: the median over repeated calls, on the device where its work is done.

On a GPU with CUDA events, the L2 cache emptied before every call (`triton.testing.do_bench`); on a
CPU with `torch.utils.benchmark`. Both warm up first and repeat until `seconds` have been spent; on
a CPU, a call that takes longer than that is measured once and not warmed up.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Microseconds a call; `spread` is the interquartile range over the median."""

    median: float
    spread: float
    samples: int


def time_call(call: Callable[[], object], device: torch.device, seconds: float = 0.5) -> Timing:
    """Times `call`, which does its work on `device`, for about `seconds`."""
    samples = _on_gpu(call, seconds) if device.type == "cuda" else _on_cpu(call, seconds)
    median = statistics.median(samples)
    quartiles = statistics.quantiles(samples, n=4) if len(samples) > 1 else (median, 0, median)
    spread = (quartiles[2] - quartiles[0]) / median if median else 0.0
    return Timing(median * 1e6, spread, len(samples))


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
