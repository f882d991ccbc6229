"""The MLP, the router and the experts of a layer.

    mlp(x)     = down(silu(gate(x)) · up(x))
    experts(x) = Σ over the chosen experts e of weight[e]·mlp_e(x) + shared(x)

Source: DeepSeek-V3 report (arXiv:2412.19437), section 2.1.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import deepkern
from model.checkpoint import Checkpoint
from model.config import Config
from model.linear import Linear, Rows
from model.ranks import ALONE, Ranks
from model.weights import (
    Matrix,
    Precision,
    frozen,
    load_real,
    load_stack,
    quantize_weight,
    random_weight,
)


class MLP(nn.Module):
    """down(swiglu(gate(x), up(x))), of a dense layer and of the shared experts.

    A tensor rank has some of the inner columns.
    """

    def __init__(self, size: int, inner: int, precision: Precision, ranks: Ranks = ALONE) -> None:
        super().__init__()
        self.precision, self.ranks = precision, ranks
        own = ranks.columns(inner)
        count, names = own.stop - own.start, ("gate_proj", "up_proj")
        self.gate_up_proj = Linear(size, 2 * count, precision, names, rows=[own, own])
        self.down_proj = Linear(count, size, precision, columns=own)

    def forward(self, x: Rows) -> Tensor:
        """[M, hidden] -> [M, hidden]."""
        return self.ranks.sum(self.part(x), self.ranks.tensor)

    def part(self, x: Rows) -> Tensor:
        """As `forward`, but this rank's part of the sum."""
        gate_up = self.gate_up_proj(x)
        if not self.precision.fp8:
            return self.down_proj(deepkern.swiglu(gate_up))
        cast = deepkern.swiglu_cast(gate_up, scale_format=self.precision.scale_format)
        return self.down_proj(Rows(gate_up, *cast))


