"""DeepSeek's EPLB under its name, computed by deepkern.

    import deepkern.compat.eplb as eplb

Names, arguments and results are those of https://github.com/deepseek-ai/EPLB. The placement is as
valid as EPLB's and its fullest GPU holds no more, but it is not the same placement: slots of a GPU
are in the order of their experts, and log2phy lists an expert's slots in ascending order. What EPLB
asserts, or takes without asking (negative or NaN weights), raises ValueError naming the argument.
"""

from __future__ import annotations

from torch import Tensor

from .. import experts

__all__ = ["rebalance_experts"]


def rebalance_experts(
    weight: Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Places replicas of experts on GPUs: `deepkern.rebalance_experts`.

    Args:
        weight: [layers, num_logical_experts], the load of each expert.
        num_replicas: number of physical experts, a multiple of num_gpus.
        num_groups: number of groups of experts.
        num_nodes: number of nodes; where it divides num_groups, a group stays on one node.
        num_gpus: number of GPUs, then a multiple of num_nodes.

    Returns:
        physical_to_logical_map: int64 [layers, num_replicas].
        logical_to_physical_map: int64 [layers, num_logical_experts, X], -1 where there is none.
        expert_count: int64 [layers, num_logical_experts].
    """
    return experts.rebalance_experts(weight, num_replicas, num_groups, num_nodes, num_gpus)
