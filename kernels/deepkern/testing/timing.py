"""The time of calls, measured in interleaved rounds.

A round times every call for a few repeats, so that drift of the machine affects all of them alike.
Each repeat takes the next variant of the call, whose tensors are in other memory, so that inputs do
not come from a cache.

On a CPU a sample is the wall time of a round over its repeats. On a GPU each repeat is timed with
CUDA events after the L2 cache was overwritten (as `triton.testing.do_bench` does), and a sample is
the mean of a round. The GPU's part is unmeasured on hardware.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch

Call = Callable[[], object]
Context = Callable[[], AbstractContextManager]

SHORTEST_ROUND = 1e-4  # seconds; the clock's resolution and cost are below 1e-7
MOST_REPEATS = 1000  # of a round
ROUNDS, FEW_ROUNDS = 31, 3
FLUSHED_BYTES = 256 << 20  # overwritten before a call on a GPU, or four times its L2 cache
SPIN_RATE = 2e9  # clocks per second of the fastest GPU
LONGEST_SPIN = 5e-3  # seconds; a call that waits for the GPU takes as long as the GPU
HOST_CALLS = 9  # that measure the launch overhead
GRAPHS = 4  # variants that are captured


@dataclass(frozen=True)
class Timing:
    """Microseconds per call."""

    samples: tuple[float, ...]  # one per round
    calls: int  # timed in all rounds together
    graph: float | None = None  # median in a replayed CUDA graph
    no_graph: str = ""  # why there is none
    host: float | None = None  # median until the call returns to the host; GPU only

    @property
    def least(self) -> float:
        return min(self.samples)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Interquartile range over median; 0 for a single sample."""
        if len(self.samples) < 2:
            return 0.0
        quartiles = statistics.quantiles(self.samples, n=4, method="inclusive")
        return (quartiles[2] - quartiles[0]) / self.median if self.median else 0.0


def time_calls(
    calls: Mapping[str, Sequence[Call]],
    device: torch.device,
    seconds: float = 0.3,
    rounds: int = ROUNDS,
    contexts: Mapping[str, Context] | None = None,
) -> dict[str, Timing]:
    """Times each of `calls`, by name, for about `seconds` each.

    Each name has variants of one call, which differ in the memory of their tensors and were called
    before if their first call prepares something. A call that
    takes longer than `seconds` / `rounds` gets fewer rounds, at least 3; one that takes longer than
    `seconds` is timed once, after a warm-up.
    contexts: by name, what makes a context manager; each round of that name runs in a new one.
    """
    contexts = contexts or {}
    timings = _time_rounds(calls, device, seconds, rounds, contexts)
    if device.type == "cuda":
        clock = GpuClock(device)
        for name, timing in timings.items():
            with contexts.get(name, nullcontext)():
                graph, no_graph = graph_time(calls[name], clock)
                host = host_time(calls[name][0])
            timings[name] = replace(timing, graph=graph, no_graph=no_graph, host=host)
    return timings


def time_call(call: Call, device: torch.device, seconds: float = 0.5) -> Timing:
    """Times one call for about `seconds`, without a CUDA graph and the launch overhead."""
    return _time_rounds({"": [call]}, device, seconds, ROUNDS, {})[""]


def _time_rounds(
    calls: Mapping[str, Sequence[Call]],
    device: torch.device,
    seconds: float,
    rounds: int,
    contexts: Mapping[str, Context],
) -> dict[str, Timing]:
    clock: Clock = GpuClock(device) if device.type == "cuda" else cpu_clock
    turns: dict[str, Turns] = {}
    for name, variants in calls.items():
        with contexts.get(name, nullcontext)():
            turns[name] = Turns.plan(variants, clock, seconds, rounds)
    for _ in range(rounds):
        for name, each in turns.items():
            if each.is_done(seconds):
                continue
            with contexts.get(name, nullcontext)():
                each.time_round(clock)
    return {
        name: Timing(tuple(each.samples), each.repeats * len(each.samples))
        for name, each in turns.items()
    }


Clock = Callable[[Sequence[Call]], float]  # microseconds per call of calls that run in turn


