"""docs/cost.md and docs/cost.png, written from the figures: `python -m bench cost --write`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from . import steps
from .cost import Assumptions, Serving, Training
from .cost_report import (
    CACHED_TOKENS,
    DAILY_COST,
    DAILY_REVENUE,
    INPUT_TOKENS,
    NODE_DECODE,
    NODE_PREFILL,
    REFERENCE,
    V3_HOURS_PER_TRILLION,
    V3_PRETRAINING,
    V3_TOTAL,
    V3_TRILLIONS,
    Comparisons,
    Report,
    Row,
    arithmetic,
    conclusion,
    day_cost,
    forward_parameters,
    limit,
    overlap,
)
from .gpus import NODE
from .op_times import ATTAINED, BANDWIDTH, MEASURED, OTHER_PRODUCTS
from .results import write_text

DOCS = Path(__file__).parents[1] / "docs"
PAGE, PICTURE = DOCS / "cost.md", DOCS / "cost.png"
_INTRODUCTION = """\
# What a run would cost

<!-- Written by `python -m bench cost --write`; a test compares it with what the command gives. -->

{status} `python -m bench cost [PRESET]` computes this page from the preset's shapes: the ops of
one step, the bytes and FLOPs of each op by the formula that the roofs use, and the time of each.

- **measured**: from `bench/results` of that GPU, at a near shape.
- **predicted**: the roof over the smaller one of the share that the compiled kernel's limits allow
  (`bench/predictions.json`; CUDA C++ or Triton, the faster one) and of the share that the best
  published kernel attains.
