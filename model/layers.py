"""The parts of the model that run on deepkern's matmul, routing and dispatch ops.

A part is built empty (on the meta device) and filled by `load(checkpoint, name)`, `name` being its
place in the checkpoint.  With `fp8` the weights of every Linear stay in e4m3 and activations are
cast per token; without it they are dequantised to the model's dtype once, at load.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deepkern
from model.checkpoint import Checkpoint, CheckpointError
from model.config import Config


class Precision(NamedTuple):
    """How the model computes: its dtype and device, and whether its Linears run in FP8."""

    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    fp8: bool = False


class Rows(NamedTuple):
    """Activations [M, K] ready for a Linear: values in the model's dtype, or e4m3 with scales."""

    values: Tensor
    scale: Tensor | None

    @classmethod
    def of(cls, x: Tensor, fp8: bool) -> Rows:
        return cls(*deepkern.cast_per_token(x)) if fp8 else cls(x, None)


def parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def matmul(x: Rows, weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x·weightᵀ, [M, N]."""
    if scale is None:
        return F.linear(x.values, weight)
    return deepkern.fp8_gemm_nt(x.values, x.scale, weight, scale, out_dtype=dtype)


class Linear(nn.Module):
    def __init__(self, inputs: int, outputs: int, precision: Precision) -> None:
        super().__init__()
        self.precision = precision
        self.weight = parameter(torch.empty(outputs, inputs))
        self.register_buffer("scale", None)

    def load(self, checkpoint: Checkpoint, name: str) -> None:
        weight, scale = load_matrix(checkpoint, f"{name}.weight", self.precision)
        self.weight, self.scale = parameter(weight), scale

    def forward(self, x: Tensor | Rows) -> Tensor:
        """x [..., K] or Rows [M, K] -> [..., N]."""
        if isinstance(x, Rows):
            return matmul(x, self.weight, self.scale, self.precision.dtype)
        rows = Rows.of(x.reshape(-1, x.shape[-1]), self.precision.fp8)
        return self(rows).view(*x.shape[:-1], self.weight.shape[0])


def load_matrix(checkpoint: Checkpoint, name: str, p: Precision) -> tuple[Tensor, Tensor | None]:
    """A Linear's weight: e4m3 and its 128x128 scales with `fp8`, else in the model's dtype."""
    if not p.fp8:
        return load_real(checkpoint, name, p), None
    weight, scale = checkpoint.read(name)
    if scale is None:
        return deepkern.cast_per_block(weight.to(p.device))
    if checkpoint.block != (128, 128):
        place, block = checkpoint.stored[name].place, checkpoint.block
        raise CheckpointError(f"{place}: tensor {name} is FP8 in blocks of {block}, not 128x128")
    return weight.to(p.device), scale.to(p.device)


def load_real(
    checkpoint: Checkpoint, name: str, p: Precision, dtype: torch.dtype | None = None
) -> Tensor:
    """A tensor in `dtype` (the model's, if none is given), dequantised where it is FP8."""
    tensor, scale = checkpoint.read(name)
    tensor, dtype = tensor.to(p.device), dtype or p.dtype
    if scale is None:
        return tensor.to(dtype)
    return deepkern.cast_back(tensor, scale.to(p.device), checkpoint.block, dtype)


class Weight(nn.Module):
    """A weight that is used as it is: embedding, head, eh_proj."""

    def __init__(self, rows: int, columns: int, precision: Precision) -> None:
        super().__init__()
        self.precision = precision
        self.weight = parameter(torch.empty(rows, columns))

    def load(self, checkpoint: Checkpoint, name: str) -> None:
        self.weight = parameter(load_real(checkpoint, f"{name}.weight", self.precision))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, the root taken in fp32."""

    def __init__(self, size: int, eps: float, precision: Precision) -> None:
        super().__init__()
        self.precision, self.eps = precision, eps
        self.weight = parameter(torch.empty(size))

    load = Weight.load

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


class MLP(nn.Module):
    def __init__(self, size: int, inner: int, precision: Precision) -> None:
        super().__init__()
        self.fp8 = precision.fp8
        self.gate_proj = Linear(size, inner, precision)
        self.up_proj = Linear(size, inner, precision)
        self.down_proj = Linear(inner, size, precision)

    def forward(self, x: Rows) -> Tensor:
        """[M, hidden] -> [M, hidden]."""
        hidden = swiglu(self.gate_proj(x), self.up_proj(x))
        return self.down_proj(Rows.of(hidden, self.fp8))


class Gate(nn.Module):
    """Scores in fp32; which experts, and with what weight, is `deepkern.route_topk`."""

    def __init__(self, config: Config, precision: Precision) -> None:
        super().__init__()
        c, self.precision = config, precision
        self.biased = c.topk_method == "noaux_tc"
        self.weight = parameter(torch.empty(c.n_routed_experts, c.hidden_size))
        bias = torch.empty(c.n_routed_experts) if self.biased else None
        self.register_buffer("e_score_correction_bias", bias)
        self.rule = {
            "topk": c.num_experts_per_tok,
            "num_groups": c.n_group,
            "topk_groups": c.topk_group,
            "score": c.scoring_func,
            "group_score": "top2" if self.biased else "max",
            "normalize": c.norm_topk_prob,
            "scale": c.routed_scaling_factor,
        }

    def load(self, checkpoint: Checkpoint, name: str) -> None:
        p, exact = self.precision, torch.float32
        self.weight = parameter(load_real(checkpoint, f"{name}.weight", p, exact))
        if self.biased:
            bias = load_real(checkpoint, f"{name}.e_score_correction_bias", p, exact)
            self.e_score_correction_bias = bias

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, hidden] -> weights fp32 [T, topk], experts int64 [T, topk]."""
        logits = F.linear(x.float(), self.weight)
        return deepkern.route_topk(logits, bias=self.e_score_correction_bias, **self.rule)


class Experts(nn.Module):
    """The routed experts' weights, stacked: w13 [E, 2I, K] as [gate, up], w2 [E, K, I]."""

    def __init__(self, config: Config, precision: Precision) -> None:
        super().__init__()
        self.precision, self.count = precision, config.n_routed_experts
        size, inner = config.hidden_size, config.moe_intermediate_size
        self.w13 = parameter(torch.empty(self.count, 2 * inner, size))
        self.w2 = parameter(torch.empty(self.count, size, inner))
        self.register_buffer("w13_scale", None)
        self.register_buffer("w2_scale", None)

    def load(self, checkpoint: Checkpoint, name: str) -> None:
        def read(expert: int, part: str) -> tuple[Tensor, Tensor | None]:
            return load_matrix(checkpoint, f"{name}.{expert}.{part}.weight", self.precision)

        experts = range(self.count)
        w13 = [joined(read(e, "gate_proj"), read(e, "up_proj")) for e in experts]
        w2 = [read(e, "down_proj") for e in experts]
        self.w13, self.w2 = (parameter(stack([w for w, _ in pairs])) for pairs in (w13, w2))
        if self.precision.fp8:
            self.w13_scale, self.w2_scale = (torch.stack([s for _, s in p]) for p in (w13, w2))

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """x [M, hidden], weights and experts [M, topk] -> their weighted sum, [M, hidden]."""
        if self.precision.fp8:
            w = self.w13, self.w13_scale, self.w2, self.w2_scale
            return deepkern.moe_forward(x, weights, chosen, *w)
        rows, _, _, counts, handle = deepkern.expert_dispatch(x, chosen, self.count)
        parts = rows.split([*counts.tolist(), len(rows) - int(counts.sum())])
        done = [self.one(part, expert) for expert, part in enumerate(parts[:-1])]
        return deepkern.expert_combine(torch.cat([*done, parts[-1]]), weights, handle)

    def one(self, x: Tensor, expert: int) -> Tensor:
        gate, up = F.linear(x, self.w13[expert]).chunk(2, 1)
        return F.linear(swiglu(gate, up), self.w2[expert])


def joined(
    gate: tuple[Tensor, Tensor | None], up: tuple[Tensor, Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """Two matrices, and their scales if they have any, one under the other.

    Where a block of 128 rows would hold some of both, each row gets a scale of its own.
    """
    matrix = cat([gate[0], up[0]])
    if gate[1] is None:
        return matrix, None
    scales, rows = [gate[1], up[1]], len(gate[0])
    if rows % 128:
        scales = [scale.repeat_interleave(128, 0)[:rows] for scale in scales]
    return matrix, torch.cat(scales)


def cat(tensors: list[Tensor]) -> Tensor:
    """torch.cat, for FP8 too."""
    if tensors[0].dtype != torch.float8_e4m3fn:
        return torch.cat(tensors)
    return torch.cat([t.view(torch.uint8) for t in tensors]).view(torch.float8_e4m3fn)


def stack(tensors: list[Tensor]) -> Tensor:
    """torch.stack, for FP8 too."""
    if tensors[0].dtype != torch.float8_e4m3fn:
        return torch.stack(tensors)
    return torch.stack([t.view(torch.uint8) for t in tensors]).view(torch.float8_e4m3fn)


class MoE(nn.Module):
    """Σ over a token's experts of weight·expert(x), plus the shared experts.

    In FP8 that is one op. Otherwise tokens go to their experts sorted (`expert_dispatch`), through
    PyTorch's own products, and come back summed in a fixed order (`expert_combine`).
    """

    def __init__(self, config: Config, precision: Precision) -> None:
        super().__init__()
        c = config
        self.gate = Gate(c, precision)
        self.experts = Experts(c, precision)
        inner = c.moe_intermediate_size * c.n_shared_experts
        self.shared_experts = MLP(c.hidden_size, inner, precision) if inner else None
        self.fp8 = precision.fp8

    def forward(self, x: Tensor) -> Tensor:
        """[M, hidden] -> [M, hidden]."""
        out = self.experts(x, *self.gate(x))
        if self.shared_experts is None:
            return out
        return out + self.shared_experts(Rows.of(x, self.fp8))
