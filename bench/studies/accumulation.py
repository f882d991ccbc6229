"""The error of FP8 products on Hopper's tensor core, which keeps 14 bits of a sum.

    python -m bench.studies.accumulation [--keep] [--folder DIR]

Hopper adds FP8 products in fixed point. It aligns 32 products and the sum so far to the largest
exponent, drops the bits below 2^-13 of it, and truncates the result to 13 fraction bits. The sums
are those of csrc/ptx/tensor_core.cpp, which the emulator of csrc/sm90 and the PTX machine use. We
promote the sum to float32 every 32, 128 or 256 values of K, or never, and compare with float64 on
the same FP8 values. With a GPU, its result for the same operands is added.

Source of the model: MMA-Sim (arXiv 2511.10909), which its authors found equal to an H100 bit for
bit. DeepSeek-V3 report (arXiv 2412.19437) 3.5.2, "14 bits", and SageAttention2 (arXiv 2411.10958),
an accumulator of 1 + 8 + 13 bits, agree.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import typer
from rich.console import Console
from torch import Tensor

import deepkern
from deepkern import reference
from deepkern.runtime import ptx_library
from deepkern.testing.compare import TOLERANCE, diff

from .. import machine, results
from ..command_line import FOLDER, KEEP, bar, screen
from ..listing import Listing

ROWS = 64  # of both operands
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
NEVER = 1 << 30
E4M3, WGMMA = 3, 1  # ptx::Element, ptx::Unit
VALUES: dict[str, Callable[[Tensor], Tensor]] = {"normal": lambda x: x, "positive": torch.abs}


def wgmma(a: Tensor, b: Tensor, sums: Tensor) -> Tensor:
    """sums [M, N] + a [M, K] · b [N, K]ᵀ of e4m3 codes by WGMMAs of 32 columns, as on Hopper."""
    a, b, sums = a.contiguous(), b.contiguous(), sums.float().clone()
    addresses = [ctypes.c_void_p(x.data_ptr()) for x in (a, b, sums)]
    failed = ptx_library.library().deepkern_ptx_test_multiply(
        len(a), len(b), a.shape[1], E4M3, E4M3, *addresses, 90, WGMMA, 0
    )
    assert not failed
    return sums


def product(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, promotion: int, exact: bool = False
) -> Tensor:
    """float32 a · bᵀ of FP8 values; scales and promotion are per `promotion` columns of K.

    The sums between promotions are Hopper's, or exact.
    """
    out = torch.zeros(len(a), len(b), dtype=torch.float32)
    for i, first in enumerate(range(0, a.shape[1], promotion)):
        x, y = (t[:, first : first + promotion] for t in (a, b))
        sum = (x.double() @ y.double().T).float() if exact else wgmma(x, y, torch.zeros_like(out))
        scale = (a_scale[:, i : i + 1] * b_scale[:, i]).double()  # one float32 product
        out = (sum.double() * scale + out.double()).float()  # a fused multiply-add
    return out


@dataclass(frozen=True)
class Error:
    """The error of one way to add, to float64 on the same FP8 values."""

    values: str  # the operands before the cast
    scales: str  # "1" (the codes alone), "fp32" or "ue8m0", one per 1x128 of both
    K: int
    way: str  # how the products are added
    diff: float  # docs/numerics.md defines it; of the float32 result
    diff_bf16: float  # of the result rounded to bfloat16
    largest: float  # largest |error| over the root mean square of the exact result

    def record(self) -> dict:
        return {"kind": "accumulation", **asdict(self)}


def errors(values: str, K: int, seed: int = 0) -> Iterator[Error]:
    """Every way to add, for operands [ROWS, K] of one kind of values."""
    generator = torch.Generator().manual_seed(seed)
    real = [VALUES[values](torch.randn(ROWS, K, generator=generator)) for _ in range(2)]

    def error(scales: str, way: str, got: Tensor, exact: Tensor) -> Error:
        largest = (got.double() - exact).abs().max() / exact.square().mean().sqrt()
        return Error(values, scales, K, way, diff(got, exact), diff(got.bfloat16(), exact),
                     largest.item())  # fmt: skip

    (a, _), (b, _) = (reference.cast_per_token(x) for x in real)
    exact = a.double() @ b.double().T
    for promotion in (32, 128, 256, NEVER):
        ones = torch.ones(ROWS, -(-K // promotion))
        interval = "never" if promotion == NEVER else f"every {promotion}"
        got = product(a, ones, b, ones, promotion)
        yield error("1", f"promoted {interval}", got, exact)
    ones = torch.ones(ROWS, K // 128)
    yield error("1", "float32", product(a, ones, b, ones, 128, exact=True), exact)

    for scales in ("fp32", "ue8m0"):
        operands = [x for pair in (reference.cast_per_token(x, scales) for x in real) for x in pair]
        exact = dequantised(*operands[:2]) @ dequantised(*operands[2:]).T
        yield error(scales, "promoted every 128", product(*operands, 128), exact)
        yield error(scales, "float32", product(*operands, 128, exact=True), exact)
        if torch.cuda.is_available():
            got = deepkern.fp8_gemm_nt(*(x.cuda() for x in operands), torch.float32).cpu()
            yield error(scales, f"measured on {torch.cuda.get_device_name()}", got, exact)
        yield error(scales, "the cast to FP8", exact, real[0].double() @ real[1].double().T)


def dequantised(q: Tensor, scale: Tensor) -> Tensor:
    return q.double() * scale.double().repeat_interleave(128, 1)


def table(records: list[Error], values: str) -> Listing:
    bounds = ", ".join(
        f"{TOLERANCE[t]:.0e} for {str(t)[6:]}" for t in (torch.float32, torch.bfloat16)
    )
    view = Listing(f"{values} values: diff / largest error over rms (allowed: diff {bounds})")
    view.add_columns("scales, sum")
    view.add_columns(*(f"K = {K}" for K in LENGTHS), numeric=True)
    rows: dict[str, list[str]] = {}
    for e in records:
        if e.values == values:
            rows.setdefault(f"{e.scales}, {e.way}", []).append(f"{e.diff:.1e} / {e.largest:.1e}")
    for label, cells in rows.items():
        view.add_row(label, *cells)
    return view


def draw(about: dict, records: list[Error], file: Path) -> None:
    """Writes a PNG: diff over K, one panel for each kind of values."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = {(e.scales, e.way) for e in records if e.scales == "1"} | {("fp32", "the cast to FP8")}
    figure, axes = plt.subplots(
        1, len(VALUES), figsize=(13, 5.5), layout="constrained", sharey=True
    )
    for view, values in zip(axes, VALUES, strict=True):
        lines: dict[str, list[Error]] = {}
        for e in records:
            if e.values == values and (e.scales, e.way) in shown:
                lines.setdefault(e.way, []).append(e)
        for way, line in lines.items():
            view.plot([e.K for e in line], [e.diff for e in line], marker=".", label=way)
        for dtype in (torch.float32, torch.bfloat16):
            view.axhline(TOLERANCE[dtype], color="black", linewidth=0.8)
            view.annotate(f"allowed, {str(dtype)[6:]} out", (LENGTHS[0], TOLERANCE[dtype]),
                          (0, 2), textcoords="offset points", fontsize=7)  # fmt: skip
        view.set(xscale="log", yscale="log", xlabel="K", title=f"{values} values")
        view.set_xticks(LENGTHS, [str(K) for K in LENGTHS])
    axes[0].set_ylabel("diff to float64 on the same FP8 values")
    axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    where = f"deepkern at {about['commit']} · torch {about['torch']}"
    figure.suptitle(f"Emulated: FP8 sums that keep 14 bits · {where}", fontsize=10)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def run(
    keep: bool = False,
    lengths: tuple[int, ...] = LENGTHS,
    folder: Path = results.FOLDER,
    console: Console | None = None,
) -> int:
    """Emulates, prints, and writes figures and a picture."""
    console, about, records = console or screen(), machine.describe(), []
    with bar(console, "adding", len(VALUES) * len(lengths)) as step:
        for values in VALUES:
            for K in lengths:
                records += errors(values, K)
                step(f"{values}, K = {K}")
    console.print(*(table(records, values) for values in VALUES))
    file = results.path(about, keep, folder)
    file = file.with_stem(f"{file.stem}-accumulation")
    results.write([{"kind": "machine", **about}, *(e.record() for e in records)], file)
    draw(about, records, file.with_suffix(".png"))
    console.print(f"written: {file}, {file.with_suffix('.png').name}", soft_wrap=True)
    return 0


def main(
    keep: bool = KEEP,
    folder: Path = FOLDER,
) -> None:
    """Emulates the tensor core's sums of FP8 products: why they are promoted every 128 values."""
    raise typer.Exit(run(keep, folder=folder))


if __name__ == "__main__":
    typer.run(main)
