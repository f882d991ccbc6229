"""The placement of expert replicas in plain PyTorch: DeepSeek's EPLB.

The native planner starts from this placement and improves it, so its balance is at least as good.

Source: https://github.com/deepseek-ai/EPLB, the policy.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rebalance_experts(
    load: Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[Tensor, Tensor, Tensor]:
    L, E = load.shape
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    # Scale by a power of two, which is exact, so that float32 does not overflow.
    exponent = torch.frexp(load.double().amax(1, keepdim=True)).exponent
    load = torch.ldexp(load.double(), -exponent).float()

    groups = load.view(L, num_groups, -1)  # [L, G, E/G]
    order = pack(groups.double().sum(-1).float(), num_nodes)  # [L, G]
    experts = torch.arange(E).view(num_groups, -1)[order].view(L * num_nodes, -1)
    node_load = load.gather(1, experts.view(L, E)).view(L * num_nodes, -1)  # [L·nodes, E/nodes]
    expert, count = replicate(node_load, num_replicas // num_nodes)
    replica_load = (node_load / count).gather(1, expert)  # [L·nodes, R/nodes]
    local = expert.gather(1, pack(replica_load, num_gpus // num_nodes))
    phy2log = experts.gather(1, local).view(L, num_replicas)
    return phy2log, *replicas_of(phy2log, E)


def pack(weight: Tensor, bins: int) -> Tensor:
    """Puts items [X, n], largest first, into the lightest bin with room; returns [X, n] by bin."""
    X, n = weight.shape
    if n == bins:
        return torch.arange(n).expand(X, n)
    packed = torch.empty(X, n, dtype=torch.int64)
    for x, order in enumerate(weight.sort(dim=1, descending=True, stable=True).indices.tolist()):
        items: list[list[int]] = [[] for _ in range(bins)]
        bin_weight = [torch.zeros(())] * bins
        with_room = list(range(bins))
        for item in order:
            lightest = min(with_room, key=bin_weight.__getitem__)
            items[lightest].append(item)
            bin_weight[lightest] = bin_weight[lightest] + weight[x, item]
            if len(items[lightest]) == n // bins:
                with_room.remove(lightest)
        packed[x] = torch.tensor(items).flatten()
    return packed


def replicate(load: Tensor, replicas: int) -> tuple[Tensor, Tensor]:
    """Gives each spare replica to the expert with the largest load per replica.

    load: [X, n]. Returns the expert of each replica, [X, replicas], and the replicas of each
    expert, [X, n].
    """
    X, n = load.shape
    count = torch.ones(X, n, dtype=torch.int64)
    expert = torch.arange(n).repeat(X, 1)
    for _ in range(replicas - n):
        most = (load / count).argmax(1, keepdim=True)  # [X, 1]
        count.scatter_add_(1, most, torch.ones_like(most))
        expert = torch.cat([expert, most], 1)
    return expert, count


def replicas_of(phy2log: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """log2phy [L, E, X], the slots of each expert in ascending order, then -1; logcnt [L, E]."""
    L, R = phy2log.shape
    logcnt = torch.zeros(L, num_experts, dtype=torch.int64)
    logcnt.scatter_add_(1, phy2log, torch.ones_like(phy2log))
    log2phy = torch.full((L, num_experts, int(logcnt.max()) if L else 1), -1)
    slot = phy2log.argsort(dim=1, stable=True)  # [L, R], sorted by expert
    expert = phy2log.gather(1, slot)
    rank = torch.arange(R) - (logcnt.cumsum(1) - logcnt).gather(1, expert)
    log2phy[torch.arange(L)[:, None], expert, rank] = slot
    return log2phy, logcnt
