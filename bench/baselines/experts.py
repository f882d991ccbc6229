"""Plain PyTorch for routing, dispatch and combine."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .quant import FP8, cast_back, cast_per_token, swiglu_cast, swiglu_cast_backward
from .registry import baseline, others


def scores(logits: Tensor, score: str) -> Tensor:
    logits = logits.float()
    if score == "softmax":
        return logits.softmax(-1)
    return logits.sigmoid() if score == "sigmoid" else F.softplus(logits).sqrt()


@baseline
def route_topk(
    logits, bias=None, topk=8, num_groups=1, topk_groups=1, score="sigmoid", group_score="top2",
    normalize=True, scale=1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scores, torch.topk of groups and of experts."""
    s = scores(logits, score)
    biased = s if bias is None else s + bias.float()
    if num_groups > 1:
        groups = biased.unflatten(1, (num_groups, -1))  # [T, G, E/G]
        best = 1 if group_score == "max" else min(2, groups.shape[2])
        kept = groups.topk(best, -1).values.sum(-1).topk(topk_groups).indices
        masked = torch.ones(groups.shape[:2], dtype=torch.bool, device=s.device)
        masked.scatter_(1, kept, False)
        biased = groups.masked_fill(masked[..., None], -torch.inf).flatten(1)
    idx = biased.topk(topk).indices
    return _weights(s.gather(1, idx), normalize, scale), idx


def _weights(chosen: Tensor, normalize: bool, scale: float) -> Tensor:
    return scale * (chosen / (chosen.sum(-1, keepdim=True) + 1e-20) if normalize else chosen)


@baseline
def route_topk_backward(grad_weights, logits, idx, score="sigmoid", normalize=True, scale=1.0):
    """Autograd through scores and gather."""
    valid = (idx >= 0) & (idx < logits.shape[1])
    with torch.enable_grad():
        logits = logits.detach().requires_grad_()
        chosen = scores(logits, score).gather(1, idx.where(valid, 0)) * valid
        weights = _weights(chosen, normalize, scale)
        return torch.autograd.grad(weights, logits, grad_weights * valid)[0]


