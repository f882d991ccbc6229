"""The choice of a replica for each token.

    fraction[t] = fractional part of (offset + t) / golden ratio
    slot[t, j]  = log2phy[e, floor(fraction[t] * logcnt[e])]      for e = topk_idx[t, j]

The fractions of equally spaced tokens are evenly distributed over [0, 1), so replicas get nearly
equal numbers of tokens without counting, and a token's choice depends only on its index.

Parallelization: torch elementwise operations on the device. Limit: launch latency.

Source: multiplicative (Fibonacci) hashing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.contract import Contract, check_that
from .checks import INT, check_divisors, check_ints, check_type

_GOLDEN = 2654435769  # 2^32 / golden ratio
_CONTRACT = Contract(
    "choose_replicas",
    topk_idx="int64|int32 [T, topk] strided",
    log2phy="int64 [E, X] strided",
    logcnt="int64 [E] strided",
)
_NEAREST_CONTRACT = Contract(
    "nearest_replicas", log2phy="int64 [..., E, X] strided", logcnt="int64 [..., E] strided"
)


def choose_replicas(
    topk_idx: Tensor, log2phy: Tensor, logcnt: Tensor, offset: int | Tensor = 0
) -> Tensor:
    """Maps the experts of tokens to slots of a placement. Does not wait for the device.

        slots = deepkern.choose_replicas(topk_idx, log2phy[layer], logcnt[layer], offset=step)

    Args:
        topk_idx: int64 or int32 [T, topk], the experts of each token from `route_topk`.
        log2phy: int64 [E, X], one layer of `rebalance_experts` on the same device.
        logcnt: int64 [E].
        offset: the index of the first token, an int or an integer tensor of one element. Use
            different values on different ranks and steps; otherwise a batch of one token always
            goes to the first replica.

    Returns:
        int64 [T, topk], slots in [0, R); -1 for indices outside [0, E).

    Raises:
        TypeError, ValueError: an argument violates the rules above.
    """
    check_type("choose_replicas", "offset", offset, (*INT, Tensor), "an int or a Tensor")
    _CONTRACT.check({"topk_idx": topk_idx, "log2phy": log2phy, "logcnt": logcnt})
    expert = topk_idx.long()
    E, X = log2phy.shape
    if not E or not X:
        return torch.full_like(expert, -1)
    valid = (expert >= 0) & (expert < E)
    expert = expert.where(valid, 0)
    token = torch.arange(topk_idx.shape[0], device=topk_idx.device)[:, None] + offset
    fraction = (token * _GOLDEN) & 0xFFFFFFFF  # in units of 2^-32
    replica = (fraction * logcnt[expert]) >> 32
    return log2phy[expert, replica.clamp(0, X - 1)].where(valid, -1)


def nearest_replicas(
    log2phy: Tensor,
    logcnt: Tensor,
    gpu: int,
    num_replicas: int,
    num_gpus: int,
    num_nodes: int = 1,
) -> tuple[Tensor, Tensor]:
    """The replicas nearest to one GPU: those on it, else those on its node, else all.

        near, count = deepkern.nearest_replicas(log2phy, logcnt, gpu, 288, num_gpus=32, num_nodes=4)
        slots = deepkern.choose_replicas(topk_idx, near[layer], count[layer])

    It reduces traffic at the cost of balance: `rebalance_experts` assumes that all replicas of an
    expert get equal numbers of tokens.

    Args:
        log2phy: int64 [..., E, X].
        logcnt: int64 [..., E].
        gpu: the GPU of the tokens.
        num_replicas, num_gpus, num_nodes: R and the cluster, as for `rebalance_experts`.

    Returns:
        log2phy, logcnt: in the same shapes, with the nearest replicas only.

    Raises:
        TypeError, ValueError: an argument violates the rules above.
    """
    name = "nearest_replicas"
    _NEAREST_CONTRACT.check({"log2phy": log2phy, "logcnt": logcnt})
    check_ints(name, gpu=gpu, num_replicas=num_replicas, num_gpus=num_gpus, num_nodes=num_nodes)
    divisors = ("num_gpus", num_gpus, num_replicas), ("num_nodes", num_nodes, num_gpus)
    check_divisors(name, *divisors)
    check_that(name, "gpu", 0 <= gpu < num_gpus, f"0 to {num_gpus - 1}", gpu)
    slots, gpus_per_node = num_replicas // num_gpus, num_gpus // num_nodes
    is_replica = torch.arange(log2phy.shape[-1], device=log2phy.device) < logcnt[..., None]
    gpu_of = torch.where(is_replica, log2phy // slots, -1)
    on_gpu, on_node = gpu_of == gpu, is_replica & (gpu_of // gpus_per_node == gpu // gpus_per_node)
    kept = torch.where(on_node.any(-1, keepdim=True), on_node, is_replica)
    kept = torch.where(on_gpu.any(-1, keepdim=True), on_gpu, kept)
    order = kept.logical_not().to(torch.uint8).argsort(dim=-1, stable=True)
    nearest = log2phy.gather(-1, order).where(kept.gather(-1, order), -1)
    return nearest, kept.sum(-1)
