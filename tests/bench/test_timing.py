"""The time of calls: rounds, repeats, rotation; on a GPU events, the cache and CUDA graphs."""

from __future__ import annotations

import contextlib
import itertools
import time

import pytest
import torch

from deepkern.testing import timing
from deepkern.testing.timing import Timing, time_call, time_calls

CPU = torch.device("cpu")


def sleeping(seconds: float):
    return lambda: time.sleep(seconds)


def recorded(log: list, name: str, seconds: float = 0.0):
    """A call that appends `name` to `log`."""

    def call():
        log.append(name)
        if seconds:
            time.sleep(seconds)

    return call


def test_summary_of_samples():
    spread = Timing(samples=(4.0, 1.0, 2.0, 3.0, 5.0), calls=10)
    assert (spread.least, spread.median, spread.spread) == (1.0, 3.0, pytest.approx(2 / 3))
    assert Timing((7.0,), 1).spread == 0.0


def test_a_call_is_measured():
    got = time_call(sleeping(0.005), CPU, seconds=0.5)
    assert 5000 <= got.least <= got.median < 50_000 and 15 <= len(got.samples) <= 31
    assert got.calls >= len(got.samples) and got.graph is got.host is None


def test_rounds_alternate_between_names():
    log: list[str] = []
    calls = {name: [recorded(log, name, 0.002)] for name in ("a", "b")}
    got = time_calls(calls, CPU, seconds=0.03)
    both = min(len(timing.samples) for timing in got.values())
    turns = [name for name, _ in itertools.groupby(log)]
    assert both >= 3 and turns[: 2 * both] == ["a", "b"] * both


def test_variants_rotate():
    log: list[str] = []
    time_calls({"x": [recorded(log, name) for name in "pqr"]}, CPU, seconds=0.01)
    counts = [log.count(name) for name in "pqr"]
    assert min(counts) > 100 and max(counts) - min(counts) <= 3


def test_a_round_of_a_tiny_call_is_long():
    got = time_calls({"x": [lambda: None]}, CPU, seconds=0.001, rounds=5)["x"]
    assert got.calls > 1000 and len(got.samples) == 5 and got.median < 10


def test_a_slow_call_has_few_rounds():
    calls = {"slow": [sleeping(0.04)], "fast": [sleeping(0.001)]}
    got = time_calls(calls, CPU, seconds=0.1)
    assert len(got["slow"].samples) == 3 < len(got["fast"].samples)


def test_a_stall_while_rounds_are_planned_costs_none(monkeypatch):
    """The first calls take 20 ms each, all later ones 0.2 ms."""
    now, calls = [0.0], []

    def call() -> None:
        calls.append(1)
        now[0] += 0.02 if len(calls) in (2, 3, 4) else 2e-4

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    got = time_calls({"x": [call]}, CPU, seconds=0.03)["x"]
    assert len(got.samples) == 31 and got.median < 1000


def test_a_call_longer_than_the_budget_is_timed_once():
    log: list[str] = []
    calls = [recorded(log, name, 0.02) for name in "pq"]
    got = time_calls({"x": calls}, CPU, seconds=0.01)["x"]
    assert log == ["p", "p"] and len(got.samples) == got.calls == 1 and got.least >= 20_000


class FakeGpu:
    """The clocks of a host and a GPU, in microseconds; a kernel after no flush takes 1."""

    def __init__(self, monkeypatch) -> None:
        self.host, self.device, self.flushed, self.waits = 0.0, 0.0, False, 0
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = gpu.run(0.0)

            def elapsed_time(self, end) -> float:
                assert gpu.waits, "an event was read before the GPU was done"
                return (end.at - self.at) / 1e3

        class Buffer:
            def zero_(self) -> None:
                gpu.run(60.0)
                gpu.flushed = True

        def wait() -> None:
            self.waits, self.host = self.waits + 1, max(self.host, self.device)

        def now() -> float:
            self.host += 0.01
            return self.host / 1e6

        properties = type("Properties", (), {"L2_cache_size": 50 << 20})
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", wait)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: gpu.run(cycles / 2e3))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(timing.torch, "empty", lambda *args, **rest: Buffer())
        monkeypatch.setattr(timing.time, "perf_counter", now)

    def run(self, microseconds: float, launch: float = 1.0) -> float:
        """The host launches, then the GPU runs when it is free; returns when it ends."""
        self.host += launch
        self.device = max(self.device, self.host) + microseconds
        return self.device

    def kernel(self, microseconds: float, launch: float = 4.0):
        def call() -> None:
            self.run(microseconds if self.flushed else 1.0, launch)
            self.flushed = False

        return call


