"""Shared by the tests of models: random weights, and the operators that a pass calls."""

from __future__ import annotations

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Weights of deviation 1/sqrt(inputs), norms from 0.5 to 1.5, selection biases around 0."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.uniform_(0.5, 1.5)
        else:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.2)


class Calls(TorchDispatchMode):
    """Counts the operators that are called in the block, not those inside of an op.

    counts: of deepkern.  others: all other ones.
    """

    def __enter__(self):
        self.counts: Counter[str] = Counter()
        self.others: Counter[str] = Counter()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        counter = self.counts if function.namespace == "deepkern" else self.others
        counter[function.__name__.split(".")[0]] += 1
        return function(*args, **(kwargs or {}))
