"""Compares training in FP8 with training in bf16: the loss that FP8 costs.

    python -m bench.studies.compare_precisions

The runs are those of `model/train.py`.  The two runs of a seed have the same weights, batches and
learning rates; only the number format of the products of attention, MLPs and experts differs.  A
second seed changes weights and batches, which shows how much of a distance is chance.  At the
learning rate of `model/train.py`, 3e-3, the two runs soon choose other experts and are as far apart
as runs of two seeds; the default here keeps them together.

A finished run is kept in STATE, so the command can be stopped and repeated, and `--only fp8` can
train in a separate process before the command compares.  It writes a JSON and a PNG to
bench/results/: the losses, their mean over the last tenth of the steps, the loss on held-out text,
each model scored in its own precision, and the relative distances.

Source of the bound: DeepSeek-V3 report (arXiv:2412.19437), section 3.3: the relative loss error is
below 0.25 %.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from bench import machine
from bench.results import FOLDER, write_text
from model.config import Config
from model.evaluate import nats_per_token
from model.training.data import heldout_text, read_corpus
from model.training.recipe import Recipe
from model.training.report import smoothed, with_progress
from model.training.run import Run

PRECISIONS = ("bf16", "fp8")
BOUND = 0.0025  # of the relative distance of the loss in FP8 to that in bf16
MEASURES = ("last_tenth", "held_out")


def measure(recipe: Recipe, tokens: Tensor, heldout: Tensor, file: Path) -> dict[str, Any]:
    """The result of a run, from `file` if this run is there; losses in nats per byte."""
    run = Run(Config.preset("tiny", max_position_embeddings=recipe.window), recipe, tokens)
    setup = {"recipe": asdict(recipe), "text": run.tokens_checksum, "torch": torch.__version__}
    if file.is_file() and (kept := json.loads(file.read_text()))["setup"] == setup:
        return kept
    curve = [row["main"] for row in with_progress(run, run.steps())]
    skipped = sum("skipped" in row for row in run.log)
    tail = curve[-max(len(curve) // 10, 1) :]
    result = {
        "setup": setup,
        "commit": machine.describe()["commit"],
        "losses": [round(loss, 5) for loss in curve],
        "last_tenth": sum(tail) / len(tail),
        "held_out": nats_per_token(run.predict, heldout, recipe.window),
        "skipped": skipped,
        "tokens_per_second": recipe.tokens_per_step / min(row["seconds"] for row in run.log),
    }
    write_text(json.dumps(result), file)
    return result


def distances(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """fp8 / bf16 - 1 of each measure, by seed, and their mean."""
    result = {}
    for name in MEASURES:
        by_seed = [
            fp8[name] / bf16[name] - 1 for bf16, fp8 in zip(runs["bf16"], runs["fp8"], strict=True)
        ]
        result[name] = {"by_seed": by_seed, "mean": sum(by_seed) / len(by_seed)}
    return result


def draw(record: dict[str, Any], file: Path) -> None:
    """Draws the loss curves, and under them the relative distance of each seed in percent."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (loss_axes, gap_axes) = plt.subplots(
        2, 1, figsize=(8, 7), sharex=True, layout="constrained"
    )
    for number, seed in enumerate(record["seeds"]):
        curves = {name: smoothed(runs[number]["losses"]) for name, runs in record["runs"].items()}
        for name, style in (("bf16", "-"), ("fp8", "--")):
            loss_axes.plot(
                curves[name], style, lw=1, color=f"C{number}", label=f"{name}, seed {seed}"
            )
        gap = [100 * (a / b - 1) for a, b in zip(curves["fp8"], curves["bf16"], strict=True)]
        gap_axes.plot(gap, lw=1, color=f"C{number}", label=f"seed {seed}")
    gap_axes.axhspan(-100 * BOUND, 100 * BOUND, color="0.9", label=f"±{100 * BOUND:g} %")
    loss_axes.set(ylabel="nats per byte, smoothed")
    gap_axes.set(xlabel="step", ylabel="FP8 above bf16, %", ylim=(-1, 1))
    loss_axes.legend()
    gap_axes.legend()
    host = record["machine"]
    figure.suptitle(f"Training in FP8 · {host['cpu']} · torch {host['torch']} · {host['commit']}")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def write(record: dict[str, Any], folder: Path) -> Path:
    """Writes the JSON and the PNG, each all or nothing; returns the path of the JSON."""
    when = record["machine"]["time"].replace(":", "-").removesuffix("+00-00")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{when}-cpu-training.json"
    fresh, picture = file.with_suffix(".tmp.json"), file.with_suffix(".tmp.png")
    try:
        fresh.write_text(json.dumps(record, allow_nan=False) + "\n")
        draw(record, picture)
        os.replace(picture, file.with_suffix(".png"))
        os.replace(fresh, file)
    finally:
        fresh.unlink(missing_ok=True)
        picture.unlink(missing_ok=True)
    return file


def main(
    steps: int = 250,
    batch: int = 2,
    window: int = Recipe.window,
    learning_rate: float = 5e-4,
    warmup: Annotated[float, typer.Option(help="fraction of the run")] = 0.1,
    optimizer: Annotated[str, typer.Option(help="adamw or muon")] = Recipe.optimizer,
    seeds: Annotated[int, typer.Option(min=1, help="number of seeds")] = 3,
    only: Annotated[str | None, typer.Option(help="train in bf16 or fp8 and stop")] = None,
    state: Annotated[Path, typer.Option(help="folder of the finished runs")] = Path(
        "build/compare"
    ),
    out: Annotated[Path, typer.Option(help="folder of the result")] = FOLDER,
) -> None:
    """Trains in bf16 and in FP8, one thread each, and compares."""
    torch.set_num_threads(1)
    corpus = read_corpus()
    text, _ = heldout_text(corpus.held_out)
    heldout = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    recipe = Recipe(
        steps=steps, batch=batch, window=window, learning_rate=learning_rate, warmup=warmup,
        optimizer=optimizer, recompute=False,
    )  # fmt: skip
    setup = f"{steps}x{batch}x{window}-{optimizer}-{learning_rate:g}-{warmup:g}"
    runs: dict[str, list[dict[str, Any]]] = {}
    numbers = range(1, seeds + 1)
    for precision in [only] if only else PRECISIONS:
        runs[precision] = []
        for seed in numbers:
            one = replace(recipe, precision=precision, seed=seed)
            file = state / f"{setup}-{precision}-{seed}.json"
            result = measure(one, corpus.tokens, heldout, file)
            runs[precision].append(result)
            figures = ", ".join(f"{name} {result[name]:.4f}" for name in MEASURES)
            print(f"{precision}, seed {seed}: {figures}", flush=True)
    if only:
        return
    above = distances(runs)
    print(json.dumps(above, indent=1))
    common = {k: v for k, v in asdict(recipe).items() if k not in ("precision", "seed")}
    record = {
        "machine": machine.describe(), "preset": "tiny", "recipe": common, "seeds": [*numbers],
        "held_out_bytes": len(text), "unit": "nats per byte", "fp8_above_bf16": above, "runs": runs,
    }  # fmt: skip
    print(write(record, out))


if __name__ == "__main__":
    typer.run(main)
