"""Trains the `tiny` preset on the source of Python's standard library, one CPU core, plain PyTorch.

    python -m model.train --minutes 60                       # writes a new folder under runs/
    python -m model.train --minutes 60 --out DIR --resume    # continues the run in DIR

The tokens are bytes.  About 3 % of the files, chosen by the hash of their path, are held out.  The
length of a run is given in minutes: learning rate and progress follow the clock, so a slower
machine processes fewer tokens in the same time.  With a length in steps, two runs of one seed use
the same batches at the same rates on every machine.

A run's folder holds `state.pt`, saved every few minutes, and at the end `checkpoint/`, which
`model/export.py` writes.

The Linears that DeepSeek-V3 trains in FP8 compute in fp32, in bf16, or in FP8 by its recipe
(`deepkern.fp8_linear`).  Weights, gradients and all other computation are fp32 in all three.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import deepkern
from model.config import Config
from model.evaluate import bits_per_byte
from model.export import export, is_quantized
from model.plain import PlainModel, PlainMoE

SEPARATOR = b"\f"  # before every file; a form feed is white space in Python and rare in its source
SKIPPED_DIRS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
SKIPPED_DIRS |= {"encodings", "pydoc_data"}  # generated tables, not source
RUNS = Path(__file__).parents[1] / "runs"  # git-ignored
HELDOUT_BYTES = 96 * 1024


@dataclass
class Recipe:
    """The options of a run that are not the model's config."""

    minutes: float = 60.0
    steps: int | None = None  # the length of the run, in place of `minutes`
    batch: int = 4
    window: int = 512
    learning_rate: float = 3e-3
    warmup: float = 0.02  # fraction of the run
    final: float = 0.05  # last learning rate / learning_rate
    weight_decay: float = 0.1
    mtp_weight: float = 0.2
    balance_weight: float = 1e-4
    bias_step: float = 1e-3
    seed: int = 1
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"  # of the Linears


def stdlib_files() -> dict[str, bytes]:
    """Relative path -> content of the standard library's Python files except tests, sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    files = {}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - SKIPPED_DIRS)
        for name in sorted(names):
            if name.endswith(".py"):
                path = Path(folder, name)
                files[path.relative_to(root).as_posix()] = path.read_bytes()
    return dict(sorted(files.items()))


def is_held_out(path: str) -> bool:
    """Whether a file is held out of training: 3 % of the files, by the hash of the path."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big") % 1000 < 30


def corpus() -> tuple[bytes, dict[str, bytes]]:
    """The training bytes, and the held-out files as path -> content."""
    files = stdlib_files()
    held_out = {path: text for path, text in files.items() if is_held_out(path)}
    train = SEPARATOR.join(text for path, text in files.items() if path not in held_out)
    return SEPARATOR + train, held_out


def heldout_text(files: dict[str, bytes], size: int = HELDOUT_BYTES) -> tuple[bytes, list[str]]:
    """Joins held-out files of 2 to 32 KiB, in the order of their hash, up to `size` bytes.

    Returns the text and the paths of its files.
    """
    fitting = [path for path, text in files.items() if 2048 <= len(text) <= 32768]
    fitting.sort(key=lambda path: hashlib.sha256(path.encode()).digest())
    text, paths = b"", []
    for path in fitting:
        if len(text) < size:
            text += SEPARATOR + files[path]
            paths.append(path)
    return text[:size], paths


def batches(data: bytes, recipe: Recipe, start: int) -> Iterator[Tensor]:
    """Random windows, int64 [batch, window + 1], from batch `start` on.

    Batch n is the same in every run of one seed.
    """
    tokens = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    step, span = start, torch.arange(recipe.window + 1)
    while True:
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        limit = len(tokens) - recipe.window - 1
        offset = torch.randint(limit, (recipe.batch, 1), generator=generator)
        yield tokens[offset + span].long()
        step += 1


