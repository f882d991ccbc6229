"""How many processes of a training job do what; `model/training/parallel.py` explains it."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch.distributed as dist

from model.config import Config
from model.training.recipe import Recipe


def processes_of_job() -> int:
    """The number of processes that torchrun started, 1 without it."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


@dataclass(frozen=True)
class Layout:
    """The number of ranks in each direction; data · context · tensor is the number of processes.

    experts: consecutive ranks that divide the experts of a layer; a divisor of that number.
    """

    data: int = 1
    context: int = 1
    tensor: int = 1
    experts: int = 1

    @property
    def processes(self) -> int:
        return self.data * self.context * self.tensor

    def check(self, config: Config, recipe: Recipe) -> None:
        """Raises ValueError for a size that does not divide what it must divide."""
        c = config
        for name in ("data", "context", "tensor", "experts"):
            if getattr(self, name) < 1:
                raise ValueError(f"Layout: {name}: expected 1 or more, got {getattr(self, name)}")
        dense = {"intermediate_size": c.intermediate_size}
        if c.n_shared_experts and c.n_routed_experts:
            dense["shared experts' size"] = c.moe_intermediate_size * c.n_shared_experts
        sizes: dict[str, dict[str, int]] = {
            "data": {"batch": recipe.batch},
            "tensor": {"num_attention_heads": c.num_attention_heads, **dense},
            "experts": {"n_routed_experts": c.n_routed_experts, "processes": self.processes},
        }
        for name, divided in sizes.items():
            for what, size in divided.items():
                count = getattr(self, name)
                if count > 1 and (size < count or size % count):
                    text = f"expected a divisor of {what} = {size}, got {count}"
                    raise ValueError(f"Layout: {name}: {text}")
        if self.context > 1 and recipe.window % (2 * self.context):
            text = f"expected a multiple of 2 * context = {2 * self.context}, got {recipe.window}"
            raise ValueError(f"Layout: window: {text}")
