"""What a placement of experts gives, and what none can better."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..reference.placement import replicate
from ..runtime.contract import Contract, check_that
from .rebalance_experts import check_cluster, checked_load

CONTRACT = Contract("gpu_loads", phy2log="int64 [L, R]")


def gpu_loads(load: Tensor | np.ndarray, phy2log: Tensor, num_gpus: int) -> Tensor:
    """float64 [L, num_gpus]: the load of each GPU if replicas of an expert share it equally.

    Args:
        load: real or integer [L, E], as for `rebalance_experts`.
        phy2log: int64 [L, R] on the CPU, from there.
        num_gpus: a divisor of R.

    Raises:
        TypeError, ValueError: an argument is not as above; a slot holds no expert of [0, E).
    """
    name = "gpu_loads"
    load = torch.from_numpy(checked_load(name, load))
    CONTRACT.check({"phy2log": phy2log})
    on, E, (L, R) = phy2log.device, load.shape[1], phy2log.shape
    check_that(name, "phy2log", on.type == "cpu", "a tensor on the CPU", f"one on {on}")
    check_that(name, "phy2log", len(load) == L, f"L = {len(load)} layers", f"{L}")
    fits = num_gpus >= 1 and R % num_gpus == 0
    check_that(name, "num_gpus", fits, f"a divisor of R = {R}", num_gpus)
    wrong = phy2log[(phy2log < 0) | (phy2log >= E)].tolist()
    check_that(name, "phy2log", not wrong, f"experts in [0, {E})", wrong[0] if wrong else None)
    count = torch.zeros(load.shape, dtype=torch.float64)
    count.scatter_add_(1, phy2log, torch.ones(L, R, dtype=torch.float64))
    return (load / count).gather(1, phy2log).view(L, num_gpus, R // num_gpus).sum(2)


def placement_bound(
    load: Tensor | np.ndarray, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> Tensor:
    """float64 [L]: no placement that `rebalance_experts` may return has a fullest GPU below this.

    The largest of: the mean over GPUs; the smallest possible largest share of a replica; and, where
    groups are bound to nodes, the mean over the GPUs of the node that is fullest at best, and the
    largest share in a group that had all the spare replicas of its node. Arguments as for
    `rebalance_experts`. The bound need not be reachable.
    """
    name = "placement_bound"
    load = torch.from_numpy(checked_load(name, load))
    L, E = load.shape
    check_cluster(name, E, num_replicas, num_groups, num_nodes, num_gpus)
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    groups = load.view(L, num_groups, E // num_groups)
    spare = (num_replicas - E) // num_nodes
    share = largest_share(groups.flatten(0, 1), E // num_groups + spare).view(L, num_groups)

    # Two groups to a node: at best the heaviest stands with the lightest, and so on. Otherwise the
    # heaviest has at least the lightest beside it.
    per_node = num_groups // num_nodes
    heavy_first = groups.sum(2).sort(1, descending=True).values  # [L, G]
    if per_node == 2:
        node = (heavy_first + heavy_first.flip(1)).amax(1)
    else:
        node = heavy_first[:, 0] + heavy_first[:, num_groups - per_node + 1 :].sum(1)
    gpus_of_node = num_gpus // num_nodes
    return torch.stack([load.sum(1) / num_gpus, node / gpus_of_node, share.amax(1)]).amax(0)


def largest_share(load: Tensor, replicas: int) -> Tensor:
    """[X]: the largest load per replica, as small as `replicas` replicas of [X, n] can make it."""
    return (load / replicate(load, replicas)[1]).amax(1)