def initialize(model: PlainModel) -> None:
    """Normal weights of deviation 1/sqrt(inputs), smaller for outputs added to the residual."""
    depth = 2 * model.config.num_hidden_layers
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        std = parameter.shape[1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std *= depth**-0.5
        if "embed_tokens" in name or "head" in name:
            std = 0.5 if "embed" in name else 0.02
        torch.nn.init.normal_(parameter, std=std)


def share_embedding_and_head(model: PlainModel) -> None:
    """Makes the prediction layers use the main model's embedding and head, as in the report."""
    for layer in model.model["layers"][model.config.num_hidden_layers :]:
        layer.embed_tokens.weight = model.model["embed_tokens"].weight
        layer.shared_head["head"].weight = model.lm_head.weight


class BF16Linear(nn.Linear):
    """Computes in bf16 on fp32 activations and weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), self.weight.bfloat16()).to(x.dtype)


class FP8Linear(deepkern.FP8Linear):
    """Computes in FP8 on fp32 activations and weights."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.bfloat16()).to(x.dtype)


def set_precision(model: PlainModel, precision: str) -> None:
    """Makes projections, MLPs and experts compute in `precision`; parameters do not change."""
    classes = {"fp32": nn.Linear, "bf16": BF16Linear, "fp8": FP8Linear}
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and is_quantized(f"{name}.weight"):
            parent, _, child = name.rpartition(".")
            new = classes[precision](
                linear.in_features, linear.out_features, bias=False, device="meta"
            )
            new.weight = linear.weight
            setattr(model.get_submodule(parent), child, new)


def losses(model: PlainModel, tokens: Tensor) -> dict[str, Tensor]:
    """Mean nats of the next byte and of the one after, and the mean balance loss.

    tokens: int64 [B, window + 1].
    """
    inputs = tokens[:, :-1]
    hidden = model.hidden(inputs)
    logits, ahead = model.lm_head(hidden), model.mtp_logits(inputs, hidden)
    layers = [module for module in model.modules() if isinstance(module, PlainMoE)]
    return {
        "main": F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()),
        "mtp": F.cross_entropy(ahead.flatten(0, 1), tokens[:, 2:].flatten()),
        "balance": torch.stack([layer.balance for layer in layers]).mean(),
    }


@torch.no_grad()
def update_biases(model: PlainModel, step: float) -> float:
    """Moves each selection bias by ±step towards an even load; returns the worst max/mean load."""
    worst = 0.0
    for module in model.modules():
        if isinstance(module, PlainMoE):
            load = module.load.float()
            module.gate.e_score_correction_bias += step * (load.mean() - load).sign()
            worst = max(worst, (load.max() / load.mean()).item())
    return worst


def learning_rate(recipe: Recipe, progress: float) -> float:
    """Linear warm-up, then half a cosine down to `final`; progress is from 0 to 1."""
    if progress < recipe.warmup:
        return recipe.learning_rate * (progress / recipe.warmup)
    angle = math.pi * (progress - recipe.warmup) / (1 - recipe.warmup)
    return recipe.learning_rate * (recipe.final + (1 - recipe.final) * (1 + math.cos(angle)) / 2)


