"""`python -m bench cost`: the figures of the cost report, the published ones, and what follows.

The published figures, with their sources, are constants here; everything else comes from
`bench.cost`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import typer

from model.config import Config
from model.presets import PRESETS

from . import cost, results
from .command_line import screen
from .cost import Assumptions, Layout, Serving, Training
from .gpus import GPUS, H100, Gpu, named
from .listing import Listing
from .op_times import OpTimes
from .results import write_text

PRESET = "deepseek-v3"
REFERENCE = "H800"  # the GPU that DeepSeek trained and served on
V3_LAYOUT = Layout("fp8", pp=16, ep=64)  # section 3.2 of the report

# DeepSeek-V3 report (arXiv:2412.19437), table 1 and section 1; README of deepseek-ai/DeepSeek-V3.
V3_HOURS_PER_TRILLION, V3_PRETRAINING, V3_TOTAL, V3_TRILLIONS = 180e3, 2.664e6, 2.788e6, 14.8
# deepseek-ai/open-infra-index, 202502OpenSourceWeek/day_6_one_more_thing_...overview.md: one day.
NODE_PREFILL, NODE_DECODE = 73.7e3, 14.8e3  # tokens/s of a node of 8 H800
INPUT_TOKENS, CACHED_TOKENS, OUTPUT_TOKENS = 608e9, 342e9, 168e9
DAILY_COST, DAILY_REVENUE = 87_072, 562_027
# meta-llama/llama-models, models/llama3_1/MODEL_CARD.md: H100-hours; 15 trillion tokens or more.
LLAMA_HOURS, LLAMA_TRILLIONS, LLAMA_PARAMETERS = 30.84e6, 15, 405e9


@dataclass(frozen=True)
class Row:
    """One GPU; None where no layout fits into memory."""

    gpu: Gpu
    training: Training | None
    prefill: Serving | None
    decode: Serving | None
    least_training: Layout | None
    least_serving: Layout | None


@dataclass(frozen=True)
class Report:
    preset: str
    assumptions: Assumptions
    rows: list[Row]

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.gpu.name == name), None)

    @property
    def config(self) -> Config:
        return Config.preset(self.preset)


@dataclass(frozen=True)
class Comparisons:
    """V3 on the H800: in the report's layout, in bf16, and with an H100's NVLink."""

    v3: Training
    bf16: Training | None
    h100: Training

    @property
    def ratio(self) -> float:
        """Predicted over published GPU-hours."""
        return self.v3.hours_per_trillion / V3_HOURS_PER_TRILLION


def check_preset(name: str) -> str:
    """The name; raises ValueError for an unknown preset."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(sorted(PRESETS))}")
    return name


def row(preset: str, gpu: Gpu, a: Assumptions, folder: Path = results.FOLDER) -> Row:
    times = OpTimes(gpu, folder)
    return Row(
        gpu,
        cost.cheapest_training(preset, times, a),
        cost.cheapest_prefill(preset, times, a),
        cost.cheapest_decode(preset, times, a),
        None if Config.preset(preset).is_sparse else cost.least_training(preset, gpu, a),
        cost.least_serving(preset, gpu, a),
    )


def report(
    preset: str = PRESET,
    gpus: Sequence[Gpu] = tuple(GPUS.values()),
    a: Assumptions | None = None,
    folder: Path = results.FOLDER,
) -> Report:
    a = a or Assumptions()
    return Report(check_preset(preset), a, [row(preset, gpu, a, folder) for gpu in gpus])


def comparisons(a: Assumptions, folder: Path = results.FOLDER) -> Comparisons:
    gpu = GPUS[REFERENCE]
    times = OpTimes(gpu, folder)
    in_bf16 = replace(gpu, arch=replace(gpu.arch, fp8_tflops=0))
    return Comparisons(
        cost.train(PRESET, times, V3_LAYOUT, a),
        cost.cheapest_training(PRESET, OpTimes(in_bf16, folder), a),
        cost.train(PRESET, OpTimes(H100, folder), V3_LAYOUT, a),
    )


def day_cost(prefill: Serving, decode: Serving) -> float:
    """Dollars of the published day's tokens at these rates, without the cached ones."""
    computed = INPUT_TOKENS - CACHED_TOKENS
    return (
        computed * prefill.dollars_per_million + OUTPUT_TOKENS * decode.dollars_per_million
    ) / 1e6


