"""A training run: one step after another, its log, and its checkpoints.

    run = Run(config, recipe, corpus.tokens, Path("runs/first"))
    for row in run.steps():
        print(row["main"])

A step whose loss or gradient is not finite, or whose loss is a spike, changes only the step
number; its row of the log says why.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import deepkern
from model.config import Config
from model.training.data import batch_of_step
from model.training.exchange import initialize
from model.training.modules import TrainableDeepSeek
from model.training.optimizer import make_optimizer
from model.training.parallel import Parallel
from model.training.recipe import Recipe

LOG = "log.jsonl"
SMOOTHING = 0.95  # of the running mean of the loss
MOST_SPIKES = 5  # steps in a row that are skipped for their loss
MOST_SKIPPED = 20  # steps in a row that are skipped for any reason


class Run:
    """Model, optimizer, position and log of a run.

    tokens: uint8 or int32 [N], see `read_corpus`.
    folder: holds the log; None keeps no log.
    parallel: the layout of the processes, of which each has a Run; by default one process.  All
        have the same log; the main one writes it.
    """

    def __init__(
        self,
        config: Config,
        recipe: Recipe,
        tokens: Tensor,
        folder: Path | None = None,
        parallel: Parallel | None = None,
    ) -> None:
        self.recipe, self.tokens, self.folder = recipe, tokens, folder
        self.parallel = parallel = parallel or Parallel()
        parallel.layout.check(config, recipe)
        self.rank, self.is_main = parallel.rank, parallel.is_main
        self.model = TrainableDeepSeek(config, recipe.precision, recipe.recompute, parallel)
        parallel.shard(self.model)
        initialize(self.model, recipe.seed)
        self.optimizer = make_optimizer(self.model, recipe)
        self.tokens_checksum = hashlib.sha256(tokens.numpy()).hexdigest()
        self.step = 0  # steps taken, skipped ones included
        self.mean_loss: float | None = None  # running mean, of steps that were not skipped
        self.log: list[dict[str, Any]] = []
        self.log_incomplete = False  # the file, because the disk was full

    def steps(self) -> Iterator[dict[str, Any]]:
        """Takes the remaining steps; yields the row of the log after each.

        Raises FloatingPointError after 20 skipped steps in a row.
        """
        while self.step < self.recipe.steps:
            row = self.take_step()
            yield row
            if self.skipped_in_a_row() >= MOST_SKIPPED:
                text = f"steps {self.step - MOST_SKIPPED + 1} to {self.step} were all skipped"
                advice = "lower the learning rate, or continue from an earlier checkpoint"
                raise FloatingPointError(f"{text}, the last because {row['skipped']}: {advice}")

    def take_step(self) -> dict[str, Any]:
        """One optimizer step on the next batch; returns its row of the log.

        Raises ParallelError, which names the ranks, if another process fails or is silent.
        """
        with self.parallel.naming_lost_ranks(f"step {self.step + 1}"):
            return self._take_step()

    def _take_step(self) -> dict[str, Any]:
        start = time.monotonic()
        rate = self.recipe.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses = self.gradients(batch_of_step(self.tokens, self.recipe, self.step))
        norm = self.parallel.clip_norm(self.model.parameters(), self.recipe.clip)
        skipped = self.reason_to_skip(losses["main"], norm)
        load = self.expert_load()
        if skipped is None:
            self.optimizer.step()
            self.update_biases(load)
            mean = losses["main"] if self.mean_loss is None else self.mean_loss
            self.mean_loss = SMOOTHING * mean + (1 - SMOOTHING) * losses["main"]
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        seconds = time.monotonic() - start
        row = {
            "step": self.step,
            "tokens": self.step * self.recipe.tokens_per_step,
            **losses,
            "rate": rate,
            "gradient_norm": norm,
            **load_statistics(load),
            "seconds": seconds,
        }
        if skipped is not None:
            row["skipped"] = skipped
        return self.record(row)

    def gradients(self, tokens: Tensor) -> dict[str, float]:
        """Losses of the batch, int64 [batch, window + 1]; adds their gradient to the weights."""
        self.model.train()
        losses = self.model(self.parallel.rows(tokens))
        weights = {
            "main": 1.0,
            "mtp": self.recipe.mtp_weight,
            "balance": self.recipe.balance_weight,
        }
        torch.stack([weights[name] * loss for name, loss in losses.items()]).sum().backward()
        return self.parallel.mean(losses)

    def reason_to_skip(self, loss: float, norm: float) -> str | None:
        """Why the step must not change the weights, or None."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm):
            return f"the norm of the gradient is {norm}"
        above = 0.0 if self.mean_loss is None else loss - self.mean_loss
        # A loss that stays high is no spike: the mean must be able to follow it.
        if above > self.recipe.spike and self.skipped_in_a_row() < MOST_SPIKES:
            return f"the loss {loss:.3f} is {above:.3f} above its running mean"
        return None

    def skipped_in_a_row(self) -> int:
        """The number of newest steps that were skipped."""
        steps = [row for row in self.log if "seconds" in row]
        return next(
            (n for n, row in enumerate(reversed(steps)) if "skipped" not in row), len(steps)
        )

    def expert_load(self) -> Tensor:
        """int64 [layers with experts, E], the tokens of each expert in the last pass."""
        loads = [moe.load for moe in self.model.experts]
        if not loads:
            return torch.zeros(0, 0, dtype=torch.int64)
        return self.parallel.sum(torch.stack(loads).long())

    @torch.no_grad()
    def update_biases(self, load: Tensor) -> None:
        """Moves the selection bias of each expert by `bias_rate` towards an even load."""
        for moe, row in zip(self.model.experts, load, strict=True):
            bias = moe.gate.e_score_correction_bias
            if bias is not None:
                bias.copy_(deepkern.update_expert_bias(bias, row, self.recipe.bias_rate))

    def record(self, row: dict[str, Any]) -> dict[str, Any]:
        """Appends a row to the log and to its file; returns it with rounded values.

        A value that is not finite becomes None, because JSON has no name for it.

        If the file cannot be written, a warning names it, and the next row rewrites the file.
        """
        row = {name: rounded(value) for name, value in row.items()}
        self.log.append(row)
        if self.folder is not None and self.is_main:
            path = self.folder / LOG
            try:
                if self.log_incomplete:
                    write_log(path, self.log)
                else:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    with path.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                self.log_incomplete = False
            except OSError as error:
                self.log_incomplete = True
                warnings.warn(f"{path}: {error.strerror}; a later row rewrites it", stacklevel=2)
        return row

    @torch.no_grad()
    def predict(self, tokens: Tensor) -> Tensor:
        """int64 [B, S], equal on all ranks -> logits [B, S, vocab], in the precision of the run."""
        self.model.eval()
        with self.parallel.naming_lost_ranks(f"evaluation after step {self.step}"):
            logits = self.model.predict(tokens.to(self.parallel.device))
        self.parallel.reshard(self.model)
        return logits.to(tokens.device)


def write_log(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replaces the file atomically."""
    fresh = path.with_name(f".{path.name}.new")
    with fresh.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


def rounded(value: Any) -> Any:
    """A float with 6 decimals, or None if it is not finite; other values as they are."""
    if not isinstance(value, float):
        return value
    return round(value, 6) if math.isfinite(value) else None


def load_statistics(load: Tensor) -> dict[str, Any]:
    """Of the layers with experts: entropy of the load and its largest value over the mean.

    entropy: 1 for an even load, 0 if one expert has all tokens; the least of the layers.
    """
    if not load.numel():
        return {}
    fraction = load / load.sum(1, keepdim=True).clamp(min=1)
    entropy = torch.special.entr(fraction).sum(1) / math.log(max(load.shape[1], 2))
    return {
        "load_entropy": entropy.min().item(),
        "load_max": fraction.max(1).values.mul(load.shape[1]).tolist(),
    }
