"""How much each expert has to do of late."""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.contract import check_that


class LoadStatistics:
    """Tokens per expert and layer, of which those long ago count less; for `rebalance_experts`.

        load[layer] = load[layer] * 2^(-1 / half_life) + tokens_per_expert

    Counts are added where they are, without waiting for the device. On several ranks, sum `load`
    over them before planning.

    Args:
        num_layers, num_experts: L and E.
        half_life: a layer's counts weigh half after so many more updates of it.
        device: where the counts are.

    Attributes:
        load: float64 [L, E].
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        half_life: float,
        device: torch.device | str | None = None,
    ):
        check_that("LoadStatistics", "half_life", half_life > 0, "more than 0", half_life)
        self.decay = 2.0 ** (-1.0 / half_life)
        self.load = torch.zeros(num_layers, num_experts, dtype=torch.float64, device=device)

    def update(self, layer: int, tokens_per_expert: Tensor) -> None:
        """Adds what one step gave layer `layer`: integer or real [E]."""
        L, E = self.load.shape
        check_that("LoadStatistics", "layer", 0 <= layer < L, f"0 to {L - 1}", layer)
        shape = tuple(tokens_per_expert.shape)
        check_that("LoadStatistics", "tokens_per_expert", shape == (E,), f"shape {(E,)}", shape)
        self.load[layer].mul_(self.decay).add_(tokens_per_expert)
