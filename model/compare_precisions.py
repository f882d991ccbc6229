"""The training run of `model/train.py` with its Linears in bf16 and in FP8: what FP8 costs.

    python -m model.compare_precisions --steps 600

Same seed, same batches, same learning rates; the Linears' number format alone differs. A run in
fp32 may be added (`--precision`): between it and bf16 lies what another rounding alone does, by
chance, to a run of this length. Runs are kept and continued, as those of `model/train.py` are, so
`--only` can train each on a core of its own before the command puts them side by side.

It writes a JSON and a picture to bench/results/: the losses, their mean over the last tenth of the
steps, the loss on the held-out text, each model scored in its own precision, and how far these are
from those of bf16. The report of DeepSeek-V3 (arXiv 2412.19437, section 3.3) saw less than 0.25 %.
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
EVERY = 10  # steps to a point of the curves
BOUND = 0.0025  # relative, of the losses' distance to bf16


def last_tenth(curve: list[float]) -> float:
    """The mean loss over the last tenth of the steps."""
    tail = curve[-max(len(curve) // 10, 1) :]
    return sum(tail) / len(tail)


def curve(run: Run) -> list[float]:
    """The loss of every step, in nats a byte."""
    return [row["main"] for row in run.log if "main" in row]


def measured(run: Run, heldout: bytes) -> dict[str, Any]:
    """A finished run in figures; losses in nats a byte."""
    losses, window = curve(run), run.recipe.window
    tens = [losses[i : i + EVERY] for i in range(0, len(losses), EVERY)]
    return {
        "mean_of_every_10_steps": [round(sum(part) / len(part), 5) for part in tens],
        "mean_of_last_tenth": last_tenth(losses),
        "held_out": bits_per_byte(run.model.eval(), heldout, window) * math.log(2),
        "minutes": round(run.seconds / 60, 1),
    }


def gaps(runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """How far each precision's losses lie above those of bf16, relative to them."""
    keys = ("mean_of_last_tenth", "held_out")
    return {
        name: {key: run[key] / runs[BASE][key] - 1 for key in keys}
        for name, run in runs.items()
        if name != BASE
    }


def draw(record: dict[str, Any], file: Path) -> None:
    """The curves, and below them their distance to that of bf16."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = {name: run["mean_of_every_10_steps"] for name, run in record["runs"].items()}
    figure, (top, below) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
    for name, values in runs.items():
        steps = [EVERY * (i + 0.5) for i in range(len(values))]
        top.plot(
            steps, values, lw=1, label=f"{name}: held out {record['runs'][name]['held_out']:.4f}"
        )
        if name != BASE:
            far = [100 * (a / b - 1) for a, b in zip(values, runs[BASE], strict=True)]
            below.plot(steps, far, lw=1, label=f"{name} above {BASE}")
    below.axhspan(-100 * BOUND, 100 * BOUND, color="0.9", label=f"±{100 * BOUND:g} %")
    top.set(ylabel="nats a byte, mean of 10 steps", ylim=(None, 3.5))
    below.set(xlabel="step", ylabel="%", ylim=(-2, 2))
    top.legend()
    below.legend()
    about = record["machine"]
    figure.suptitle(
        f"Training in FP8 · {about['cpu']} · torch {about['torch']} · {about['commit']}"
    )
    figure.savefig(file, dpi=110)
    plt.close(figure)


def write(record: dict[str, Any], folder: Path) -> Path:
    """Writes the JSON and the picture, each whole or not at all; returns the JSON's path."""
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
    precision: Annotated[list[str], typer.Option(help="beside bf16")] = ["fp8"],  # noqa: B006
    only: Annotated[str | None, typer.Option(help="train this one, and compare nothing")] = None,
    state: Annotated[Path, typer.Option(help="where runs keep themselves")] = Path("build/compare"),
    out: Annotated[Path, typer.Option(help="where the result goes")] = FOLDER,
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
        kept = f"{name}-{steps}-steps-of-{batch}x{window}-{learning_rate:g}-{warmup:g}-seed-{seed}"
        run = Run(config, recipe, state / kept)
        print(f"{name}: from step {run.step} of {steps}", flush=True)
        run_until_done(run, data, text[: 16 * 1024], log_every=1)
        print(f"{name}: mean loss of the last tenth {last_tenth(curve(run)):.4f}", flush=True)
        if not only:
            runs[name] = measured(run, text)
            print(f"{name}: held out {runs[name]['held_out']:.4f}", flush=True)
    if only:
        return
    shared = {k: v for k, v in asdict(recipe).items() if k not in ("precision", "minutes")}
    about = {"preset": "tiny", "recipe": shared, "held_out_bytes": len(text), "unit": "nats a byte"}
    found = gaps(runs)
    print(json.dumps(found, indent=1))
    print(write({"machine": machine.describe(), **about, "above_bf16": found, "runs": runs}, out))


if __name__ == "__main__":
    typer.run(main)