- **assumed**: the roof over the published share alone, where no compiled kernel was profiled for
  the target; and every number under [assumptions](#assumptions).
- **published**: stated by others; the source is next to it.

All GPU-hours, tokens per second and dollars of the model are predictions. The column "op times"
says how their op times divide into the kinds above; prices and overlap are assumed in all of them.
Prices are of different years and providers: GPU-hours compare GPUs, dollars only these prices.
"""
_NOT_COUNTED = """\
## What is not counted

Launch gaps and the host, the latency of an exchange, waiting for the slowest GPU of a step except
by the imbalance above, restarts and evaluation runs, storage, CPUs, power outside the price of a
GPU-hour. Attention of other sequence lengths than stated. Speculative decoding with the prediction
layer. A cache of prompts. Redundant experts. int8: deepkern has no int8 products, so a GPU without
FP8 tensor cores computes in bf16, from bf16 or from FP8 weights, whichever is cheaper. Attained
shares are those of Hopper kernels; on other GPUs they are unverified, and on an MI300X probably too
high.
"""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    body = [*rows]
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def status(found: Report) -> str:
    steps_ = [s for r in found.rows for s in (r.training, r.prefill, r.decode) if s]
    measured = sorted({s.gpu.name for s in steps_ if MEASURED in s.compute.by(2)})
    if not measured:
        return "**Nothing on this page has run on a GPU.**"
    return f"**Op times of {', '.join(measured)} are measured; no whole step has run on a GPU.**"


def layout(step: Training | Serving) -> str:
    return f"PP{step.layout.pp} x EP{step.layout.ep}"


def training_table(found: Report) -> str:
    rows = []
    for r in found.rows:
        if (t := r.training) is None:
            rows.append([r.gpu.name, "does not fit", *[""] * 8])
            continue
        least = r.least_training
        smallest = f"{least.gpus} (PP{least.pp} x EP{least.ep})" if least else "-"
        rows.append([
            r.gpu.name, f"{t.hours_per_trillion / 1e3:,.0f}K",
            f"{t.dollars_per_trillion / 1e3:,.0f}K", arithmetic(r.gpu, t.layout),
            f"{layout(t)}, {t.layout.recompute}", f"{t.memory:.0f} of {r.gpu.memory:g}", smallest,
            f"{t.computing:.2f} / {t.communication:.2f} s", f"{t.utilization:.0%}",
            t.compute.provenance,
        ])  # fmt: skip
    head = ("GPU", "GPU-hours", "dollars", "arithmetic", "layout, recompute", "GB",
            "least GPUs", "computation / exchange", "of bf16 peak", "op times")  # fmt: skip
    return table(head, rows)


def serving_table(found: Report, decoding: bool) -> str:
    rows = []
    for r in found.rows:
        if (s := r.decode if decoding else r.prefill) is None:
            rows.append([r.gpu.name, "does not fit", *[""] * 10])
            continue
        batch = f"{s.tokens} sequences" if decoding else f"{s.tokens:,} tokens"
        least = r.least_serving
        rows.append([
            r.gpu.name, f"{s.tokens_per_second:,.0f}", f"{s.dollars_per_million:.3f}",
            arithmetic(r.gpu, s.layout), batch, layout(s), f"{s.memory:.0f} of {r.gpu.memory:g}",
            f"{least.gpus} (PP{least.pp} x EP{least.ep})" if least else "-",
            f"{1e3 * s.computing:.0f} / {1e3 * s.communication:.0f} ms",
            overlap(s), limit(s), s.compute.provenance,
        ])  # fmt: skip
    head = ("GPU", "tokens/s/GPU", "$ per M tokens", "arithmetic", "batch of a GPU", "layout", "GB",
            "least GPUs", "computation / exchange", "overlap", "limit", "op times")  # fmt: skip
    return table(head, rows)


def published_table(found: Report, compared: Comparisons) -> str:
    """The published figures next to the model's."""
    v3, row = compared.v3, found.row(REFERENCE)
    hours, gpu = v3.hours_per_trillion, v3.gpu
    rest = V3_TOTAL - V3_PRETRAINING
    total = hours * V3_TRILLIONS + rest
    missed = 1 - CACHED_TOKENS / INPUT_TOKENS
    lines = [
        ("H800-hours per trillion tokens", V3_HOURS_PER_TRILLION, hours, "{:,.0f}", "V3 report"),
        (f"H800-hours of {V3_TRILLIONS} trillion tokens", V3_PRETRAINING, hours * V3_TRILLIONS,
         "{:,.0f}", "V3 report"),
        (f"H800-hours in all, with {rest / 1e3:.0f}K of other stages as published", V3_TOTAL, total,
         "{:,.0f}", "V3 report"),
        ("dollars in all, at $2", V3_TOTAL * 2, total * gpu.price, "{:,.0f}", "V3 report"),
    ]  # fmt: skip
    if row and row.prefill and row.decode:
        prefill, decode = (s.tokens_per_second * NODE for s in (row.prefill, row.decode))
        day = day_cost(row.prefill, row.decode)
        lines += [
            (f"prompt tokens/s of a node of {NODE}, 342B of 608B from a cache",
             NODE_PREFILL, prefill / missed, "{:,.0f}", "open-infra-index"),
            ("the same, computed ones only", NODE_PREFILL * missed, prefill, "{:,.0f}",
             "open-infra-index"),
            ("generated tokens/s of a node", NODE_DECODE, decode, "{:,.0f}", "open-infra-index"),
            ("dollars of that day's tokens, at $2", DAILY_COST, day, "{:,.0f}",
             "open-infra-index"),
        ]  # fmt: skip
    rows = [(what, number.format(theirs), number.format(ours), f"{ours / theirs:.2f}", source)
            for what, theirs, ours, number, source in lines]  # fmt: skip
    if row and row.prefill and row.decode:
        profits = (f"{DAILY_REVENUE / cost - 1:.0%}" for cost in (DAILY_COST, day))
        rows.append(("theoretical profit over that cost", *profits, "", "open-infra-index"))
    return table(("H800", "published", "predicted", "ratio", "source"), rows)


def differences(found: Report, compared: Comparisons) -> str:
    """Why the model and the published figures differ, from the numbers."""
    v3, row = compared.v3, found.row(REFERENCE)
    theirs = V3_HOURS_PER_TRILLION * 3600 / 1e12 * v3.tokens  # seconds per micro-batch
    text = (
        f"Training, in the report's layout (PP16 x EP64, 2048 H800): the model has "
        f"{v3.step:.2f} s per micro-batch of {v3.tokens:,} tokens, the report's hours are "
        f"{theirs:.2f} s. The model uses {v3.utilization:.0%} of the bf16 peak, the report's hours "
        f"{v3.utilization * v3.step / theirs:.0%}. The rest, {theirs - v3.step:.2f} s, is "
        "what the model does not count and what its assumptions leave out: exchanges that "
        "computation does not hide "
        f"(hiding none of {v3.communication:.2f} s would give "
        f"{(v3.step + v3.communication * (1 + v3.bubble)) / theirs:.2f} of the report's time), "
        "kernels of 2024 that attain less than the best published ones of today, launch gaps, "
        "restarts. Nothing was fitted to the report's figure.\n"
    )
    if row and row.prefill and row.decode:
        text += (
            "\nServing: DeepSeek's figures are averages of a day over nodes that are not always "
            "full, with prompts and sequences of mixed lengths, 20 to 22 tokens/s for a user; the "
            f"model's batch is always full, and its users receive {1 / row.decode.step:.0f} "
            "tokens/s. "
            f"A predicted GPU-hour serves {row.decode.tokens_per_second * NODE / NODE_DECODE:.1f}x "
            "the generated tokens of DeepSeek's.\n"
        )
    return text


def breakdown(step: Training, most: int = 12) -> str:
    """Where the time of a training step goes."""
    entries = sorted(step.compute.entries.items(), key=lambda item: -item[1])
    sums: dict[tuple[str, str], float] = {}
    for (_, op, kind), seconds in entries:
        sums[op, kind] = sums.get((op, kind), 0.0) + seconds
    ranked = sorted(sums.items(), key=lambda item: -item[1])
    whole = step.compute.seconds
    rows = [(f"`{op}`" if op != "torch" else "elementwise, plain PyTorch", f"{s:.3f}",
             f"{s / whole:.0%}", kind) for (op, kind), s in ranked[:most]]  # fmt: skip
    other = sum(s for _, s in ranked[most:])
    rows.append((f"{len(ranked) - most} other ops", f"{other:.3f}",
                 f"{other / whole:.0%}", "predicted or assumed"))  # fmt: skip
    parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in step.parts.items())
    text = (
        f"\nWith {Assumptions().communication_sms:.0%} of the SMs left to communication and the "
        f"imbalance of the experts: {parts}. Exchanges take {step.communication:.2f} s. The "
        f"pipeline's bubble is {step.bubble:.1%}. An optimizer step of {step.micro_batches} "
        f"micro-batches adds {step.update:.2f} s for AdamW and for gradients and weights.\n"
    )
    return table(("op", "s per micro-batch, all layers", "of them", "op time"), rows) + text


