"""The number of replicas of each expert and the GPU of each replica, from the load of the experts.

    load of a GPU = Σ over its replicas of load[e] / logcnt[e]

The most loaded GPU determines the time of a step, so its load is minimized. The policy is that of
DeepSeek's EPLB: if num_nodes divides num_groups, whole groups of experts go to nodes, so that
group-limited routing sends a token to few nodes; otherwise all GPUs are one pool. A native search
(csrc/host/rebalance_experts.cpp) improves EPLB's placement.

Limit: none that matters. It runs on the host, on a copy of the load, a few ms per plan, and a plan
is made every few minutes.

Source: https://github.com/deepseek-ai/EPLB.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from ..reference import placement as reference
from ..runtime import native
from ..runtime.contract import check_that
from .checks import check_cluster, check_ints, check_type, checked_load

NAME = "rebalance_experts"


def rebalance_experts(
    load: Tensor | np.ndarray, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Replicates experts and places the replicas so that the largest GPU load is small.

        phy2log, log2phy, logcnt = deepkern.rebalance_experts(
            load, num_replicas=288, num_groups=8, num_nodes=4, num_gpus=32)

    Args:
        load: real or integer [L, E], the load of each expert in each layer, >= 0: a tensor on any
            device (copied to the host, which waits for it) or a numpy array.
        num_replicas: R >= E, a multiple of num_gpus; GPU g has R/num_gpus slots, from
            g·R/num_gpus on.
        num_groups: groups of E/num_groups consecutive experts.
        num_nodes: if it divides num_groups, all experts of a group are on one node, and a node has
            num_gpus/num_nodes consecutive GPUs; otherwise groups and nodes are ignored.
        num_gpus: a multiple of num_nodes if num_nodes divides num_groups.

    Returns:
        phy2log: int64 [L, R] on the CPU, the expert of each slot.
        log2phy: int64 [L, E, X], the slots of each expert in ascending order, then -1; X is the
            largest number of replicas of any expert.
        logcnt: int64 [L, E], the replicas of each expert, at least 1.

    The same load gives the same placement on every machine. The largest GPU load of a layer is at
    most that of DeepSeek's EPLB. Without deepkern._host the result is EPLB's placement, computed
    in PyTorch, with a RuntimeWarning.

    Raises:
        TypeError, ValueError: an argument violates the rules above; load is negative, NaN or
            infinite.
    """
    load = checked_load(NAME, load)
    check_cluster(NAME, load.shape[1], num_replicas, num_groups, num_nodes, num_gpus)
    cluster = num_replicas, num_groups, num_nodes, num_gpus
    try:
        host = native.host()
    except ImportError as error:
        warnings.warn(
            f"{NAME}: {error}; without it the call is slow, and the balance is only that of EPLB",
            RuntimeWarning,
            stacklevel=2,
        )
        return reference.rebalance_experts(torch.from_numpy(load), *cluster)
    phy2log = torch.from_numpy(host.rebalance_experts(load, *cluster))
    return phy2log, *replicas_of(phy2log, load.shape[1])


def replicas_of(phy2log: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """log2phy and logcnt of a valid placement."""
    log2phy, logcnt = native.host().replicas_of(phy2log.numpy(), num_experts)
    return torch.from_numpy(log2phy), torch.from_numpy(logcnt)


class LoadStatistics:
    """Tokens per expert and layer, with exponential decay; the `load` of `rebalance_experts`.

        load[layer] = load[layer] * 2^(-1 / half_life) + tokens_per_expert

        statistics = deepkern.LoadStatistics(num_layers=58, num_experts=256, half_life=1000)
        statistics.update(layer, tokens_per_expert)                       # in every step
        plan = deepkern.rebalance_experts(statistics.load, 288, 8, 4, 32)

    Counts are added on their device, without waiting for it. On several ranks, sum `load` over the
    ranks before planning.

    Args:
        num_layers, num_experts: L and E.
        half_life: updates of a layer after which its counts have half their weight.
        device: the device of the counts.

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
        name = "LoadStatistics"
        check_ints(name, num_layers=num_layers, num_experts=num_experts)
        check_type(name, "half_life", half_life, (int, float, np.number), "a number")
        check_that(name, "half_life", half_life > 0, "more than 0", half_life)
        self.decay = 2.0 ** (-1.0 / half_life)
        self.load = torch.zeros(num_layers, num_experts, dtype=torch.float64, device=device)

    def update(self, layer: int, tokens_per_expert: Tensor) -> None:
        """Adds the counts of one step of layer `layer`: integer or real [E]."""
        name, (L, E) = "LoadStatistics", self.load.shape
        check_ints(name, layer=layer)
        check_type(name, "tokens_per_expert", tokens_per_expert, (Tensor,), "a Tensor [E]")
        check_that(name, "layer", 0 <= layer < L, f"0 to {L - 1}", layer)
        shape = tuple(tokens_per_expert.shape)
        check_that(name, "tokens_per_expert", shape == (E,), f"shape {(E,)}", shape)
        self.load[layer].mul_(self.decay).add_(tokens_per_expert)
