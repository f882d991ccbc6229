"""Trains the `tiny` preset on the source of Python's standard library, one CPU core, plain PyTorch.

    python -m model.train --minutes 60 --state build/train

Bytes are the tokens.  About 3 % of the files, chosen by the hash of their path, are held out.  The
length of the run is given in minutes: learning rate and progress follow the clock, so a slow
machine sees fewer tokens rather than taking longer.  Given in steps, two runs of one seed see the
same batches at the same rates, whatever each takes.  State is saved every few minutes and a run
started again continues; at the end the model is exported (see `model/export.py`).

The Linears that DeepSeek-V3 trains in FP8 compute in fp32, in bf16, or in FP8 by its recipe
(`deepkern.fp8_linear`); weights, gradients and all else are fp32 in each of the three.
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
from model.export import export, is_quantised
from model.plain import MoE, PlainModel

SEPARATOR = b"\f"  # between files; a form feed is white space to Python and rare in its source
SKIPPED_DIRS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
SKIPPED_DIRS |= {"encodings", "pydoc_data"}  # generated tables, not source
CHECKPOINT = Path(__file__).parent / "checkpoints" / "stdlib-bytes"
HELDOUT_BYTES = 96 * 1024


@dataclass
class Recipe:
    """What a run is, apart from the model's shape."""

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
    """Relative path -> content of the standard library's Python files, tests left out, by path."""
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
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big") % 1000 < 30


def corpus() -> tuple[bytes, dict[str, bytes]]:
    """Training bytes, and the held-out files."""
    files = stdlib_files()
    held_out = {path: text for path, text in files.items() if is_held_out(path)}
    train = SEPARATOR.join(text for path, text in files.items() if path not in held_out)
    return SEPARATOR + train, held_out


def heldout_text(files: dict[str, bytes], size: int = HELDOUT_BYTES) -> tuple[bytes, list[str]]:
    """Held-out files of 2 to 32 KiB, whole, in the order of their hash, cut at `size` bytes."""
    fitting = [path for path, text in files.items() if 2048 <= len(text) <= 32768]
    fitting.sort(key=lambda path: hashlib.sha256(path.encode()).digest())
    text, used = b"", []
    for path in fitting:
        if len(text) < size:
            text += SEPARATOR + files[path]
            used.append(path)
    return text[:size], used


def batches(data: bytes, recipe: Recipe, start: int) -> Iterator[Tensor]:
    """Random windows, int64 [batch, window + 1]; batch number n is the same on every run."""
    tokens = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    step, span = start, torch.arange(recipe.window + 1)
    while True:
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        limit = len(tokens) - recipe.window - 1
        offset = torch.randint(limit, (recipe.batch, 1), generator=generator)
        yield tokens[offset + span].long()
        step += 1


def initialise(model: PlainModel) -> None:
    """Normal weights of deviation 1/sqrt(fan in); less where they add to the residual stream."""
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
    """The prediction layer uses the main model's embedding and head, as the report says."""
    for layer in model.model["layers"][model.config.num_hidden_layers :]:
        layer.embed_tokens.weight = model.model["embed_tokens"].weight
        layer.shared_head["head"].weight = model.lm_head.weight


class BF16Linear(nn.Linear):
    """Computes in bf16 on fp32 activations and weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), self.weight.bfloat16()).to(x.dtype)


class FP8Linear(deepkern.FP8Linear):
    """Computes in FP8 where `BF16Linear` computes in bf16."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.bfloat16()).to(x.dtype)


def set_precision(model: PlainModel, precision: str) -> None:
    """Attention's projections, MLPs and experts compute in `precision`; parameters stay."""
    kinds = {"fp32": nn.Linear, "bf16": BF16Linear, "fp8": FP8Linear}
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and is_quantised(f"{name}.weight"):
            parent, _, child = name.rpartition(".")
            new = kinds[precision](
                linear.in_features, linear.out_features, bias=False, device="meta"
            )
            new.weight = linear.weight
            setattr(model.get_submodule(parent), child, new)


