"""Results of schema 2 that no machine measured, for tests of their readers.

`records(GPU)` has the checks, speeds and model figures of a run of all ops; the times follow from
crude costs, ceilings and a generator's noise. `python -m tests.bench.synthetic_results FOLDER`
writes results of a CPU and a GPU over three commits.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import deepkern
from bench import results
from bench.checks import text
from deepkern.testing.ops import facts

# A few ops of all families.
OPS = ("cast_per_token", "fp8_gemm_nt", "mla_decode", "route_topk", "route_topk_backward")
PRODUCTS = ("gemm", "mla_decode", "mla_prefill", "mla_sparse", "mqa_logits", "moe_forward")


@dataclass(frozen=True)
class Device:
    """A machine line's differences, and the providers that it times."""

    gpu: dict | None
    ceilings: dict
    ours: tuple[str, ...]
    others: dict[str, str]
    overhead: float  # µs per call of deepkern
    machine: dict = field(default_factory=dict)


GPU = Device(
    gpu={"name": "NVIDIA H200", "target": "sm_90", "multiprocessors": 132, "memory_gib": 140,
         "runtime": "13.0"},
    ceilings={"copy_gb_per_s": 4120.0,
              "matmul_tflops": {"fp32": 51.2, "bf16": 742.0, "fp8": 1391.0}},
    ours=("deepkern cuda", "deepkern triton"),
    others={"eager": "dequantize both to bf16, F.linear", "compile": "the same, torch.compile",
            "scaled_mm": "torch._scaled_mm", "deep_gemm": "deep_gemm.fp8_gemm_nt"},
    overhead=4.0,
    machine={"driver": "580.95.05",
             "clocks": {"sm_mhz": 1980, "memory_mhz": 3201, "throttled": []}},
)  # fmt: skip
CPU = Device(
    gpu=None,
    ceilings={"copy_gb_per_s": 17.9, "matmul_tflops": {"fp32": 0.094, "bf16": 0.031}},
    ours=("deepkern cpu",),
    others={"eager": "dequantize both to bf16, F.linear", "compile": "the same, torch.compile",
            "linear_bf16": "F.linear of bf16 weights"},
    overhead=3.0,
)  # fmt: skip


def machine(device: Device, when: str, commit: str) -> dict:
    """The machine line of a run at `when` (ISO 8601)."""
    return {
        "kind": "machine", "schema": results.SCHEMA, "time": when, "commit": commit,
        "command": "python -m bench --keep", "cpu": "AMD EPYC", "cores": 2, "threads": 2,
        "isa": ["avx2"], "torch_isa": "AVX2", "memory_gib": 24, "gpu": device.gpu,
        "system": "Linux 6.18", "python": "3.12.3", "torch": "2.13.0", "triton": "3.7.1",
        "deepkern": "0.1.0", "interpreted_triton": device.gpu is None,
        "backends": {"cpu": "42 of 42 ops"}, "driver": None, "clocks": None,
        "ceilings": device.ceilings, **device.machine,
    }  # fmt: skip


def numbers(size: dict) -> float:
    """The elements that a call works on, roughly: the product of its extents."""
    total = 1.0
    for value in size.values():
        if isinstance(value, tuple):
            total *= max(sum(value), 1)
        elif isinstance(value, int) and not isinstance(value, bool):
            total *= value
    return total


def cost(op: str, size: dict) -> tuple[int, int]:
    """Crude (bytes, FLOPs) of a call."""
    n = numbers(size)
    if not any(word in op for word in PRODUCTS):
        return int(3 * n) + 4096, 0
    rows = next((size[name] for name in ("M", "T", "S", "B") if name in size), 1)
    return int(n / rows + n**0.6) + 4096, int(2 * n)


def speed(op: str, size: dict, device: Device, provider: str, noise: random.Random) -> dict:
    """A timed provider."""
    moved, flops = cost(op, size)
    fp8 = "fp8" in op
    rates = device.ceilings["matmul_tflops"]
    memory = moved / device.ceilings["copy_gb_per_s"] / 1e3
    compute = flops / rates["fp8" if fp8 and "fp8" in rates else "bf16"] / 1e6
    roof = max(memory, compute)
    slower = 1.0 if provider.startswith("deepkern") else noise.lognormvariate(0.6, 0.7)
    start = device.overhead * (1 if provider.startswith("deepkern") else 2)
    typical = (roof / noise.uniform(0.45, 0.9) + start) * slower
    samples = [typical * (1 + noise.expovariate(40)) for _ in range(15)]
    least, median = min(samples), statistics.median(samples)
    quartiles = statistics.quantiles(samples, n=4)
    chosen = median if device.gpu else least
    return {
        **untimed(op, size, provider, device.others.get(provider, "")), "ok": True, "note": "",
        "error": 1.2e-7, "tolerance": 2e-5, "samples": samples, "least": least, "median": median,
        "spread": (quartiles[2] - quartiles[0]) / median, "calls": 480,
        "graph": least * 0.9 if device.gpu else None, "host": start if device.gpu else None,
        "bytes": moved, "flops": flops, "fp8": fp8, "gb_per_s": moved / chosen / 1e3,
        "tflops": flops / chosen / 1e6 if flops else None, "roof_us": roof,
        "roof_share": roof / chosen, "limit": "memory" if memory >= compute else "compute",
    }  # fmt: skip


