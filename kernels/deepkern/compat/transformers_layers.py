"""The forward passes of transformers' norms, routers, experts and FP8 Linears on deepkern's ops.

`self` is a module of transformers.  `rmsnorm_cast` and `m_grouped_gemm_nt_contiguous` have no
backward: where a gradient is needed, the norm of transformers and a loop over the experts run.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..experts.expert_combine import expert_combine
from ..experts.expert_dispatch import expert_dispatch
from ..experts.moe_forward import moe_forward
from ..experts.route_topk import route_topk
from ..matmul.fp8_gemm_nt import fp8_gemm_nt
from ..matmul.fp8_linear import fp8_linear
from ..matmul.m_grouped_gemm_nt_contiguous import m_grouped_gemm_nt_contiguous
from ..quant.cast_per_token import cast_per_token
from ..quant.rmsnorm_cast import rmsnorm_cast
from ..quant.swiglu import swiglu


def needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def norm_forward(self, hidden_states: Tensor) -> Tensor:
    """RMSNorm of [..., K]."""
    x, weight = hidden_states, self.weight
    if needs_gradient(x, weight) or x.dtype != weight.dtype:
        return type(self).forward(self, x)
    rows = x.reshape(-1, x.shape[-1])
    return rmsnorm_cast(rows, weight, self.variance_epsilon)[2].view(x.shape)


def mlp_forward(self, x: Tensor) -> Tensor:
    """[..., hidden] -> [..., hidden]: a dense layer, or the shared experts."""
    gate_up = torch.cat([self.gate_proj(x), self.up_proj(x)], -1)
    return self.down_proj(swiglu(gate_up.flatten(0, -2)).view(*x.shape[:-1], -1))


def router_forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[..., hidden] -> logits fp32 [M, E], weights fp32 [M, topk], expert indices [M, topk]."""
    rows = hidden_states.reshape(-1, self.hidden_dim).float()
    logits = F.linear(rows, self.weight.float())
    bias = getattr(self, "e_score_correction_bias", None)
    return logits, *route_topk(logits, bias, **self.deepkern_routing)


def routing_of(router: nn.Module) -> dict:
    """The arguments of `route_topk` for a router of V2 or V3."""
    routing = {"topk": router.top_k, "scale": router.routed_scaling_factor}
    if hasattr(router, "e_score_correction_bias"):
        return routing | {
            "num_groups": router.num_group,
            "topk_groups": router.topk_group,
            "normalize": router.norm_topk_prob,
        }
    routing |= {"score": "softmax", "group_score": "max", "normalize": False}
    if router.topk_method == "group_limited_greedy":
        routing |= {"num_groups": router.num_group, "topk_groups": router.topk_group}
    return routing


def moe_layer_forward(self, hidden_states: Tensor) -> Tensor:
    """[..., hidden] -> [..., hidden]: the routed experts and the shared ones."""
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    _, weights, indices = self.gate(hidden_states)
    return self.experts(rows, indices, weights, self.shared_experts(rows)).view_as(hidden_states)


def experts_forward(
    self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, shared: Tensor = None
) -> Tensor:
    """[M, hidden], indices and weights [M, topk], shared [M, hidden] or None -> [M, hidden]."""
    dispatched = expert_dispatch(hidden_states, top_k_index, self.num_experts)
    rows, _, group_index, counts, handle = dispatched
    w13, w2 = self.gate_up_proj, self.down_proj
    if needs_gradient(rows, w13, w2):
        y = loop_over_experts(rows, counts, w13, w2)
    else:
        gate_up = m_grouped_gemm_nt_contiguous(rows, w13, group_index)
        y = m_grouped_gemm_nt_contiguous(swiglu(gate_up), w2, group_index)
    return expert_combine(y, top_k_weights, handle, shared)


def loop_over_experts(
    rows: Tensor, counts: Tensor, gate_up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    """The MLP of each expert on its rows [R, K], sorted by expert, counts [E] -> [R, K]."""
    parts = []
    weights = zip(gate_up_proj.unbind(), down_proj.unbind(), strict=True)
    for x, (w13, w2) in zip(rows.split(counts.tolist()), weights, strict=True):
        if len(x):
            parts.append(F.linear(swiglu(F.linear(x, w13)), w2))
    return torch.cat(parts) if parts else rows


def fp8_experts_forward(
    self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, shared: Tensor = None
) -> Tensor:
    """As `experts_forward`, with weights in FP8."""
    w13, w2 = self.gate_up_proj, self.down_proj
    scales = self.gate_up_proj_scale_inv.float(), self.down_proj_scale_inv.float()
    out = moe_forward(hidden_states, top_k_weights, top_k_index, w13, scales[0], w2, scales[1])
    return out if shared is None else out + shared


def fp8_linear_forward(self, input: Tensor) -> Tensor:
    """[..., K] -> [..., N] with an FP8 weight; scales of the input are in the weight's format."""
    scale = self.weight_scale_inv
    if scale.dtype == torch.float32 or needs_gradient(input):
        return fp8_linear(input, self.weight, self.bias, scale.float())
    rows = input.reshape(-1, input.shape[-1])
    addend = None if self.bias is None else self.bias.expand(len(rows), -1)
    q = cast_per_token(rows, "ue8m0")
    out = fp8_gemm_nt(*q, self.weight, scale.float(), input.dtype, addend)
    return out.view(*input.shape[:-1], -1)