@baseline
def expert_dispatch(
    x, topk_idx, num_experts, x_scale=None, alignment=1, cast=None, num_assigned=None
) -> tuple:  # fmt: skip
    """Cast if asked, stable argsort, index_select."""
    if cast is not None:
        x, x_scale = cast_per_token(x, cast)
    (T, topk), E = topk_idx.shape, num_experts
    flat = topk_idx.flatten().long()
    expert = torch.where((flat >= 0) & (flat < E), flat, E)
    counts = torch.bincount(expert, minlength=E + 1)[:E]
    order = expert.argsort(stable=True)[: int(counts.sum())]
    N = T * topk if num_assigned is None else min(num_assigned, T * topk)
    rows = (N + min(E, N) * (alignment - 1)) // alignment * alignment
    row = torch.arange(len(order), device=x.device)
    if alignment > 1:
        padding = -counts % alignment
        row = row + (padding.cumsum(0) - padding)[expert[order]]
    order, row = order[row < rows], row[row < rows]

    def sort(source: Tensor) -> Tensor:
        source = source.view(torch.uint8) if source.dtype == FP8 else source  # not every op has FP8
        picked = source.index_select(0, order // max(topk, 1))
        if len(order) < rows:
            picked = source.new_zeros(rows, source.shape[1]).index_copy_(0, row, picked)
        return picked

    group_index = row.new_full((rows,), -1, dtype=torch.int32)
    group_index[row] = expert[order].int()
    handle = row.new_full((T * topk,), -1, dtype=torch.int32)
    handle[order] = row.int()
    scale = None if x_scale is None else sort(x_scale)
    return sort(x).view(x.dtype), scale, group_index, counts.int(), handle.view(T, topk)


@baseline
def expert_combine(y, topk_weights, handle, shared=None) -> Tensor:
    """index_select, multiply, index_add in fp32."""
    out = _combine(y, topk_weights, handle)
    return (out if shared is None else out + shared).to(y.dtype)


def _combine(y: Tensor, topk_weights: Tensor | None, handle: Tensor) -> Tensor:
    T, topk = handle.shape
    valid = ((handle >= 0) & (handle < y.shape[0])).flatten()
    token = torch.arange(T, device=y.device).repeat_interleave(topk)[valid]
    picked = y.index_select(0, handle.flatten()[valid]).float()
    if topk_weights is not None:
        picked = picked * topk_weights.flatten()[valid, None].float()
    return torch.zeros(T, y.shape[1], device=y.device).index_add(0, token, picked)


@baseline
def expert_combine_backward(grad, y, topk_weights, handle) -> tuple[Tensor, Tensor]:
    """Autograd through index_select and index_add."""
    with torch.enable_grad():
        y, weights = y.detach().requires_grad_(), topk_weights.detach().requires_grad_()
        grads = torch.autograd.grad(_combine(y, weights, handle), (y, weights), grad.float())
    return grads[0], grads[1].float()


@baseline
def expert_dispatch_backward(grad: Tensor, handle: Tensor) -> Tensor:
    """index_select, index_add in fp32."""
    return _combine(grad, None, handle).to(grad.dtype)


@baseline
def expert_load(topk_idx: Tensor, num_experts: int) -> Tensor:
    """torch.bincount."""
    flat = topk_idx.flatten().long()
    return torch.bincount(
        torch.where((flat >= 0) & (flat < num_experts), flat, num_experts), minlength=num_experts
    )[:num_experts].int()


@baseline
def update_expert_bias(bias: Tensor, load: Tensor, rate: float = 0.001) -> Tensor:
    """mean, subtract, sign, add."""
    load = load.double()
    return bias + rate * (load.mean() - load).sign().float()


@baseline
def sequence_balance_loss(logits, topk_idx, score="sigmoid", alpha=1e-4) -> Tensor:
    """scores, scatter_add, means, product."""
    (B, S, E), topk = logits.shape, topk_idx.shape[2]
    if logits.numel() == 0 or topk == 0:
        return logits.float().sum() * 0.0
    valid = (topk_idx >= 0) & (topk_idx < E)
    chosen = torch.zeros(B, E, device=logits.device).scatter_add_(
        1, topk_idx.where(valid, 0).flatten(1).long(), valid.float().flatten(1)
    )
    s = scores(logits, score)
    share = (s / s.sum(-1, keepdim=True)).mean(1)
    return alpha * (chosen * (E / (topk * S)) * share).sum(1).mean()


@baseline
def sequence_balance_loss_backward(grad, logits, topk_idx, score="sigmoid", alpha=1e-4) -> Tensor:
    """Autograd through scores, mean and product."""
    with torch.enable_grad():
        logits = logits.detach().requires_grad_()
        loss = sequence_balance_loss(logits, topk_idx, score, alpha)
        return torch.autograd.grad(loss, logits, grad[0])[0]


@baseline
def moe_forward(x, topk_weights, topk_idx, w13, w13_scale, w2, w2_scale) -> Tensor:
    """Expert by expert: index, dequantise, F.linear; SiLU, cast, the same again; index_add."""
    q, scale, group_index, _, handle = expert_dispatch(x, topk_idx, len(w13), cast="fp32")
    gate_up = _multiply(q, scale, w13, w13_scale, group_index, x.dtype)
    y = _multiply(*swiglu_cast(gate_up), w2, w2_scale, group_index, x.dtype)
    return expert_combine(y, topk_weights, handle)


def _multiply(a, a_scale, b, b_scale, group_index, dtype: torch.dtype) -> Tensor:
    """Each row with its group's matrix, both dequantised to `dtype`."""
    out = a.new_zeros((len(a), b.shape[1]), dtype=dtype)
    rows = 1 if b_scale.shape[1] == b.shape[1] else 128
    for g in group_index[group_index >= 0].unique().tolist():
        row = (group_index == g).nonzero()[:, 0]
        x = cast_back(a.view(torch.uint8)[row].view(FP8), a_scale[row], (1, 128), dtype)
        out[row] = F.linear(x, cast_back(b[g], b_scale[g], (rows, 128), dtype))
    return out


@baseline
def moe_forward_backward(
    grad, topk_weights, topk_idx, gate_up, gate_up_scale, w13, w13_scale, w2, w2_scale
) -> tuple[Tensor, Tensor]:
    """Expert by expert, as forward, with gradients cast to FP8; torch's gradient of SwiGLU."""
    wide, lift = torch.float32 if grad.dtype == torch.float32 else torch.bfloat16, 2.0**48
    q, scale, group_index, _, handle = expert_dispatch(
        grad.float() * lift, topk_idx, len(w13), cast="fp32"
    )
    grad_h = _multiply(q, scale, w2.mT, w2_scale.mT, group_index, wide)
    there = handle >= 0
    weights = torch.zeros(len(q), device=q.device)
    weights[handle[there]] = topk_weights[there].float()
    grad_gate_up, _, of_row = swiglu_cast_backward(grad_h, gate_up, gate_up_scale, weights)
    q, scale = cast_per_token(grad_gate_up)
    y = _multiply(q, scale / lift, w13.mT, w13_scale.mT, group_index, wide)
    grad_weights = torch.where(there, of_row[handle.clamp(min=0)] / lift, 0.0) if len(q) else of_row
    return _combine(y, None, handle).to(grad.dtype), grad_weights.view(handle.shape)


@others("moe_forward")
def other_moe_forward(args: tuple) -> dict[str, Callable[[], object]]:
    """Peers need what all of them can do: bf16, V3's grid of 128, a scale per 128x128."""
    x, topk_weights, topk_idx, w13, w13_scale, w2, w2_scale = args
    E, rows, K = w13.shape
    grid = K % 128 == 0 and rows % 256 == 0 and w13_scale.shape[1] * 128 == rows
    if x.dtype != torch.bfloat16 or not grid:
        return {}
    return {
        **_grouped_mm(*args),
        **(_vllm(*args) if _can_import("vllm") else {}),
        **(_deep_gemm(*args) if _can_import("deep_gemm") else {}),
    }


def _can_import(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _grouped_mm(x, topk_weights, topk_idx, w13, w13_scale, w2, w2_scale) -> dict:
    """torch's own grouped product, of bf16."""
    wide13, wide2 = (cast_back(w, s, (128, 128), x.dtype)
                     for w, s in ((w13, w13_scale), (w2, w2_scale)))  # fmt: skip

    def layer() -> Tensor:
        rows, _, _, counts, handle = expert_dispatch(x, topk_idx, len(w13))
        offsets = counts.cumsum(0, dtype=torch.int32)
        gate, up = F.grouped_mm(rows, wide13.mT, offs=offsets).chunk(2, 1)
        y = F.grouped_mm(F.silu(gate) * up, wide2.mT, offs=offsets)
        return expert_combine(y, topk_weights, handle)

    return {"bf16 F.grouped_mm, weights dequantised before": layer}


def _vllm(x, topk_weights, topk_idx, w13, w13_scale, w2, w2_scale) -> dict:
    from vllm.model_executor.layers.fused_moe import fused_experts
    from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config

    config = fp8_w8a8_moe_quant_config(
        w1_scale=w13_scale, w2_scale=w2_scale, block_shape=[128, 128]
    )
    idx = topk_idx.int()
    return {
        "vLLM fused_experts": lambda: fused_experts(
            x, w13, w2, topk_weights, idx, quant_config=config
        )
    }


def _deep_gemm(x, topk_weights, topk_idx, w13, w13_scale, w2, w2_scale) -> dict:
    """DeepGEMM's products between deepkern's other steps; experts begin at multiples of 128."""
    import deep_gemm

    import deepkern

    def multiply(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, index: Tensor) -> Tensor:
        out = torch.empty(len(a), b.shape[1], dtype=x.dtype, device=x.device)
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous((a, a_scale), (b, b_scale), out, index)
        return out

    def layer() -> Tensor:
        q, scale, index, _, handle = deepkern.expert_dispatch(
            x, topk_idx, len(w13), None, 128, "fp32"
        )
        h = deepkern.swiglu_cast(multiply(q, scale, w13, w13_scale, index))
        y = multiply(*h, w2, w2_scale, index)
        return deepkern.expert_combine(y, topk_weights, handle)

    return {"DeepGEMM's products in deepkern's layer": layer}
