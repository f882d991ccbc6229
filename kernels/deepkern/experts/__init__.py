"""Mixture of experts: routing tokens to experts, and their way there and back."""

from .choose_replicas import choose_replicas, nearest_replicas
from .exchange import ExpertParallelError
from .expert_combine import expert_combine, expert_combine_backward
from .expert_dispatch import expert_dispatch, expert_dispatch_backward
from .expert_load import expert_load
from .expert_parallel import ExpertParallel
from .fp8_experts import fp8_experts
from .load_statistics import LoadStatistics
from .moe_forward import moe_forward, moe_forward_backward
from .placement_bound import gpu_loads, placement_bound
from .plan_moves import plan_moves
from .rebalance_experts import rebalance_experts
from .route_topk import ROUTING, route_topk, route_topk_backward
from .sequence_balance_loss import sequence_balance_loss, sequence_balance_loss_backward
from .update_expert_bias import update_expert_bias

__all__ = [
    "LoadStatistics",
    "ROUTING",
    "choose_replicas",
    "ExpertParallel",
    "ExpertParallelError",
    "expert_combine",
    "expert_combine_backward",
    "expert_dispatch",
    "expert_dispatch_backward",
    "expert_load",
    "fp8_experts",
    "gpu_loads",
    "moe_forward",
    "moe_forward_backward",
    "nearest_replicas",
    "placement_bound",
    "plan_moves",
    "rebalance_experts",
    "route_topk",
    "route_topk_backward",
    "sequence_balance_loss",
    "sequence_balance_loss_backward",
    "update_expert_bias",
]
