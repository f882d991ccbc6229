"""Norm, linear layers, and the rows that pass between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deepkern
from model.checkpoint import Checkpoint
from model.weights import (
    WHOLE,
    Precision,
    frozen,
    load_real,
    load_rows,
    quantize_weight,
    random_weight,
)


class Weight(nn.Module):
    """A weight [outputs, inputs] that is never quantized: embedding, head and eh_proj."""

    def __init__(self, outputs: int, inputs: int, precision: Precision) -> None:
        super().__init__()
        self.precision = precision
        self.weight = frozen(random_weight(outputs, inputs).to(precision.dtype))

    def load(self, checkpoint: Checkpoint, name: str) -> None:
        self.weight = frozen(load_real(checkpoint, f"{name}.weight", self.precision))


class Rows(NamedTuple):
    """Input [M, K] of one or more Linears.

    real: [M, K] in the model's dtype.
    values, scale: e4m3 [M, K] with 1x128 scales fp32 [M, K/128].
    """

    real: Tensor
    values: Tensor
    scale: Tensor


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in fp32, rounded once."""

    def __init__(self, size: int, eps: float, precision: Precision) -> None:
        super().__init__()
        self.precision, self.eps = precision, eps
        self.weight = frozen(torch.ones(size, dtype=precision.dtype))

    load = Weight.load

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Rows, Tensor]:
        """Normalizes x + residual, [M, K] each.  Returns the normed rows and the sum."""
        values, scale, normed, total = deepkern.rmsnorm_cast(
            x, self.weight, self.eps, residual, self.precision.scale_format
        )
        return Rows(normed, values, scale), x if total is None else total


class Linear(nn.Module):
    """x·weightᵀ with a weight [N, K] in `dtype`, or in e4m3 with 128x128 scales.

    `parts` names the weights of the checkpoint that one product computes, in the order of their
    outputs.  Without it the weight has the module's name.

    rows, columns: the part of each of those weights that this rank computes; by default all.
    inputs, outputs: sizes of that part.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        precision: Precision,
        parts: tuple[str, ...] = (),
        rows: Sequence[slice] = (),
        columns: slice = WHOLE,
    ) -> None:
        super().__init__()
        self.precision, self.parts, self.rows, self.columns = precision, parts, rows, columns
        # Zeros before x, so that its groups of 128 are the blocks of the weight.
        self.padding = 0
        if precision.fp8 and columns != WHOLE and columns.start % 128 + inputs > 128:
            self.padding = columns.start % 128
            inputs += self.padding
            self.columns = slice(columns.start - self.padding, columns.stop)
        weight, scale = quantize_weight(random_weight(outputs, inputs), precision)
        self.weight = frozen(weight)
        self.register_buffer("scale", scale)

    def load(self, checkpoint: Checkpoint, name: str) -> None:
        parent = name.rpartition(".")[0]
        names = [f"{parent}.{part}" for part in self.parts] or [name]
        names = [f"{n}.weight" for n in names]
        weight, self.scale = load_rows(checkpoint, names, self.precision, self.rows, self.columns)
        self.weight = frozen(weight)

    def forward(self, x: Tensor | Rows) -> Tensor:
        """x [M, K] -> [M, N] in the model's dtype; a real x is cast per token with `fp8`."""
        if self.scale is None:
            return deepkern.gemm_nt(x.real if isinstance(x, Rows) else x, self.weight)
        dtype, fmt = self.precision.dtype, self.precision.scale_format
        if self.padding and not isinstance(x, Rows):
            x = F.pad(x, (self.padding, 0))
        values, scale = x[1:] if isinstance(x, Rows) else deepkern.cast_per_token(x, fmt)
        return deepkern.fp8_gemm_nt(values, scale, self.weight, self.scale, out_dtype=dtype)
