"""Compares training with Linears in bf16 and in FP8: the loss that FP8 costs.

    python -m bench.studies.compare_precisions --steps 600

The runs are those of `model/train.py`. They have the same seed, batches and learning rates; only
the number format of the Linears differs. `--precision fp32` adds a run in fp32. Its distance to
bf16 is the effect of rounding alone on a run of this length. Runs are saved and continued, so
`--only` can train each in a separate process before the command compares them.

It writes a JSON and a PNG to bench/results/: the losses, their mean over the last tenth of the
steps, the loss on the held-out text, each model scored in its own precision, and the relative
distance of these to bf16.

Source of the bound: DeepSeek-V3 report (arXiv:2412.19437), section 3.3: the relative loss error is
below 0.25 %.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench import machine
from bench.results import FOLDER
from model.config import Config
from model.evaluate import bits_per_byte
from model.train import Recipe, Run, corpus, heldout_text, run_until_done

BASE = "bf16"
EVERY = 10  # steps per point of the curves
BOUND = 0.0025  # of the relative distance of a loss to that of bf16


def last_tenth(curve: list[float]) -> float:
    """The mean loss over the last tenth of the steps."""
    tail = curve[-max(len(curve) // 10, 1) :]
    return sum(tail) / len(tail)


def curve(run: Run) -> list[float]:
    """The loss of every step, in nats per byte."""
    return [row["main"] for row in run.log if "main" in row]


def measured(run: Run, heldout: bytes) -> dict[str, Any]:
    """The result of a finished run; losses in nats per byte."""
    losses, window = curve(run), run.recipe.window
    tens = [losses[i : i + EVERY] for i in range(0, len(losses), EVERY)]
    return {
        "mean_of_every_10_steps": [round(sum(ten) / len(ten), 5) for ten in tens],
        "mean_of_last_tenth": last_tenth(losses),
        "held_out": bits_per_byte(run.model.eval(), heldout, window) * math.log(2),
        "minutes": round(run.seconds / 60, 1),
    }


def gaps(runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """loss / loss in bf16 - 1 of every other precision."""
    keys = ("mean_of_last_tenth", "held_out")
    return {
        name: {key: run[key] / runs[BASE][key] - 1 for key in keys}
        for name, run in runs.items()
        if name != BASE
    }


def draw(record: dict[str, Any], file: Path) -> None:
    """Draws the loss curves, and under them their relative distance to bf16 in percent."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = {name: run["mean_of_every_10_steps"] for name, run in record["runs"].items()}
    figure, (loss_axes, gap_axes) = plt.subplots(
        2, 1, figsize=(8, 7), sharex=True, layout="constrained"
    )
    for name, values in runs.items():
        steps = [EVERY * (i + 0.5) for i in range(len(values))]
        held_out = record["runs"][name]["held_out"]
        loss_axes.plot(steps, values, lw=1, label=f"{name}: held out {held_out:.4f}")
        if name != BASE:
            gap = [100 * (a / b - 1) for a, b in zip(values, runs[BASE], strict=True)]
            gap_axes.plot(steps, gap, lw=1, label=f"{name} above {BASE}")
    gap_axes.axhspan(-100 * BOUND, 100 * BOUND, color="0.9", label=f"±{100 * BOUND:g} %")
    loss_axes.set(ylabel="nats per byte, mean of 10 steps", ylim=(None, 3.5))
    gap_axes.set(xlabel="step", ylabel="%", ylim=(-2, 2))
    loss_axes.legend()
    gap_axes.legend()
    host = record["machine"]
    figure.suptitle(f"Training in FP8 · {host['cpu']} · torch {host['torch']} · {host['commit']}")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def write(record: dict[str, Any], folder: Path) -> Path:
    """Writes the JSON and the PNG, each all or nothing; returns the path of the JSON."""
    when = record["machine"]["time"].replace(":", "-").removesuffix("+00-00")
    file = folder / f"{when}-cpu-training.json"
    fresh, picture = file.with_suffix(".tmp.json"), file.with_suffix(".tmp.png")
    try:
        fresh.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
        draw(record, picture)
        os.replace(picture, file.with_suffix(".png"))
        os.replace(fresh, file)
    finally:
        fresh.unlink(missing_ok=True)
        picture.unlink(missing_ok=True)
    return file


def main(
    steps: int = 600,
    batch: int = Recipe.batch,
    window: int = Recipe.window,
    learning_rate: float = Recipe.learning_rate,
    warmup: Annotated[float, typer.Option(help="fraction of the run")] = Recipe.warmup,
    seed: int = Recipe.seed,
    precision: Annotated[list[str], typer.Option(help="compared with bf16")] = ["fp8"],  # noqa: B006
    only: Annotated[str | None, typer.Option(help="train this one and stop")] = None,
    state: Annotated[Path, typer.Option(help="folder of the saved runs")] = Path("build/compare"),
    out: Annotated[Path, typer.Option(help="folder of the result")] = FOLDER,
) -> None:
    """Trains in bf16 and in FP8, one thread each, and compares."""
    torch.set_num_threads(1)
    data, files = corpus()
    text, _ = heldout_text(files)
    runs, recipe = {}, {}
    for name in [only] if only else [BASE, *precision]:
        recipe = Recipe(
            steps=steps, batch=batch, window=window, learning_rate=learning_rate, warmup=warmup,
            seed=seed, precision=name,
        )  # fmt: skip
        config = Config.preset("tiny", max_position_embeddings=window)
        folder = (
            f"{name}-{steps}-steps-of-{batch}x{window}-{learning_rate:g}-{warmup:g}-seed-{seed}"
        )
        run = Run(config, recipe, state / folder)
        print(f"{name}: from step {run.step} of {steps}", flush=True)
        run_until_done(run, data, text[: 16 * 1024], log_every=1)
        print(f"{name}: mean loss of the last tenth {last_tenth(curve(run)):.4f}", flush=True)
        if not only:
            runs[name] = measured(run, text)
            print(f"{name}: held out {runs[name]['held_out']:.4f}", flush=True)
    if only:
        return
    shared = {k: v for k, v in asdict(recipe).items() if k not in ("precision", "minutes")}
    setup = {"preset": "tiny", "recipe": shared, "held_out_bytes": len(text), "unit": "nats a byte"}
    distance = gaps(runs)
    print(json.dumps(distance, indent=1))
    record = {"machine": machine.describe(), **setup, "above_bf16": distance, "runs": runs}
    print(write(record, out))


if __name__ == "__main__":
    typer.run(main)