def flops_text(found: Report, compared: Comparisons) -> str:
    c = replace(found.config, num_nextn_predict_layers=0)
    a = found.assumptions
    calls = steps.training_step(c, a.sequence, a.sequence, c.n_routed_experts or 1, "fp8")[
        "forward"
    ]
    attention = sum(x.flops for x in calls if x.op == "mla_prefill") / a.sequence
    products = sum(x.flops for x in calls) / a.sequence - attention
    active = forward_parameters(found.config)
    training = compared.v3.flops / compared.v3.tokens
    return (
        f"Check of the counts: the forward pass of the main model takes {products / 1e9:.1f} "
        f"GFLOP per token in products with weights, 2 x {active / 1e9:.1f}B active parameters, and "
        f"{attention / 1e9:.1f} GFLOP in attention at {a.sequence} tokens. A training step with "
        f"the prediction layer takes {training / 1e9:.0f} GFLOP per token without recomputation.\n"
    )


def gpu_table(found: Report) -> str:
    rows = []
    for r in found.rows:
        g = r.gpu
        fp8 = f"{g.arch.fp8_tflops:,}" if g.fp8_tensor_cores else "none"
        rows.append((g.name, f"{g.arch.bf16_tflops:,}", fp8, f"{g.arch.bandwidth:,}",
                     f"{g.memory:g}", f"{g.link:g}", f"{g.network:g}", f"{g.price:.2f}",
                     g.price_source, g.note))  # fmt: skip
    head = ("GPU", "bf16 TFLOPS", "FP8 TFLOPS", "GB/s of memory", "GB", "GB/s in a node",
            "GB/s between nodes", "$ per hour", "price", "note")  # fmt: skip
    return table(head, rows)


