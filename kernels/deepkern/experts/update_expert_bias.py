"""The update of the routing bias from the load of the experts, without an auxiliary loss.

    out[e] = bias[e] + rate · sign(Σ_i load[i] / E - load[e])

The comparison is in integers, E · load[e] with the sum: an expert with exactly the mean load keeps
its bias.

Parallelization: one program, two passes over the experts.

Limit: launch latency.

Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 2.1.2, after Wang et al. (arXiv
2408.15664).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..runtime.op import op


@op(bias="fp32 [E]", load="int32|int64 [E]")
def update_expert_bias(bias: Tensor, load: Tensor, rate: float = 0.001) -> Tensor:
    """Moves `route_topk`'s bias by `rate`: up for experts with less than the mean load, else down.

        bias.copy_(deepkern.update_expert_bias(bias, load))

    Args:
        bias: fp32 [E].
        load: int32 or int64 [E], the tokens of each expert in the step, summed over all ranks.
        rate: the step, gamma in the report: 0.001, and 0 at the end of training.

    Returns:
        fp32 [E], a new tensor.

    Raises:
        TypeError, ValueError: an argument violates the rules above.
    """
    # Fake kernel: allocates the outputs; the launcher of a backend computes them.
    return bias.new_empty(bias.shape)


@update_expert_bias.op.register_launcher("triton")
def _launch_triton(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    out = update_expert_bias.op.allocate(bias, load, rate)
    if out.numel():
        update_expert_bias_kernel[(1,)](bias, load, out, rate, len(bias), BLOCK=1024)
    return out


@triton.jit
def update_expert_bias_kernel(
    bias_ptr,  # fp32 [E]
    load_ptr,  # int32 or int64 [E]
    out_ptr,  # fp32 [E], written
    rate,  # fp32
    E,  # experts
    BLOCK: tl.constexpr,  # experts per step
):
    sums = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, E, BLOCK):
        expert = first + tl.arange(0, BLOCK)
        sums += tl.load(load_ptr + expert, mask=expert < E, other=0).to(tl.int64)
    load_sum = tl.sum(sums, 0)
    for first in range(0, E, BLOCK):
        expert = first + tl.arange(0, BLOCK)
        mask = expert < E
        deficit = load_sum - tl.load(load_ptr + expert, mask=mask, other=0).to(tl.int64) * E
        step = tl.where(deficit > 0, rate, tl.where(deficit < 0, 0.0 - rate, 0.0))
        bias = tl.load(bias_ptr + expert, mask=mask, other=0.0)
        tl.store(out_ptr + expert, bias + step, mask=mask)