class Gate(nn.Module):
    """The router: scores in fp32, and `deepkern.route_topk` chooses the experts by them."""

    def __init__(self, config: Config, precision: Precision) -> None:
        super().__init__()
        c, self.precision = config, precision
        self.biased = c.topk_method == "noaux_tc"
        self.weight = frozen(random_weight(c.n_routed_experts, c.hidden_size))
        bias = torch.zeros(c.n_routed_experts) if self.biased else None
        self.register_buffer("e_score_correction_bias", bias)
        self.routing = {
            "topk": c.num_experts_per_tok,
            "num_groups": c.n_group,
            "topk_groups": c.topk_group,
            "score": c.scoring_func,
            "group_score": "top2" if self.biased else "max",
            "normalize": c.norm_topk_prob,
            "scale": c.routed_scaling_factor,
        }

    def load(self, checkpoint: Checkpoint, name: str) -> None:
        p, fp32 = self.precision, torch.float32
        self.weight = frozen(load_real(checkpoint, f"{name}.weight", p, fp32))
        if self.biased:
            name = f"{name}.e_score_correction_bias"
            self.e_score_correction_bias = load_real(checkpoint, name, p, fp32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [M, hidden] -> weights fp32 [M, topk], expert indices int64 [M, topk]."""
        logits = deepkern.gemm_nt(x.float(), self.weight)
        return deepkern.route_topk(logits, bias=self.e_score_correction_bias, **self.routing)


class Experts(nn.Module):
    """Weights of E routed experts, stacked: w13 [E, 2I, K] as [gate, up], w2 [E, K, I].

    A rank has some of the experts and some of their inner columns, see `model/ranks.py`.

    With `fp8` the layer is one op, `moe_forward`.  Otherwise, and with activation scales that are
    powers of two, it is the ops that `moe_forward` consists of.
    """

    def __init__(self, config: Config, precision: Precision, ranks: Ranks = ALONE) -> None:
        super().__init__()
        self.precision, self.ranks = precision, ranks
        self.own = ranks.expert_range(config.n_routed_experts)
        self.columns = ranks.expert_columns(config.moe_intermediate_size)
        self.count, size = len(self.own), config.hidden_size
        inner = self.columns.stop - self.columns.start
        w13, w13_scale = quantize_weight(random_weight(self.count, 2 * inner, size), precision)
        w2, w2_scale = quantize_weight(random_weight(self.count, size, inner), precision)
        self.w13, self.w2 = frozen(w13), frozen(w2)
        self.register_buffer("w13_scale", w13_scale)
        self.register_buffer("w2_scale", w2_scale)

    def load(self, checkpoint: Checkpoint, name: str) -> None:
        def load(*matrices: str, **part: Any) -> Matrix:
            groups = [
                [f"{name}.{expert}.{matrix}.weight" for matrix in matrices] for expert in self.own
            ]
            return load_stack(checkpoint, groups, self.precision, **part)

        w13, self.w13_scale = load("gate_proj", "up_proj", rows=[self.columns, self.columns])
        w2, self.w2_scale = load("down_proj", columns=self.columns)
        self.w13, self.w2 = frozen(w13), frozen(w2)

    def forward(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """x [M, hidden], weights and expert indices [M, topk] -> weighted sum [M, hidden].

        With `Ranks.dispatch` the sum is complete, otherwise it is this rank's part of it.
        """
        p = self.precision
        if self.ranks.expert_parallel is not None:
            return self.dispatch(self.ranks.expert_parallel, x, weights, indices)
        if self.ranks.experts > 1:
            is_own = (indices >= self.own.start) & (indices < self.own.stop)
            indices = torch.where(is_own, indices - self.own.start, -1)
        if p.fp8 and p.scale_format == "fp32":
            w = self.w13, self.w13_scale, self.w2, self.w2_scale
            return deepkern.moe_forward(x, weights, indices, *w)
        cast = p.scale_format if p.fp8 else None
        rows, scale, group, _, handle = deepkern.expert_dispatch(x, indices, self.count, cast=cast)
        run = self.run_fp8 if p.fp8 else self.run_real
        return deepkern.expert_combine(run(rows, scale, group), weights, handle)

    def dispatch(
        self, group: deepkern.ExpertParallel, x: Tensor, weights: Tensor, indices: Tensor
    ) -> Tensor:
        """As `forward`: each rank sends some of the rows, and all gather the results."""
        own, p = self.ranks.rows(len(x)), self.precision
        values = deepkern.cast_per_token(x[own], p.scale_format) if p.fp8 else (x[own], None)
        rows, scale, index, _, handle = group.dispatch(
            values[0], indices[own], weights[own], values[1]
        )
        run = self.run_fp8 if p.fp8 else self.run_real
        return self.ranks.gather(group.combine(run(rows, scale, index), handle), len(x))

    def run_real(self, rows: Tensor, scale: Tensor | None, group: Tensor) -> Tensor:
        """rows [R, K] of the experts group int32 [R] -> [R, K]."""
        gate_up = deepkern.m_grouped_gemm_nt_contiguous(rows, self.w13, group)
        return deepkern.m_grouped_gemm_nt_contiguous(deepkern.swiglu(gate_up), self.w2, group)

    def run_fp8(self, rows: Tensor, scale: Tensor | None, group: Tensor) -> Tensor:
        """As `run_real`, of e4m3 rows with 1x128 scales."""
        dtype, multiply = self.precision.dtype, deepkern.m_grouped_fp8_gemm_nt_contiguous
        gate_up = multiply(rows, scale, self.w13, self.w13_scale, group, dtype)
        inner = deepkern.swiglu_cast(gate_up, scale_format=self.precision.scale_format)
        return multiply(*inner, self.w2, self.w2_scale, group, dtype)


class MoE(nn.Module):
    """Σ over a token's experts of weight·expert(x), plus the shared experts."""

    def __init__(self, config: Config, precision: Precision, ranks: Ranks = ALONE) -> None:
        super().__init__()
        self.ranks, c = ranks, config
        self.gate = Gate(c, precision)
        self.experts = Experts(c, precision, ranks)
        inner = c.moe_intermediate_size * c.n_shared_experts
        self.shared_experts = None
        # The sum over all ranks has the parts of one group of tensor ranks.
        if inner and (ranks.dispatch or ranks.rank < ranks.tensor):
            self.shared_experts = MLP(c.hidden_size, inner, precision, ranks)

    def forward(self, x: Rows) -> Tensor:
        """[M, hidden] -> [M, hidden]."""
        out, shared = self.experts(x.real, *self.gate(x.real)), self.shared_experts
        if self.ranks.dispatch:
            return out if shared is None else out + shared(x)
        out = out if shared is None else out + shared.part(x)
        return self.ranks.sum(out, self.ranks.processes)