def assumption_table(a: Assumptions) -> str:
    step = f"{a.global_batch:,} sequences of {a.sequence} tokens on {a.cluster} GPUs"
    rows = [
        ("optimizer step", f"{step}, micro-batches of {a.micro_batch} sequence", "V3 report"),
        ("pipeline", "DualPipe: bubble (PP/2 - 1)(2B - 2F), B with recomputation",
         "V3 report, table 2, with F&B = F + B and W = F"),
        ("recompute", "selective: norms, the up-projections of attention, SwiGLU; full: a layer",
         "V3 report; full where memory requires it"),
        ("overlap in training", "the exchanges of a micro-batch run during the computation of "
         "another one; the longer one counts", "V3 report: DualPipe, almost full overlap"),
        ("overlap in serving", "the faster one of two: all tokens in one batch, computation plus "
         "exchanges; or two half-batches, each of which reads all weights, with the exchanges of "
         "one during the computation of the other, the longer one counts",
         "open-infra-index: two micro-batches, alternating in prefill, in a 5-stage pipeline in "
         "decoding"),
        ("SMs for exchanges", f"{a.communication_sms:.1%} in training and in prefill with overlap, "
         "else 0", "V3 report: 20 of 132; on other GPUs the same fraction"),
        ("rates of links", f"{a.link_share:.0%} of the peak in a node, {a.network_share:.0%} "
         "between nodes", "V3 report: 160 of 200 GB/s; DeepEP: 43-47 of 50 GB/s"),
        ("exchange of experts", "dispatch in the arithmetic's type, combine in bf16; a row crosses "
         "to a node once, in decoding once per expert", "V3 report; DeepEP"),
        ("imbalance", f"the busiest GPU has {a.imbalance}x the mean rows", "assumed"),
        ("memory", f"{a.reserved:.0%} reserved; weights, fp32 gradients, fp32 master weights, bf16 "
         "moments; the optimizer's state distributed over all GPUs; DualPipe keeps two stages",
         "V3 report; assumed"),
        ("gradients and weights", "after each optimizer step, both stages of a GPU: gradients in "
         "fp32 to the other copies, weights back, at the rate between nodes, without overlap",
         "DualPipe: 2x the parameters; assumed"),
        ("prefill", f"{a.prefill_tokens:,} tokens of a GPU in prompts of {a.prompt:,}", "assumed"),
        ("decoding", f"{a.context:,} cached tokens in bf16; the batch with most tokens/s that "
         f"still gives a user {a.user_speed:g} tokens/s",
         "open-infra-index: 4,989 tokens, 20-22 tokens/s"),
    ]  # fmt: skip
    return table(("what", "assumed", "source"), rows)


def attained_table() -> str:
    named = [(f"`{op}`", f"{share:.2f}", source) for op, (share, source) in ATTAINED.items()]
    rows = [*named, ("other products", f"{OTHER_PRODUCTS[0]:.2f}", OTHER_PRODUCTS[1]),
            ("bound by memory", f"{BANDWIDTH[0]:.2f}", BANDWIDTH[1])]  # fmt: skip
    return table(("op", "attained share of the roof", "published, H100, H800 or H200"), rows)