def untimed(op: str, size: dict, provider: str, about: str = "", note: str = "") -> dict:
    """A provider without a time, for the reason `note`."""
    moved, flops = cost(op, size)
    nothing = dict.fromkeys(("error", "tolerance", "least", "median", "spread", "graph", "host",
                             "gb_per_s", "tflops", "roof_us", "roof_share", "limit"))  # fmt: skip
    return {
        "kind": "speed", "op": op, "size": text(size), "shapes": "default", "provider": provider,
        "about": about, "ok": None, "note": note, "samples": [], "calls": 0, **nothing,
        "bytes": moved, "flops": flops, "fp8": "fp8" in op,
    }  # fmt: skip


def speeds(op: str, device: Device, noise: random.Random) -> list[dict]:
    """All providers at all sizes; an op without products has no `scaled_mm` and `deep_gemm`."""
    found = []
    for size in facts(op).SIZES.gpu if device.gpu else facts(op).SIZES.cpu:
        for provider in (*device.ours, *device.others):
            if provider in ("scaled_mm", "linear_bf16", "deep_gemm") and "gemm" not in op:
                continue
            if provider == "deepkern cuda" and not any(word in op for word in PRODUCTS):
                continue
            if provider == "deep_gemm":
                missing = "ModuleNotFoundError: No module named 'deep_gemm'"
                found.append(untimed(op, size, provider, device.others[provider], missing))
            else:
                found.append(speed(op, size, device, provider, noise))
    return found


def check(op: str, backend: str, size: dict, noise: random.Random) -> dict:
    """A check that passes."""
    exact = facts(op).EXACT
    tolerance = 0.0 if exact else 5e-6
    error = 0.0 if exact else tolerance * 10 ** noise.uniform(-6, -0.1)
    return {"kind": "check", "op": op, "backend": backend, "size": text(size), "against": "oracle",
            "ok": True, "error": error, "tolerance": tolerance, "note": ""}  # fmt: skip


def model() -> list[dict]:
    """Figures of the model, of each unit."""

    def figure(name: str, value: float | str, unit: str, ok: bool | None, note: str) -> dict:
        return {"kind": "model", "name": name, "value": value, "unit": unit, "ok": ok, "note": note}

    return [
        figure("prompt (its end)", "class Chunk:\n    def __init__(self):\n", "text", None, ""),
        figure("continuation", "        self.file = file\n", "text", None, "96 bytes, greedy"),
        figure("prefill, bf16", 5281.99, "tokens/s", None, "1 sequence, 384 bytes in"),
        figure("decode, bf16", 159.13, "tokens/s", None, "1 sequence, 384 bytes in"),
        figure("engine, batch 32", 3138.9, "tokens/s", None, "32 requests"),
        figure("held-out bits per byte, bf16", 1.2592, "bits", True, "+0.0005 to plain fp32"),
    ]  # fmt: skip


def records(
    device: Device,
    when: str = "2026-11-30T10:00:00+00:00",
    commit: str = "0123456789ab",
    seed: int = 0,
    ops: list[str] | None = None,
) -> list[dict]:
    """All records of a run: machine, checks, speeds, model, verdict."""
    noise = random.Random(seed)
    found = [machine(device, when, commit)]
    names = sorted(deepkern.OPS) if ops is None else ops
    backends = [name.split()[-1] for name in device.ours]
    for op in names:
        found += [check(op, b, size, noise) for b in backends for size in facts(op).SIZES.small]
    for op in names:
        found += speeds(op, device, noise)
    return [*found, *model(), {"kind": "verdict", "disagreements": 0, "seconds": 100.0}]


def run(
    device: Device = GPU,
    day: int = 1,
    ops: Sequence[str] = OPS,
    change: Callable[[list[dict]], object] | None = None,
) -> results.Run:
    """A synthetic run on a day of December, after `change` of its records."""
    found = records(device, f"2026-12-{day:02}T10:00:00+00:00", f"{day:012x}", day, list(ops))
    if change is not None:
        change(found)
    return results.Run(Path(f"{day}.jsonl"), found[0], found[1:])


def speeds_of(found: list[dict], op: str) -> list[dict]:
    return [r for r in found if r["kind"] == "speed" and r["op"] == op]


def main(folder: Path) -> None:
    for day, commit in enumerate(("aaaaaaaaaaaa", "bbbbbbbbbbbb", "cccccccccccc"), 1):
        for name, device in (("cpu-kept", CPU), ("nvidia-h200", GPU)):
            when = f"2026-12-{day:02}T10:00:00+00:00"
            file = folder / f"2026-12-{day:02}T10-00-00-{name}.jsonl"
            results.write(records(device, when, commit, seed=day), file)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