def make_optimizer(model: PlainModel, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


class Run:
    """A training run: model, optimizer, clock and log; continues folder/state.pt if it exists."""

    def __init__(self, config: Config, recipe: Recipe, folder: Path) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.folder = recipe, folder
        self.model = PlainModel(config)
        initialize(self.model)
        share_embedding_and_head(self.model)
        set_precision(self.model, recipe.precision)
        self.optimizer = make_optimizer(self.model, recipe)
        self.step, self.seconds = 0, 0.0
        self.log: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "state.pt").exists():
            state = torch.load(folder / "state.pt", weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]
            self.log = json.loads(state["log"])

    @property
    def progress(self) -> float:
        """From 0 to 1, by steps or by the clock."""
        if self.recipe.steps is not None:
            return min(self.step / self.recipe.steps, 1.0)
        return min(self.seconds / (60 * self.recipe.minutes), 1.0)

    def save(self) -> None:
        """Writes folder/state.pt, all or nothing."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "log": json.dumps(self.log),
        }
        torch.save(state, self.folder / "state.tmp")
        os.replace(self.folder / "state.tmp", self.folder / "state.pt")

    def train_step(self, tokens: Tensor) -> dict[str, float]:
        """One optimizer step on tokens int64 [B, window + 1]; returns its losses and rates."""
        self.model.train()
        lr = learning_rate(self.recipe, self.progress)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        terms = losses(self.model, tokens)
        loss = terms["main"] + self.recipe.mtp_weight * terms["mtp"]
        (loss + self.recipe.balance_weight * terms["balance"]).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        imbalance = update_biases(self.model, self.recipe.bias_step)
        values = {name: value.item() for name, value in terms.items()}
        return {**values, "lr": lr, "gradient_norm": norm.item(), "imbalance": imbalance}

    def record(self, values: dict[str, float]) -> None:
        """Appends a row to the log."""
        tokens = self.step * self.recipe.batch * self.recipe.window
        row = {"step": self.step, "tokens": tokens, "seconds": round(self.seconds, 1), **values}
        self.log.append({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()})


def run_until_done(
    run: Run, data: bytes, check: bytes, save_every: float = 240.0, log_every: int = 20
) -> None:
    """Trains to the end of the run; saves every `save_every` seconds.

    Logs every `log_every` steps, and at each save the bits per byte of `check`, held-out text.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("training", total=1.0, completed=run.progress)
        saved = run.seconds
        for tokens in batches(data, run.recipe, run.step):
            if run.progress >= 1:
                break
            start = time.monotonic()
            values = run.train_step(tokens)
            run.step += 1
            run.seconds += time.monotonic() - start
            if run.step % log_every == 0:
                run.record(values)
                rate = run.step * tokens[:, 1:].numel() / run.seconds
                text = f"step {run.step}  {values['main'] / math.log(2):.3f} bits  {rate:.0f} B/s"
                progress.update(bar, completed=run.progress, description=text)
            if run.seconds - saved > save_every:
                saved = run.seconds
                run.record({"held_out_bpb": bits_per_byte(run.model.eval(), check)})
                print(run.log[-2], run.log[-1], flush=True)
                run.save()
    run.save()


def run_folder(out: Path | None, resume: bool) -> Path:
    """The folder of a run: `out`, or a new one under runs/ named by the time.

    Raises typer.BadParameter if a new run would write to a folder that is not empty, or if there is
    no run to resume.
    """
    if resume and (out is None or not (out / "state.pt").is_file()):
        raise typer.BadParameter(f"{out}: no state.pt to resume; name its folder with --out")
    if out is None:
        out = RUNS / time.strftime("%Y-%m-%dT%H-%M-%S")
    if out.exists() and not resume and any(out.iterdir()):
        raise typer.BadParameter(f"{out} is not empty; --resume continues the run in it")
    return out


def main(
    out: Annotated[Path | None, typer.Option(help="the run's folder; a new one in runs/")] = None,
    resume: Annotated[bool, typer.Option(help="continue the run in OUT")] = False,
    minutes: Annotated[
        float,
        typer.Option(min=0.01, help="length of the run; learning rate and progress follow it"),
    ] = Recipe.minutes,
    learning_rate: float = Recipe.learning_rate,
    batch: int = Recipe.batch,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 1,
) -> None:
    """Trains and exports; the checkpoint is OUT/checkpoint."""
    folder = run_folder(out, resume)
    torch.set_num_threads(threads)
    recipe = Recipe(minutes=minutes, learning_rate=learning_rate, batch=batch)
    config = Config.preset("tiny", max_position_embeddings=recipe.window)
    data, held_out = corpus()
    text, paths = heldout_text(held_out)
    run = Run(config, recipe, folder)
    size = sum(p.numel() for p in run.model.parameters())
    print(f"{folder}: {size:,} parameters, {len(data):,} bytes to train on", flush=True)
    run_until_done(run, data, text[: 16 * 1024])
    notes = {
        "recipe": asdict(recipe),
        "training_bytes": len(data),
        "held_out_files": paths,
        "steps": run.step,
        "tokens_seen": run.step * recipe.batch * recipe.window,
        "training_minutes": round(run.seconds / 60, 1),
        "training_threads": threads,
    }
    metrics = export(run.model, folder / "checkpoint", text, notes, run.log)
    print(json.dumps(metrics, indent=1))


if __name__ == "__main__":
    typer.run(main)