def page(found: Report, compared: Comparisons) -> str:
    a = found.assumptions
    bullets = "\n".join(f"- {line}" for line in conclusion(found, compared))
    sections = [
        _INTRODUCTION.format(status=status(found)),
        f"## Conclusion\n\n{bullets}\n",
        f"![Cost of training and serving {found.preset} by GPU](cost.png)\n",
        f"## Training {found.preset}: a trillion tokens\n\nThe cheapest layout that fits "
        "(within 2 %, the one of fewest GPUs): PP pipeline stages x EP expert-parallel GPUs, the "
        "rest data-parallel.\n\n"
        + training_table(found),
        f"## Serving {found.preset}: prefill\n\n" + serving_table(found, decoding=False),
        f"## Serving {found.preset}: decoding\n\nAt {a.context:,} cached tokens.\n\n"
        + serving_table(found, decoding=True),
        "## Next to the published figures\n\n" + published_table(found, compared)
        + "\n" + differences(found, compared)
        + "\nSources: the DeepSeek-V3 report (arXiv:2412.19437), section 1 and table 1; "
        "`deepseek-ai/open-infra-index`, `202502OpenSourceWeek/"
        "day_6_one_more_thing_deepseekV3R1_inference_system_overview.md`; Llama 3.1: "
        "`meta-llama/llama-models`, `models/llama3_1/MODEL_CARD.md`.\n",
        "## Where a training step goes\n\nH800, PP16 x EP64, before the SMs of exchanges.\n\n"
        + breakdown(compared.v3) + "\n" + flops_text(found, compared),
        "## Assumptions\n\nPeak rates are the vendors', dense; links in one direction per GPU.\n\n"
        + gpu_table(found) + "\n" + assumption_table(a) + "\n" + attained_table(),
        _NOT_COUNTED,
    ]  # fmt: skip
    return "\n".join(sections)


def write(found: Report, compared: Comparisons) -> None:
    write_text(page(found, compared), PAGE)
    draw(found, PICTURE)


# The picture.


def draw(found: Report, file: Path) -> None:
    """Dollars of training, prefill and decoding by GPU, with the published figures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    theirs = V3_HOURS_PER_TRILLION * 2 / 1e3
    node_hour = NODE * 2 / 3600 * 1e6
    panels = [
        ("Training: thousand dollars per trillion tokens", theirs,
         lambda r: r.training and (r.training.dollars_per_trillion / 1e3,
                                   f"{r.training.hours_per_trillion / 1e3:,.0f}K GPU-hours")),
        ("Prefill: dollars per million tokens",
         node_hour / (NODE_PREFILL * (1 - CACHED_TOKENS / INPUT_TOKENS)),
         lambda r: r.prefill and serving_bar(r.prefill)),
        ("Decoding: dollars per million tokens", node_hour / NODE_DECODE,
         lambda r: r.decode and serving_bar(r.decode)),
    ]  # fmt: skip
    figure, axes = plt.subplots(1, 3, figsize=(15, 3.6), layout="constrained")
    for axis, (title, published, bar) in zip(axes, panels, strict=True):
        draw_panel(axis, title, published, [(r, bar(r)) for r in found.rows])
    title = (
        f"{found.preset}: predicted, with the assumptions of docs/cost.md. "
        "Dashed: DeepSeek's published figures on H800 at $2"
    )
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, dpi=90)
    plt.close(figure)


def serving_bar(s: Serving) -> tuple[float, str]:
    return s.dollars_per_million, f"{s.tokens_per_second:,.0f} tokens/s"


def draw_panel(axis, title: str, published: float, bars: list[tuple[Row, tuple | None]]) -> None:
    shown = [(r.gpu.name, *bar) for r, bar in bars if bar]
    axis.set_title(title, fontsize=10)
    axis.barh([name for name, *_ in shown], [value for _, value, _ in shown], color="#3b6fb6")
    label = {"va": "center", "fontsize": 8, "bbox": {"fc": "white", "ec": "none", "pad": 0.5}}
    for y, (_, value, text) in enumerate(shown):
        axis.annotate(f"{value:,.3g}: {text}", (value, y), (4, 0), textcoords="offset points",
                      **label)  # fmt: skip
    axis.axvline(published, color="#c22222", linestyle="--", linewidth=1)
    axis.set_xlim(0, 1.6 * max([value for _, value, _ in shown] + [published]))
    axis.invert_yaxis()
