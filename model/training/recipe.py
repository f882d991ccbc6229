"""The options of a training run that are not the model's config."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

Precision = Literal["fp32", "bf16", "fp8"]
CHOICES = {
    "precision": ("fp32", "bf16", "fp8"),
    "optimizer": ("adamw", "muon"),
    "schedule": ("cosine", "report"),
}


@dataclass(frozen=True)
class Recipe:
    """Length, batch, rates and losses of a run.

    Two runs of one recipe use the same batches at the same learning rates on every machine.

    precision: of the Linears and experts that DeepSeek-V3 trains in FP8.  With "fp8" and "bf16"
        the activations are bf16, with "fp32" they are fp32.  Weights, gradients and the router are
        fp32 in all three.
    recompute: norms and the up-projections of the attention run again in the backward pass, so that
        their outputs are not saved.
    spike: a step is skipped whose loss is this much above the running mean of the loss, in nats.
    """

    steps: int = 2000
    batch: int = 4  # sequences in a step, over all processes
    window: int = 512  # tokens in a sequence
    learning_rate: float = 3e-3
    warmup: float = 0.02  # fraction of the run
    final: float = 0.05  # last learning rate / learning_rate, of the cosine
    schedule: Literal["cosine", "report"] = "cosine"
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = 0.1
    clip: float = 1.0  # largest norm of the gradient
    mtp_weight: float = 0.2
    balance_weight: float = 1e-4
    bias_rate: float = 1e-3
    seed: int = 1
    precision: Precision = "fp8"
    recompute: bool = True
    spike: float = 2.0

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                expected = ", ".join(choices)
                raise ValueError(f"Recipe: {name}: expected {expected}, got {getattr(self, name)}")
        for name in ("steps", "batch", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"Recipe: {name}: expected 1 or more, got {getattr(self, name)}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """A recipe from its JSON; a key that no option has raises ValueError."""
        unknown = values.keys() - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"Recipe: {', '.join(sorted(unknown))}: no such option")
        return cls(**values)

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.window

    def rate(self, step: int) -> float:
        """The learning rate of step `step`, from 0."""
        progress = (step + 1) / self.steps
        if progress < self.warmup:
            return self.learning_rate * (progress / self.warmup)
        if self.schedule == "report":
            return self.learning_rate * self._report(progress)
        angle = math.pi * (progress - self.warmup) / max(1 - self.warmup, 1e-9)
        return self.learning_rate * (self.final + (1 - self.final) * (1 + math.cos(angle)) / 2)

    def _report(self, progress: float) -> float:
        """DeepSeek-V3's schedule (section 4.2) by the fraction of its 14.8 T tokens.

        Constant to 10 T, a cosine to a tenth over 4.3 T, constant for 333 B, a thirtieth at last.
        """
        constant, decayed, last = 10 / 14.8, 14.3 / 14.8, 14.633 / 14.8
        if progress < constant:
            return 1.0
        if progress < decayed:
            angle = math.pi * (progress - constant) / (decayed - constant)
            return 0.1 + 0.9 * (1 + math.cos(angle)) / 2
        return 0.1 if progress < last else 0.1 / 3
