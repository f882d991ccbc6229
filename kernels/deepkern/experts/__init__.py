"""Mixture of experts: routing tokens to experts, and their way there and back."""

from .expert_combine import expert_combine, expert_combine_backward
from .expert_dispatch import expert_dispatch, expert_dispatch_backward
from .route_topk import route_topk, route_topk_backward

__all__ = [
    "expert_combine",
    "expert_combine_backward",
    "expert_dispatch",
    "expert_dispatch_backward",
    "route_topk",
    "route_topk_backward",
]