def test_events_time_the_call_and_not_the_flush(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    got = timing._time_rounds(
        {"a": [gpu.kernel(10.0)], "b": [gpu.kernel(20.0), gpu.kernel(40.0)]},
        torch.device("cuda"), 0.001, 6, {},
    )  # fmt: skip
    assert got["a"].samples == pytest.approx([10.0] * 6)
    assert got["b"].median == pytest.approx(30.0, rel=0.05), "both variants count"


@pytest.mark.parametrize("launch", [50.0, 400.0, 2000.0])
def test_slow_launches_are_not_timed(launch, monkeypatch):
    gpu = FakeGpu(monkeypatch)
    calls = {"a": [gpu.kernel(10.0, launch)]}
    got = timing._time_rounds(calls, torch.device("cuda"), 0.05, 4, {})["a"]
    assert got.samples == pytest.approx([10.0] * 4, abs=1.1)  # an event is launched in 1


def test_times_of_a_gpu(monkeypatch):
    gpu, inside = FakeGpu(monkeypatch), []

    @contextlib.contextmanager
    def context():
        inside.append(True)
        yield
        inside.pop()

    def call() -> None:
        assert inside == [True]
        gpu.kernel(10.0)()

    monkeypatch.setattr(timing, "why_not_captured", lambda call: call() or "")
    FakeGraphs(monkeypatch, gpu.kernel(8.0))
    calls = {"a": [call] * 6}
    got = time_calls(calls, torch.device("cuda"), 0.001, 4, {"a": context})["a"]
    assert got.median == pytest.approx(10.0) and got.graph == pytest.approx(8.0)
    assert got.host is not None and 0 < got.host < 1000 and inside == [] and got.no_graph == ""


def test_a_call_that_waits_is_not_captured(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def waits() -> None:
        raise RuntimeError("called a synchronizing CUDA operation\nand more")

    got = timing.graph_time([waits], timing.cpu_clock)
    assert got == (None, "RuntimeError: called a synchronizing CUDA operation")
    assert modes == ["error", 0], "the mode is restored"


class FakeGraphs:
    """CUDA graphs, streams and the allocator's pools, as torch 2.11 to 2.13 have them.

    An end of a capture in which a call failed raises, and leaves the allocator recording.
    """

    def __init__(self, monkeypatch, replay) -> None:
        fake = self
        self.streams, self.recording, self.released, self.invalid = ["default"], [], [], False

        class Graph:
            def capture_begin(self, pool) -> None:
                assert fake.streams[-1] == "side" and not fake.recording
                fake.recording.append(pool)
                fake.invalid, self.pool = False, pool

            def capture_end(self) -> None:
                if fake.invalid:
                    raise RuntimeError("operation failed due to a previous error during capture")
                fake.recording.remove(self.pool)

        Graph.replay = staticmethod(replay)

        @contextlib.contextmanager
        def stream(entered):
            self.streams.append(entered)
            try:
                yield
            finally:
                self.streams.pop()

        def end(device, pool) -> None:
            if pool not in self.recording:
                raise RuntimeError("not currently recording to mempool_id")
            self.recording.remove(pool)

        pools = itertools.count(1)
        for name, value in (
            ("CUDAGraph", Graph), ("stream", stream), ("Stream", lambda: "side"),
            ("graph_pool_handle", lambda: (0, next(pools))), ("current_device", lambda: 0),
        ):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda d, p: self.released.append(p))


def test_a_failed_capture_leaves_stream_and_allocator(monkeypatch):
    """The reason is the call's error; the next call is captured."""
    graphs = FakeGraphs(monkeypatch, lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "why_not_captured", lambda call: "")

    def fails() -> None:
        graphs.invalid = True
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    got = timing.graph_time([fails], timing.cpu_clock)
    assert got == (
        None, "RuntimeError: CUDA error: operation not permitted when stream is capturing",
    )  # fmt: skip
    assert graphs.streams == ["default"] and graphs.recording == []
    assert graphs.released == [(0, 1)]

    def fails_in_python() -> None:  # the capture itself is valid and ends
        raise TypeError("no such kernel")

    assert timing.graph_time([fails_in_python], timing.cpu_clock)[1] == "TypeError: no such kernel"
    assert graphs.recording == [] and graphs.released == [(0, 1)], "the graph releases its own"
    time, reason = timing.graph_time([lambda: None] * 5, timing.cpu_clock)
    assert time is not None and reason == "" and graphs.streams == ["default"]


def test_a_gpu_that_is_lost_is_an_error(monkeypatch):
    """Nothing else can be timed in this process."""
    FakeGraphs(monkeypatch, lambda: None)
    monkeypatch.setattr(timing, "why_not_captured", lambda call: "")
    waits = iter([None])

    def synchronize() -> None:
        if next(waits, "lost") == "lost":
            raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(torch.AcceleratorError):
        timing.graph_time([lambda: 1 / 0], timing.cpu_clock)


@pytest.mark.gpu
def test_a_gpu_is_waited_for(device):
    x = torch.ones(1 << 28, device=device)
    got = time_calls({"x": [lambda: x.mul_(1.0)]}, device, seconds=0.1)["x"]
    least = 2 * x.nbytes / 8e12 * 1e6
    assert got.least > least, "faster than any memory"
    assert got.graph is not None and got.graph > least and got.host is not None
    assert 0 < got.host < got.median, "the launch does not wait"


@pytest.mark.gpu
@pytest.mark.parametrize("wait", ["item", "synchronize"])
def test_a_failed_capture_leaves_no_error(device, wait):
    x = torch.ones(1000, device=device)

    def call():
        return x.sum().item() if wait == "item" else torch.cuda.synchronize()

    got = time_calls({"x": [call]}, device, seconds=0.01)["x"]
    assert got.graph is None and got.no_graph and got.median > 0
    assert time_calls({"y": [lambda: x * 2]}, device, seconds=0.01)["y"].graph is not None
    assert torch.rand(10, device=device).sum().item() > 0


@pytest.mark.gpu
def test_a_call_that_fails_in_the_capture_only(device, monkeypatch):
    """The allocator and the current stream are as before; the next call is captured."""
    monkeypatch.setattr(timing, "why_not_captured", lambda call: "")
    before, x = torch.cuda.current_stream(), torch.ones(1000, device=device)

    def call() -> None:
        x.sum()
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()

    got = time_calls({"x": [call]}, device, seconds=0.01)["x"]
    assert got.graph is None and "captur" in got.no_graph and got.median > 0
    assert torch.cuda.current_stream() == before
    torch.cuda.empty_cache()
    got = time_calls({"y": [lambda: x * 2]}, device, seconds=0.01)["y"]
    assert got.graph is not None and got.no_graph == ""