def losses(model: PlainModel, tokens: Tensor) -> dict[str, Tensor]:
    """Mean nats of the next byte and of the one after, and the mean balance loss."""
    inputs = tokens[:, :-1]
    hidden = model.hidden(inputs)
    logits, ahead = model.lm_head(hidden), model.mtp_logits(inputs, hidden)
    gates = [module for module in model.modules() if isinstance(module, MoE)]
    return {
        "main": F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()),
        "mtp": F.cross_entropy(ahead.flatten(0, 1), tokens[:, 2:].flatten()),
        "balance": torch.stack([gate.balance for gate in gates]).mean(),
    }


@torch.no_grad()
def update_biases(model: PlainModel, step: float) -> float:
    """Moves each expert's selection bias against its load; returns the worst max/mean load."""
    worst = 0.0
    for module in model.modules():
        if isinstance(module, MoE):
            load = module.load.float()
            module.gate.e_score_correction_bias += step * (load.mean() - load).sign()
            worst = max(worst, (load.max() / load.mean()).item())
    return worst


def learning_rate(recipe: Recipe, progress: float) -> float:
    """Linear warm-up, then half a cosine down to `final`; progress runs from 0 to 1."""
    if progress < recipe.warmup:
        return recipe.learning_rate * (progress / recipe.warmup)
    angle = math.pi * (progress - recipe.warmup) / (1 - recipe.warmup)
    return recipe.learning_rate * (recipe.final + (1 - recipe.final) * (1 + math.cos(angle)) / 2)


def make_optimizer(model: PlainModel, recipe: Recipe) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


class Run:
    """A training run: the model, its optimizer, the clock, and where they are saved."""

    def __init__(self, config: Config, recipe: Recipe, folder: Path) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.folder = recipe, folder
        self.model = PlainModel(config)
        initialise(self.model)
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
        """From 0 to 1, by the steps or by the clock."""
        if self.recipe.steps is not None:
            return min(self.step / self.recipe.steps, 1.0)
        return min(self.seconds / (60 * self.recipe.minutes), 1.0)

    def save(self) -> None:
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
        self.model.train()
        lr = learning_rate(self.recipe, self.progress)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        parts = losses(self.model, tokens)
        total = parts["main"] + self.recipe.mtp_weight * parts["mtp"]
        (total + self.recipe.balance_weight * parts["balance"]).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        imbalance = update_biases(self.model, self.recipe.bias_step)
        values = {name: value.item() for name, value in parts.items()}
        return {**values, "lr": lr, "gradient_norm": norm.item(), "imbalance": imbalance}

    def record(self, values: dict[str, float]) -> None:
        tokens = self.step * self.recipe.batch * self.recipe.window
        row = {"step": self.step, "tokens": tokens, "seconds": round(self.seconds, 1), **values}
        self.log.append({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()})


def run_until_done(
    run: Run, data: bytes, check: bytes, save_every: float = 240.0, log_every: int = 20
) -> None:
    """Trains to the end; logs every `log_every` steps, scores `check`, held out, at each save."""
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


app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="the checkpoint directory to write")] = CHECKPOINT,
    state: Annotated[Path, typer.Option(help="where the run keeps itself")] = Path("build/train"),
    minutes: float = Recipe.minutes,
    learning_rate: float = Recipe.learning_rate,
    batch: int = Recipe.batch,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 1,
) -> None:
    """Trains, or continues, and exports."""
    torch.set_num_threads(threads)
    recipe = Recipe(minutes=minutes, learning_rate=learning_rate, batch=batch)
    config = Config.preset("tiny", max_position_embeddings=recipe.window)
    data, held_out = corpus()
    text, paths = heldout_text(held_out)
    run = Run(config, recipe, state)
    size = sum(p.numel() for p in run.model.parameters())
    print(f"{size:,} parameters, {len(data):,} bytes to train on", flush=True)
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
    metrics = export(run.model, out, text, notes, run.log)
    print(json.dumps(metrics, indent=1))


if __name__ == "__main__":
    app()
