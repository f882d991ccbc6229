"""Which replica of its expert a token goes to.

    fraction[t] = fractional part of (offset + t) / golden ratio
    slot[t, j]  = log2phy[e, floor(fraction[t] * logcnt[e])]      for e = topk_idx[t, j]

The fractions of any tokens at equal distances spread evenly over [0, 1), so that replicas get
nearly equal parts without counting, and a token's choice depends on nothing but its number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.contract import Contract, check_that

_GOLDEN = 2654435769  # 2^32 / golden ratio
_CONTRACT = Contract(
    "choose_replicas",
    topk_idx="int64|int32 [T, topk] strided",
    log2phy="int64 [E, X] strided",
    logcnt="int64 [E] strided",
)


def choose_replicas(
    topk_idx: Tensor, log2phy: Tensor, logcnt: Tensor, offset: int | Tensor = 0
) -> Tensor:
    """Turns the experts of tokens into slots of a placement. Runs on the device, waits for nothing.

    Args:
        topk_idx: int64 or int32 [T, topk], the experts of each token from `route_topk`.
        log2phy: int64 [E, X], one layer of `rebalance_experts` on the same device.
        logcnt: int64 [E].
        offset: the number of the first token, an int or an integer tensor of one element: let it
            differ between ranks and steps, or a batch of one token always takes the first replica.

    Returns:
        int64 [T, topk], slots in [0, R); -1 for what is no expert.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
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
    """The replicas that tokens of one GPU should go to: its own, else its node's, else all.

    For `choose_replicas`, in place of log2phy and logcnt. It saves traffic and gives up balance:
    a plan of `rebalance_experts` takes all replicas of an expert as equally used.

    Args:
        log2phy: int64 [..., E, X].
        logcnt: int64 [..., E].
        gpu: the GPU that the tokens are on.
        num_replicas, num_gpus, num_nodes: R, and the cluster, as for `rebalance_experts`.

    Returns:
        log2phy, logcnt: of the same shapes, with the nearest replicas alone.
    """
    name = "nearest_replicas"
    for argument, whole, part in (
        ("num_gpus", num_replicas, num_gpus),
        ("num_nodes", num_gpus, num_nodes),
    ):
        check_that(name, argument, part >= 1 and whole % part == 0, f"a divisor of {whole}", part)
    check_that(name, "gpu", 0 <= gpu < num_gpus, f"0 to {num_gpus - 1}", gpu)
    slots, gpus_of_node = num_replicas // num_gpus, num_gpus // num_nodes
    replica = torch.arange(log2phy.shape[-1], device=log2phy.device) < logcnt[..., None]
    there = torch.where(replica, log2phy // slots, -1)  # the GPU of each replica
    near = (there == gpu, replica & (there // gpus_of_node == gpu // gpus_of_node), replica)
    found = [n.any(-1, keepdim=True) for n in near]
    kept = torch.where(found[0], near[0], torch.where(found[1], near[1], near[2]))
    order = kept.logical_not().to(torch.uint8).argsort(dim=-1, stable=True)
    chosen = log2phy.gather(-1, order).where(kept.gather(-1, order), -1)
    return chosen, kept.sum(-1)
