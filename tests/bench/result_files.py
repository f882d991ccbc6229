"""Results of schema 2 for tests: records and files."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path

from bench import results

MACHINE = {
    "kind": "machine", "schema": 2, "command": "python -m bench op fp8_gemm_nt",
    "time": "2026-11-30T09:00:00+00:00", "cpu": "AMD EPYC", "cores": 2, "threads": 2,
    "isa": ["avx2"], "torch_isa": "AVX2", "gpu": None, "system": "Linux", "python": "3.11.7",
    "torch": "2.13.0+cpu", "triton": "3.7.1", "deepkern": "0.1.0", "commit": "0123456789ab",
    "driver": None, "clocks": None,
    "ceilings": {"copy_gb_per_s": 20.0, "matmul_tflops": {"fp32": 0.1}},
}  # fmt: skip
GPU = {**MACHINE, "gpu": {"name": "NVIDIA H200"}}
SPEED = {
    "kind": "speed", "op": "fp8_gemm_nt", "size": "M=64", "shapes": "default",
    "provider": "deepkern cpu", "about": "", "ok": True, "error": 1e-7, "tolerance": 2e-5,
    "note": "", "samples": [10.0, 11.0], "least": 10.0, "median": 10.5, "spread": 0.05,
    "calls": 20, "graph": None, "host": None, "bytes": 1000, "flops": 2000, "fp8": True,
    "gb_per_s": 0.1, "tflops": 2e-4, "roof_us": 5.0, "roof_share": 0.5, "limit": "memory",
}  # fmt: skip
EAGER = {**SPEED, "provider": "eager", "about": "dequantize, F.linear"}
CHECK = {
    "kind": "check", "op": "fp8_gemm_nt", "backend": "cpu", "size": "M=1", "against": "oracle",
    "ok": True, "error": 1e-7, "tolerance": 1e-6, "note": "",
}  # fmt: skip
VERDICT = {"kind": "verdict", "disagreements": 1, "seconds": 3.5}


def written(file: Path, *records: dict, machine: dict = MACHINE) -> Path:
    results.write([machine, *records], file)
    return file


def speed(provider: str, samples: Iterable[float], **more) -> dict:
    """A record with these microseconds."""
    times = [*map(float, samples)]
    measured = {"samples": times, "least": min(times), "median": statistics.median(times)}
    return {**SPEED, "provider": provider, **measured, **more}


def failed(provider: str, note: str, **more) -> dict:
    """A record of a call whose check failed."""
    absent = dict.fromkeys(("least", "median", "spread"))
    return {
        **SPEED,
        "provider": provider,
        "ok": False,
        "note": note,
        "samples": [],
        **absent,
        **more,
    }


def rate(name: str, value: float, unit: str = "tokens/s") -> dict:
    return {"kind": "model", "name": name, "value": value, "unit": unit, "ok": None, "note": ""}
