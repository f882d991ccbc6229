"""DeepSeek's EPLB, computed by deepkern.

    import deepkern.compat.eplb as eplb

Names, arguments and results are those of https://github.com/deepseek-ai/EPLB. The placement differs
from EPLB's: the most loaded GPU has at most the load of EPLB's, slots of a GPU are in the order of
their experts, and log2phy lists an expert's slots in ascending order. Arguments that EPLB asserts
against, and negative or NaN weights, which it accepts, raise a ValueError that names the argument.
"""

from __future__ import annotations

from torch import Tensor

import deepkern

__all__ = ["rebalance_experts"]


def rebalance_experts(
    weight: Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Place replicas of experts on GPUs: `deepkern.rebalance_experts`.

    Args:
        weight: [layers, num_logical_experts], the load of each expert.
        num_replicas: number of physical experts, a multiple of num_gpus.
        num_groups: number of groups of experts.
        num_nodes: number of nodes; if it divides num_groups, a group stays on one node.
        num_gpus: number of GPUs; in that case a multiple of num_nodes.

    Returns:
        physical_to_logical_map: int64 [layers, num_replicas].
        logical_to_physical_map: int64 [layers, num_logical_experts, X], padded with -1.
        expert_count: int64 [layers, num_logical_experts].
    """
    return deepkern.rebalance_experts(weight, num_replicas, num_groups, num_nodes, num_gpus)