def limit(step: Training | Serving) -> str:
    """What takes longest in a step."""
    if step.communication > step.computing:
        return "the links"
    part = next(iter(step.compute.by(1)))
    return f"computation, most of it in `{part}`"


def overlap(step: Serving) -> str:
    """What the exchanges overlap with."""
    return "two half-batches" if step.overlap else "none"


# The conclusion, from the numbers.


def fewer_resources(found: Report, compared: Comparisons) -> list[str]:
    """How far fewer resources V3 needs, and what makes the difference."""
    p = cost.parameters(found.config, prediction=False)
    active = forward_parameters(found.config)
    llama = LLAMA_HOURS / LLAMA_TRILLIONS
    lines = [
        f"A trillion tokens took DeepSeek {V3_HOURS_PER_TRILLION / 1e3:.0f}K H800-hours, and Meta "
        f"{llama / 1e6:.2f}M H100-hours for Llama 3.1 405B: "
        f"{llama / V3_HOURS_PER_TRILLION:.0f}x fewer (both published).",
        f"Most of it is sparsity: a token uses {active / 1e9:.0f}B of {p.total / 1e9:.0f}B "
        f"parameters, {LLAMA_PARAMETERS / active:.0f}x fewer than the dense model's 405B.",
    ]
    if compared.bf16:
        ratio = compared.bf16.hours_per_trillion / compared.v3.hours_per_trillion
        lines.append(f"FP8 is the next: with the bf16 kernels the same H800s need {ratio:.1f}x the "
                     "GPU-hours (predicted).")  # fmt: skip
    ratio = compared.v3.hours_per_trillion / compared.h100.hours_per_trillion
    slower = "nothing" if ratio < 1.005 else f"{ratio - 1:.0%}"
    v3 = compared.v3
    lines.append(
        f"The H800's slower NVLink costs {slower} against an H100's in this layout: exchanges take "
        f"{v3.communication:.2f} s per micro-batch and overlap with {v3.computing:.2f} s of "
        "computation (predicted)."
    )
    return lines


def forward_parameters(c: Config) -> float:
    """Parameters that a token is multiplied with in the main model, head included."""
    p = cost.parameters(c, prediction=False)
    used = c.num_experts_per_tok / c.n_routed_experts if c.n_routed_experts else 0
    return p.experts * used + p.dense + p.vocabulary / 2


def other_gpus(found: Report) -> list[str]:
    """What each other GPU is good for, in hours and dollars compared with the H800."""
    base = found.row(REFERENCE)
    return [other_gpu(row, base) for row in found.rows if base and row is not base]


def other_gpu(row: Row, base: Row) -> str:
    kinds = {
        "training": (row.training, base.training),
        "prefill": (row.prefill, base.prefill),
        "decoding": (row.decode, base.decode),
    }
    hours = {kind: (own.step / own.tokens) / (other.step / other.tokens)
             for kind, (own, other) in kinds.items() if own and other}  # fmt: skip
    if not hours:
        return f"{row.gpu.name}: no layout of this model fits."
    price = row.gpu.price / base.gpu.price
    dollars = {kind: ratio * price for kind, ratio in hours.items()}
    best = min(dollars, key=lambda kind: dollars[kind])
    texts = [f"{kind} {hours[kind]:.1f}x the GPU-hours and {dollars[kind]:.1f}x the dollars"
             for kind in hours]  # fmt: skip
    cheaper = [kind for kind in hours if dollars[kind] < 0.95]
    verdict = f"cheaper for {', '.join(cheaper)}" if cheaper else f"dearer, least so for {best}"
    least = f"; at least {row.least_serving.gpus} GPUs hold it" if row.least_serving else ""
    bound = f"; training is limited by {limit(row.training)}" if row.training else ""
    return f"{row.gpu.name}, compared with an H800: {', '.join(texts)}: {verdict}{least}{bound}."


def conclusion(found: Report, compared: Comparisons | None) -> list[str]:
    return (fewer_resources(found, compared) if compared else []) + other_gpus(found)


# Terminal and JSON.


def arithmetic(gpu: Gpu, layout: Layout) -> str:
    """Which numbers and which tensor cores."""
    if layout.path == "bf16":
        return "bf16"
    return "FP8" if gpu.fp8_tensor_cores else "FP8 weights, bf16 products"


