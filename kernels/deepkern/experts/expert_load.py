"""The number of tokens that go to each expert.

    load[e] = #{(t, j): topk_idx[t, j] = e}

Parallelization: the first two launches of dispatch (`rows.py`): one program per histogram of 128
assignments, then one per 16 experts for the sums over histograms. No atomics.

Limit: launch latency. 4 or 8 bytes are read per assignment.

Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 2.1.2, which updates the routing
bias from this load; DeepSeek's EPLB places experts by it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.contract import check_that
from ..runtime.op import op
from .checks import check_assignments
from .rows import count_assignments


@op(topk_idx="int64|int32 [T, topk]")
def expert_load(topk_idx: Tensor, num_experts: int) -> Tensor:
    """Counts the assignments to each expert.

        load = deepkern.expert_load(topk_idx, num_experts=256)

    Args:
        topk_idx: int64 or int32 [T, topk]; indices outside [0, num_experts) are ignored.
        num_experts: E.

    Returns:
        int32 [E]. `expert_dispatch` returns the same tensor as `tokens_per_expert`.

    Raises:
        TypeError, ValueError: an argument violates the rules above.
    """
    check_that("expert_load", "num_experts", num_experts >= 1, "at least 1", num_experts)
    check_assignments("expert_load", "topk_idx", topk_idx)
    # Fake kernel: allocates the outputs; the launcher of a backend computes them.
    return topk_idx.new_empty(num_experts, dtype=torch.int32)


@expert_load.op.register_launcher("triton")
def _launch_triton(topk_idx: Tensor, num_experts: int) -> Tensor:
    load = expert_load.op.allocate(topk_idx, num_experts)
    if topk_idx.numel() == 0:
        return load.zero_()
    count_assignments(topk_idx, load)
    return load
