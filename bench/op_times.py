"""How long an op call takes on a GPU: measured, predicted or assumed.

A call takes its roof (`bench.limits.roof`) over a share of it. The share is, in this order:

- measured: from the results in bench/results/ of a GPU of this name, at the nearest shape, if bytes
  and FLOPs differ by a factor of NEAR at most, both factors multiplied;
- predicted: the smaller one of ATTAINED and of what the limits of the compiled kernel allow
  (bench/predictions.json), at the nearest shape of this target;
- assumed: ATTAINED, where the op has no prediction for the target.

The nearest shape is the one whose logarithms of bytes and FLOPs differ least.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from deepkern.testing.costs import Cost

from . import limits, predictions, results
from .gpus import Gpu
from .op_calls import Call

MEASURED, PREDICTED, ASSUMED = "measured", "predicted", "assumed"
# Share of the peak rate that the best published kernel of each kind attains on an H100, H800 or
# H200; docs/performance.md has the sources.
ATTAINED = {
    "fp8_gemm_nt": (0.67, "DeepGEMM, 1168-1520 of 1979 TFLOPS"),
    "m_grouped_fp8_gemm_nt_contiguous": (0.68, "DeepGEMM, 1346 of 1979 TFLOPS"),
    "k_grouped_fp8_gemm_nt": (0.49, "DeepGEMM, 900-1044 of 1979 TFLOPS"),
    "mla_prefill": (0.65, "cuDNN, 643 of 989 TFLOPS"),
    "mla_prefill_backward": (0.45, "cuDNN, 442 of 989 TFLOPS"),
    "mla_decode": (0.62, "FlashMLA, 574-660 of 989 TFLOPS"),
    "mla_sparse_decode": (0.44, "FlashMLA with an FP8 cache, 410-460 of 989 TFLOPS"),
}
OTHER_PRODUCTS = (0.67, "as fp8_gemm_nt")
NEAR = 64.0
BANDWIDTH = (0.80, "DeepGEMM with few rows, 2668 of 3350 GB/s; casts 0.85-0.94 of a copy's 0.9")


class Sample(NamedTuple):
    """One shape of an op, and its measured or least predicted seconds."""

    cost: Cost
    seconds: float


class OpTime(NamedTuple):
    seconds: float  # of one call
    provenance: str


def attained(call: Call, gpu: Gpu) -> float:
    """The assumed share of the roof."""
    compute = limits.roof(call.cost._replace(bytes=0), gpu.arch)
    memory = limits.roof(Cost(call.cost.bytes), gpu.arch)
    return ATTAINED.get(call.op, OTHER_PRODUCTS)[0] if compute > memory else BANDWIDTH[0]


def distance(a: Cost, b: Cost) -> float:
    return sum(
        abs(math.log((x + 1) / (y + 1))) for x, y in ((a.bytes, b.bytes), (a.flops, b.flops))
    )


def nearest(cost: Cost, samples: Iterable[Sample]) -> Sample:
    """The sample of nearest shape, at the tensor cores' rate of `cost`."""
    sample = min(samples, key=lambda sample: distance(cost, sample.cost))
    return sample._replace(cost=sample.cost._replace(fp8=cost.fp8))


