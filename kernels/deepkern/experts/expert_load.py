"""How many of the tokens go to each expert.

    load[e] = #{(t, j): topk_idx[t, j] = e}

Cut: the first two launches of dispatch (`placement.py`): histograms of 256 assignments, then their
sums. Without atomics; 4 or 8 bytes an assignment, and launching is what takes the time.

Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 2.1.2, on which the selection bias
is steered; DeepSeek's EPLB places experts by it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.contract import check_that
from ..runtime.op import op
from .placement import count
from .rows import check_assignments


@op(topk_idx="int64|int32 [T, topk]")
def expert_load(topk_idx: Tensor, num_experts: int) -> Tensor:
    """Counts the assignments to each expert.

    Args:
        topk_idx: int64 or int32 [T, topk]; whatever is not in [0, num_experts) is no expert.
        num_experts: E.

    Returns:
        int32 [E]. (`expert_dispatch` returns the same, where tokens are dispatched anyway.)

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    check_that("expert_load", "num_experts", num_experts >= 1, "at least 1", num_experts)
    check_assignments("expert_load", "topk_idx", topk_idx)
    return topk_idx.new_empty(num_experts, dtype=torch.int32)


@expert_load.op.register_launcher("triton")
def _launch_triton(topk_idx: Tensor, num_experts: int) -> Tensor:
    load = expert_load.op.allocate(topk_idx, num_experts)
    if topk_idx.numel() == 0:
        return load.zero_()
    count(topk_idx, load)
    return load
