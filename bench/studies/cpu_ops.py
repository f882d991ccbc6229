"""An FP8 Linear with the cast of its input on a CPU, against F.linear and vLLM.

    python -m bench.studies.cpu_ops [--seconds 0.3] [--keep] [--folder DIR]

The calls alternate in one run. The weights rotate and exceed the last-level cache. No speed is
printed for a provider whose result differs from the product of the weights before their cast.
vLLM's CPU kernel is timed in turn, in a process of its own, where its library is found
(DEEPKERN_VLLM_CPU names the file). `python -m bench op` compares single ops.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from torch import Tensor

import deepkern
from deepkern.testing import vllm_cpu
from deepkern.testing.compare import diff
from deepkern.testing.costs import Cost, tensor_bytes
from deepkern.testing.timing import time_calls

from .. import ceilings, machine, report, results, summary
from ..command_line import FOLDER, KEEP, SECONDS, bar, screen
from ..timings import Request, Row, Speed, finished

BF16 = torch.bfloat16
WEIGHT_BYTES = 512 << 20  # of the rotated weights of each provider
PRODUCTS = ((2048, 7168), (7168, 4096), (7168, 2048))  # N, K of DeepSeek-V3
ROWS = (1, 4, 16, 64, 256)
TOLERANCE = 2e-3  # diff of a product of FP8 codes to the same in fp32; 6e-4 was measured
ABOUT = {
    "deepkern cpu": "",
    "linear_bf16": "F.linear in bf16",
    "linear_fp32": "F.linear in fp32",
    "vllm": "vLLM's fp8_scaled_mm_cpu with packed weights, in a process of its own",
}


def rows(request: Request) -> Iterator[Row]:
    for N, K in PRODUCTS:
        weights = [torch.randn(N, K) * K**-0.5 for _ in range(-(-WEIGHT_BYTES // (4 * N * K)))]
        for M in ROWS:
            yield row(torch.randn(M, K).to(BF16), weights, request)


def row(x: Tensor, weights: list[Tensor], request: Request) -> Row:
    """x [M, K] times each of the fp32 weights [N, K]."""
    calls = providers(x, weights)
    q, scale = deepkern.cast_per_block(weights[0])
    (M, K), N = x.shape, len(q)
    work = Cost(tensor_bytes(x, q, scale) + 2 * M * N, 2 * M * N * K, fp8=True)
    label = Speed("fp8_linear", f"M={M} N={N} K={K}", "study", "", tolerance=TOLERANCE)
    want, speeds = x.float() @ weights[0].T, {}
    for name, variants in calls.items():
        speeds[name] = judged(label, name, diff(variants[0](), want))
    passed = {name: calls[name] for name, speed in speeds.items() if speed.ok}
    timings = time_calls(passed, request.device, request.seconds)
    if vllm := vllm_cpu.fp8_linear(x, q, scale):
        speeds["vllm"] = judged(label, "vllm", diff(vllm.output(), want))
        if speeds["vllm"].ok:
            timings["vllm"] = vllm.time(request.seconds, len(calls["deepkern cpu"]))
    return [finished(speed, timings.get(name), work, request) for name, speed in speeds.items()]


def judged(label: Speed, name: str, error: float) -> Speed:
    ok = error <= TOLERANCE
    note = "" if ok else f"not timed: diff {error:.3g} > {TOLERANCE:.0e}"
    return replace(label, provider=name, about=ABOUT[name], ok=ok, error=error, note=note)


def providers(x: Tensor, weights: list[Tensor]) -> dict[str, list[Callable[[], Tensor]]]:
    """The calls of each provider, one per weight; copies fill WEIGHT_BYTES in each dtype."""

    def ours(q: Tensor, scale: Tensor) -> Callable[[], Tensor]:
        return lambda: deepkern.fp8_gemm_nt(*deepkern.cast_per_token(x), q, scale)

    def linear(x: Tensor, w: Tensor) -> Callable[[], Tensor]:
        return lambda: F.linear(x, w)

    fp8 = [deepkern.cast_per_block(w) for w in weights for _ in range(4)]
    x32 = x.float()
    return {
        "deepkern cpu": [ours(q, scale) for q, scale in fp8],
        "linear_bf16": [linear(x, w.to(BF16)) for w in weights for _ in range(2)],
        "linear_fp32": [linear(x32, w) for w in weights],
    }


def run(
    seconds: float = 0.3,
    keep: bool = False,
    folder: Path = results.FOLDER,
    console: Console | None = None,
) -> int:
    """Measures, prints, and writes the results; 1 if deepkern's result is wrong."""
    console, about, device = console or screen(), machine.describe(), torch.device("cpu")
    rates = ceilings.measure(device)
    request, measured = Request(device, rates, seconds=seconds), []
    with torch.inference_mode(), bar(console, "measuring", len(PRODUCTS) * len(ROWS)) as step:
        for speeds in rows(request):
            measured.append(speeds)
            step(speeds[0].size)
    console.print(report.ceilings(rates), report.timed(measured, "linear_bf16"))
    file = results.path(about, keep, folder)
    file = file.with_stem(f"{file.stem}-cpu-ops")
    records = [{"kind": "machine", **about, "ceilings": rates.record()}]
    records += [speed.record() for speed in itertools.chain(*measured)]
    results.write(records, file)
    console.print(f"written: {file}", soft_wrap=True)
    return 1 if summary.failures(records) else 0


def main(seconds: float = SECONDS, keep: bool = KEEP, folder: Path = FOLDER) -> None:
    """Times an FP8 Linear on this CPU against PyTorch's."""
    raise typer.Exit(run(seconds, keep, folder))


if __name__ == "__main__":
    typer.run(main)
