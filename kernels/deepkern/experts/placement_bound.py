"""The load of each GPU under a placement, and a lower bound for the largest load.

    gpu_loads[g] = Σ over the replicas on GPU g of load[e] / replicas of e

Runs on the host, in float64.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..reference.placement import replicate
from ..runtime.contract import Contract, check_that
from .checks import check_cluster, check_divisors, check_ints, checked_load

CONTRACT = Contract("gpu_loads", phy2log="int64 [L, R]")


def gpu_loads(load: Tensor | np.ndarray, phy2log: Tensor, num_gpus: int) -> Tensor:
    """The load of each GPU if replicas of an expert get equal parts of its load.

        phy2log, log2phy, logcnt = deepkern.rebalance_experts(load, 288, 8, 4, 32)
        largest = deepkern.gpu_loads(load, phy2log, num_gpus=32).amax(1)

    Args:
        load: real or integer [L, E], as for `rebalance_experts`.
        phy2log: int64 [L, R] on the CPU, from `rebalance_experts`.
        num_gpus: a divisor of R.

    Returns:
        float64 [L, num_gpus].

    Raises:
        TypeError, ValueError: an argument violates the rules above; a slot of `phy2log` is not an
            expert in [0, E).
    """
    name = "gpu_loads"
    load = torch.from_numpy(checked_load(name, load))
    CONTRACT.check({"phy2log": phy2log})
    check_ints(name, num_gpus=num_gpus)
    device, E, (L, R) = phy2log.device, load.shape[1], phy2log.shape
    check_that(name, "phy2log", device.type == "cpu", "a tensor on the CPU", f"one on {device}")
    check_that(name, "phy2log", len(load) == L, f"L = {len(load)} layers", f"{L}")
    check_divisors(name, ("num_gpus", num_gpus, R))
    wrong = phy2log[(phy2log < 0) | (phy2log >= E)].tolist()
    check_that(name, "phy2log", not wrong, f"experts in [0, {E})", wrong[0] if wrong else None)
    count = torch.zeros(load.shape, dtype=torch.float64)
    count.scatter_add_(1, phy2log, torch.ones(L, R, dtype=torch.float64))
    return (load / count).gather(1, phy2log).view(L, num_gpus, R // num_gpus).sum(2)


def placement_bound(
    load: Tensor | np.ndarray, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> Tensor:
    """A lower bound for the largest GPU load of any placement of `rebalance_experts`.

        bound = deepkern.placement_bound(load, 288, 8, 4, 32)

    It is the maximum of: the mean load of a GPU; the least possible largest load of a replica; and,
    where groups are bound to nodes, the mean load of a GPU on the most loaded node of the best
    assignment of groups, and the largest load of a replica in a group that has all the spare
    replicas of its node. The bound may be unreachable.

    Args:
        load, num_replicas, num_groups, num_nodes, num_gpus: as for `rebalance_experts`.

    Returns:
        float64 [L].

    Raises:
        TypeError, ValueError: an argument violates the rules of `rebalance_experts`.
    """
    name = "placement_bound"
    load = torch.from_numpy(checked_load(name, load))
    L, E = load.shape
    check_cluster(name, E, num_replicas, num_groups, num_nodes, num_gpus)
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    groups = load.view(L, num_groups, E // num_groups)
    spare = (num_replicas - E) // num_nodes
    replica = largest_replica(groups.flatten(0, 1), E // num_groups + spare).view(L, num_groups)

    # Two groups per node: the best assignment pairs the heaviest group with the lightest, and so
    # on. Otherwise the node of the heaviest group has at least the lightest groups in addition.
    per_node = num_groups // num_nodes
    heavy_first = groups.sum(2).sort(1, descending=True).values  # [L, G]
    if per_node == 2:
        node = (heavy_first + heavy_first.flip(1)).amax(1)
    else:
        node = heavy_first[:, 0] + heavy_first[:, num_groups - per_node + 1 :].sum(1)
    gpus_per_node = num_gpus // num_nodes
    return torch.stack([load.sum(1) / num_gpus, node / gpus_per_node, replica.amax(1)]).amax(0)


def largest_replica(load: Tensor, replicas: int) -> Tensor:
    """[X]: the least possible largest load of a replica, for `replicas` replicas of [X, n]."""
    return (load / replicate(load, replicas)[1]).amax(1)
