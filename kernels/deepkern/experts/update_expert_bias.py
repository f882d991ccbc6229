"""The selection bias after a step: up for experts with few tokens, down for those with many.

    bias[e] + rate · sign(Σ_i load[i] / E - load[e])

The comparison is one of integers, E · load[e] with the sum, so an expert with exactly the mean load
keeps its bias. Cut: one program, twice over the experts; launching is what takes the time.

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
    """Moves `route_topk`'s bias by `rate` against the experts' load.

    Args:
        bias: fp32 [E].
        load: int32 or int64 [E], the tokens of each expert in the step, of all ranks together.
        rate: how far, the report's gamma: 0.001, and 0 at the end of training.

    Returns:
        fp32 [E], a new tensor: `bias.copy_(update_expert_bias(bias, load))` updates it.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    return bias.new_empty(bias.shape)


@update_expert_bias.op.register_launcher("triton")
def _launch_triton(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    out = update_expert_bias.op.allocate(bias, load, rate)
    if out.numel():
        update_expert_bias_kernel[(1,)](bias, load, out, rate, len(bias), BLOCK=1024)
    return out


@triton.jit
def update_expert_bias_kernel(bias_ptr, load_ptr, out_ptr, rate, E, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, E, BLOCK):
        expert = first + tl.arange(0, BLOCK)
        total += tl.load(load_ptr + expert, mask=expert < E, other=0).to(tl.int64)
    total = tl.sum(total, 0)
    for first in range(0, E, BLOCK):
        expert = first + tl.arange(0, BLOCK)
        inside = expert < E
        missing = total - tl.load(load_ptr + expert, mask=inside, other=0).to(tl.int64) * E
        step = tl.where(missing > 0, rate, tl.where(missing < 0, 0.0 - rate, 0.0))
        bias = tl.load(bias_ptr + expert, mask=inside, other=0.0)
        tl.store(out_ptr + expert, bias + step, mask=inside)