def measured_samples(gpu: Gpu, folder: Path = results.FOLDER) -> dict[str, list[Sample]]:
    """Op -> what the results of `python -m bench op` on this GPU say; the fastest backend's."""
    found: dict[str, dict[Cost, float]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        records = [json.loads(line) for line in file.read_text().splitlines()]
        if not any(is_this_gpu(record, gpu) for record in records):
            continue
        for record in records:
            if record.get("kind") == "speed" and is_timed(record):
                seconds = record["median"] / 1e6
                cost = Cost(record["bytes"], record["flops"], record["fp8"])
                fastest = found.setdefault(record["op"], {})
                fastest[cost] = min(seconds, fastest.get(cost, seconds))
    return {op: [Sample(*item) for item in fastest.items()] for op, fastest in found.items()}


def is_timed(record: dict) -> bool:
    """Whether this is a time of one of deepkern's backends, in the present schema."""
    return results.is_ours(record.get("provider", "")) and bool(record["samples"])


def is_this_gpu(record: dict, gpu: Gpu) -> bool:
    """Whether a record names the machine, and its GPU is this product."""
    name = ((record.get("gpu") or {}).get("name") or "") if record.get("kind") == "machine" else ""
    return set(gpu.name.lower().split()) <= set(name.lower().replace("-", " ").split())


def predicted_samples(gpu: Gpu, file: Path = predictions.FILE) -> dict[str, list[list[Sample]]]:
    """Op -> for each backend, the least seconds that the compiled kernel's limits allow."""
    found: dict[str, dict[str, list[Sample]]] = {}
    for record in predictions.load(file):
        if record["target"] == gpu.arch.name:
            sample = Sample(Cost(record["bytes"], record["flops"]), record["seconds"])
            found.setdefault(record["op"], {}).setdefault(record["backend"], []).append(sample)
    return {op: [*backends.values()] for op, backends in found.items()}


@dataclass
class OpTimes:
    """The times of op calls on one GPU."""

    gpu: Gpu
    folder: Path = results.FOLDER
    measured: dict[str, list[Sample]] = field(init=False)
    predicted: dict[str, list[list[Sample]]] = field(init=False)

    def __post_init__(self) -> None:
        self.measured = measured_samples(self.gpu, self.folder)
        self.predicted = predicted_samples(self.gpu)
        self.of = functools.cache(self._of)

    def _of(self, call: Call) -> OpTime:
        roof = limits.roof(call.cost, self.gpu.arch)
        near = [s for s in self.measured.get(call.op, ())
                if distance(call.cost, s.cost) <= math.log(NEAR)]  # fmt: skip
        if near:
            cost, seconds = nearest(call.cost, near)
            return OpTime(roof * seconds / limits.roof(cost, self.gpu.arch), MEASURED)
        share = attained(call, self.gpu)
        if call.op not in self.predicted:
            return OpTime(roof / share, ASSUMED)
        allowed = max(self.allowed(call, samples) for samples in self.predicted[call.op])
        return OpTime(roof / min(share, allowed), PREDICTED)

    def allowed(self, call: Call, samples: list[Sample]) -> float:
        """The largest share of the roof that the limits of one backend's kernel allow."""
        cost, seconds = nearest(call.cost, samples)
        roof = limits.roof(cost, self.gpu.arch)
        return roof / max(roof, seconds)

    def total(self, calls: Iterable[Call]) -> Time:
        time = Time()
        for call in calls:
            seconds, provenance = self.of(call)
            time.add(call.part, call.op, provenance, seconds * call.count)
        return time


@dataclass
class Time:
    """Seconds of a GPU's op calls, by part of the model, op and provenance."""

    entries: dict[tuple[str, str, str], float] = field(default_factory=dict)

    def add(self, part: str, op: str, provenance: str, seconds: float) -> None:
        key = part, op, provenance
        self.entries[key] = self.entries.get(key, 0.0) + seconds

    def __add__(self, other: Time) -> Time:
        both = Time(dict(self.entries))
        for key, seconds in other.entries.items():
            both.add(*key, seconds)
        return both

    @property
    def seconds(self) -> float:
        return sum(self.entries.values())

    def by(self, index: int) -> dict[str, float]:
        """Seconds by part (0), op (1) or provenance (2), the longest first."""
        sums: dict[str, float] = {}
        for key, seconds in self.entries.items():
            sums[key[index]] = sums.get(key[index], 0.0) + seconds
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    @property
    def provenance(self) -> str:
        """Such as "predicted 81 %, assumed 19 %"; one word if all is of one kind."""
        kinds = self.by(2)
        if len(kinds) == 1:
            return next(iter(kinds))
        return ", ".join(f"{kind} {s / self.seconds:.0%}" for kind, s in kinds.items())
