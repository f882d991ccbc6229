"""Mixture of experts: routing tokens to experts, and their way there and back."""

from .expert_combine import expert_combine, expert_combine_backward
from .expert_dispatch import expert_dispatch, expert_dispatch_backward
from .moe_forward import moe_forward, moe_forward_backward
from .route_topk import route_topk, route_topk_backward

__all__ = [
    "expert_combine",
    "expert_combine_backward",
    "expert_dispatch",
    "expert_dispatch_backward",
    "moe_forward",
    "moe_forward_backward",
    "route_topk",
    "route_topk_backward",
]