def show(found: Report) -> list[Listing]:
    training = Listing(f"Training {found.preset}: a trillion tokens")
    training.add_columns("GPU")
    training.add_columns("K GPU-hours", "K dollars", "least GPUs", numeric=True)
    training.add_columns("layout", "arithmetic", "op times")
    serving = Listing(f"Serving {found.preset}")
    serving.add_columns("GPU", "step")
    serving.add_columns("tokens/s/GPU", "$ per M tokens", "batch", numeric=True)
    serving.add_columns("layout", "arithmetic", "overlap", "limit", "op times")
    for r in found.rows:
        if t := r.training:
            least = str(r.least_training.gpus) if r.least_training else "-"
            training.add_row(r.gpu.name, f"{t.hours_per_trillion / 1e3:,.0f}",
                             f"{t.dollars_per_trillion / 1e3:,.0f}", least,
                             f"PP{t.layout.pp} x EP{t.layout.ep}, {t.layout.recompute} recompute",
                             arithmetic(r.gpu, t.layout), t.compute.provenance)  # fmt: skip
        else:
            reason = "not counted: indexer" if found.config.is_sparse else "does not fit"
            training.add_row(r.gpu.name, *[""] * 6, note=reason)
        for kind, s in (("prefill", r.prefill), ("decode", r.decode)):
            if s is None:
                serving.add_row(r.gpu.name, kind, *[""] * 8, note="does not fit")
                continue
            serving.add_row(r.gpu.name, kind, f"{s.tokens_per_second:,.0f}",
                            f"{s.dollars_per_million:.3f}", f"{s.tokens:,}",
                            f"PP{s.layout.pp} x EP{s.layout.ep}", arithmetic(r.gpu, s.layout),
                            overlap(s), limit(s).replace("`", ""),
                            s.compute.provenance)  # fmt: skip
    return [training, serving]


def record(found: Report) -> dict:
    """The report for JSON; every figure with its provenance."""

    def step(s: Training | Serving | None, **more: float) -> dict | None:
        if s is None:
            return None
        kept = {"layout": asdict(s.layout), "memory_gb": s.memory, "seconds": s.step,
                "computing_seconds": s.computing, "communication_seconds": s.communication,
                "op_seconds": s.compute.by(1), "provenance": s.compute.by(2)}  # fmt: skip
        if isinstance(s, Serving):
            kept["overlap"] = overlap(s)
        return {**more, **kept}

    return {
        "preset": found.preset,
        "assumptions": asdict(found.assumptions),
        "gpus": [
            {
                "gpu": r.gpu.name,
                "dollars_per_hour": r.gpu.price,
                "price": r.gpu.price_source,
                "training": r.training and step(
                    r.training, hours_per_trillion=r.training.hours_per_trillion,
                    dollars_per_trillion=r.training.dollars_per_trillion),
                "prefill": r.prefill and step(
                    r.prefill, tokens_per_second=r.prefill.tokens_per_second),
                "decode": r.decode and step(r.decode, tokens_per_second=r.decode.tokens_per_second),
                "least_training_gpus": r.least_training and r.least_training.gpus,
                "least_serving_gpus": r.least_serving and r.least_serving.gpus,
            }
            for r in found.rows
        ],
    }  # fmt: skip


def run(preset: str, names: Sequence[str], out: Path | None, write: bool) -> int:
    """The command: tables and conclusion, a JSON file, docs/cost.md with its picture."""
    try:
        gpus = [named(name) for name in names] or [*GPUS.values()]
        check_preset(preset)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if write and (preset != PRESET or names):
        raise typer.BadParameter(f"--write is for {PRESET} and all GPUs")
    console, found = screen(), report(preset, gpus)
    console.print(*show(found))
    compared = comparisons(found.assumptions) if preset == PRESET else None
    for line in conclusion(found, compared):
        console.print(f"- {line.replace('`', '')}", markup=False, soft_wrap=True, highlight=False)
    console.print("predicted and assumed: nothing has run on a GPU, unless op times say measured",
                  style="dim")  # fmt: skip
    if out is not None:
        write_text(json.dumps(record(found), indent=1) + "\n", out)
    if write and compared is not None:
        from . import cost_page

        cost_page.write(found, compared)
        console.print(f"written: {cost_page.PAGE}, {cost_page.PICTURE.name}", soft_wrap=True)
    return 0