@dataclass
class Turns:
    """How often one call is timed: `repeats` calls in each of at most `rounds` rounds."""

    order: Iterator[Call]
    rounds: int
    repeats: int
    wall: float  # seconds of the fastest round
    samples: list[float] = field(default_factory=list)

    @classmethod
    def plan(cls, variants: Sequence[Call], clock: Clock, seconds: float, rounds: int) -> Turns:
        """Measures how long a call takes."""
        wall, first = _wall(clock, variants[:1])
        if wall > seconds:  # the first call may have compiled a kernel or waited for other work
            wall, first = _wall(clock, variants[:1])
        if wall > seconds:
            return cls(iter(()), 0, 1, wall, [first])
        order, repeats = itertools.cycle(variants), 1
        target = max(seconds / rounds, SHORTEST_ROUND)
        wall = _wall(clock, [*itertools.islice(order, repeats)])[0]
        while wall < target / 2 and repeats < MOST_REPEATS:
            repeats = min(math.ceil(repeats * max(2, 0.9 * target / wall)), MOST_REPEATS)
            wall = _wall(clock, [*itertools.islice(order, repeats)])[0]
        return cls(order, rounds, repeats, wall)

    def is_done(self, seconds: float) -> bool:
        """Whether the rounds were as many as fit into `seconds` where nothing stalls them.

        On a busy machine a stall of the first rounds would leave 3 of 31.
        """
        wanted = max(FEW_ROUNDS, math.ceil(seconds / self.wall))
        return len(self.samples) >= min(self.rounds, wanted)

    def time_round(self, clock: Clock) -> None:
        wall, sample = _wall(clock, [*itertools.islice(self.order, self.repeats)])
        self.samples.append(sample)
        self.wall = min(self.wall, wall)


def _wall(clock: Clock, calls: Sequence[Call]) -> tuple[float, float]:
    """Wall seconds of timing `calls`, and the microseconds per call that the clock gives."""
    start = time.perf_counter()
    microseconds = clock(calls)
    return time.perf_counter() - start, microseconds


def cpu_clock(calls: Sequence[Call]) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return 1e6 * (time.perf_counter() - start) / len(calls)


class GpuClock:
    """Times calls with CUDA events; overwrites the L2 cache before each.

    The GPU then spins until the host has launched the call, so that launches are not in the time.
    """

    def __init__(self, device: torch.device) -> None:
        L2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        size = max(FLUSHED_BYTES, 4 * L2_bytes)
        self.buffer = torch.empty(size // 4, dtype=torch.int32, device=device)

    def __call__(self, calls: Sequence[Call]) -> float:
        events, cycles = [], spin_cycles(calls[0])
        for call in calls:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.buffer.zero_()
            torch.cuda._sleep(cycles)
            start.record()
            call()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return 1e3 * statistics.mean(start.elapsed_time(end) for start, end in events)


def spin_cycles(call: Call) -> int:
    """GPU clocks of twice the time that the host takes to launch `call`."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    launch = time.perf_counter() - start
    torch.cuda.synchronize()
    return int(min(2 * launch, LONGEST_SPIN) * SPIN_RATE)


def host_time(call: Call) -> float:
    """Microseconds until `call` returns while the GPU's queue is empty: the launch overhead.

    A call that waits for the GPU includes that wait.
    """
    samples = []
    for _ in range(HOST_CALLS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        samples.append(1e6 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return statistics.median(samples)


def graph_time(variants: Sequence[Call], clock: Clock) -> tuple[float | None, str]:
    """Median microseconds of a CUDA graph of one call, or None and why there is none."""
    reason = why_not_captured(variants[0])
    if reason:
        return None, reason
    try:
        graphs = [captured(variant) for variant in variants[:GRAPHS]]
    except Exception as error:
        torch.cuda.synchronize()  # raises if nothing runs on the GPU any more
        return None, one_line(error)
    replays = [graph.replay for graph in graphs]
    clock(replays)  # the first replay uploads the graph
    return statistics.median(clock(replays) for _ in range(FEW_ROUNDS * 3)), ""


def why_not_captured(call: Call) -> str:
    """That `call` synchronizes, which no capture allows, or fails; empty if it does neither."""
    mode = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        call()
        return ""
    except Exception as error:
        return one_line(error)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def captured(call: Call) -> torch.cuda.CUDAGraph:
    """A CUDA graph of one call, with a memory pool of its own.

    Raises what fails, and leaves stream and allocator as they were. `torch.cuda.graph` does not: if
    the end of the capture raises, its stream stays the current one, and the allocator goes on
    recording to the pool (CUDAGraph::capture_end of torch 2.11 to 2.13).
    """
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    torch.cuda.synchronize()
    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            graph.capture_begin(pool)
            try:
                call()
            finally:
                graph.capture_end()
    except Exception:
        end_recording(pool)
        raise
    return graph


def end_recording(pool: tuple[int, int]) -> None:
    """Ends the allocator's recording to the pool of a failed capture, and releases the pool."""
    device = torch.cuda.current_device()
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:  # the end of the capture did it, and the graph releases its pool
        return
    torch._C._cuda_releasePool(device, pool)


def one_line(error: BaseException) -> str:
    """The first line of the first error of a chain."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {error}".partition("\n")[0]
