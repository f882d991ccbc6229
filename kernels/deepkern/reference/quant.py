"""The reference of the casts to and from FP8, in plain PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .exact import inverse_rms, sigmoid, sum_pairs

__all__ = [
    "cast_back",
    "cast_per_block",
    "cast_per_channel",
    "cast_per_token",
    "rmsnorm_cast",
    "swiglu",
    "swiglu_cast",
    "swiglu_cast_backward",
]

FP8_MAX = 448.0
BLOCK = 128


def to_e4m3(x: Tensor) -> Tensor:
    """fp32 -> e4m3: nearest even, saturating. `Tensor.to` alone does not saturate all values."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)  # clamp keeps NaN


def block_scale(amax: Tensor, scale_format: str) -> Tensor:
    """The fp32 scale of blocks with largest magnitude `amax` (fp32); NaN for inf and NaN."""
    scale = amax.clamp(min=1e-4) / FP8_MAX
    if scale_format == "ue8m0":
        scale = ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return torch.where(amax.isfinite(), scale, torch.nan)


def expand_scales(scale: Tensor, block: Sequence[int], N: int, K: int) -> Tensor:
    """The scale of each value, [..., N, K], from one scale per block of (rows, cols)."""
    row = torch.arange(N, device=scale.device) // block[0]
    column = torch.arange(K, device=scale.device) // block[1]
    return scale[..., row, :][..., column]


def row_major(x: Tensor) -> Tensor:
    """A contiguous copy with the strides of a new tensor, also for sizes of 0 or 1."""
    return x.clone(memory_format=torch.contiguous_format)


def with_layout(scale: Tensor, layout: str) -> Tensor:
    """`scale` [..., rows, blocks], contiguous for "row", column-major with padding for "column"."""
    if layout == "row" or scale.dim() < 2:
        return row_major(scale)
    *lead, rows, blocks = scale.shape
    columns = scale.new_zeros((*lead, blocks, -(-rows // 4) * 4))
    columns[..., :rows] = scale.mT
    return columns.mT[..., :rows, :]


def cast_per_token(
    x: Tensor, scale_format: str = "fp32", scale_layout: str = "row"
) -> tuple[Tensor, Tensor]:
    K = x.shape[-1]
    blocks = F.pad(x.float(), (0, -K % BLOCK)).unflatten(-1, (-1, BLOCK))  # [..., K/128, 128]
    scale = block_scale(blocks.abs().amax(-1), scale_format)  # [..., K/128]
    q = to_e4m3(blocks * (1.0 / scale)[..., None]).flatten(-2)[..., :K]
    return q.contiguous(), with_layout(scale, scale_layout)


def cast_per_block(x: Tensor, scale_format: str = "fp32") -> tuple[Tensor, Tensor]:
    N, K = x.shape[-2:]
    padded = F.pad(x.float(), (0, -K % BLOCK, 0, -N % BLOCK))
    blocks = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    scale = block_scale(blocks.abs().amax((-3, -1)), scale_format)  # [..., N/128, K/128]
    q = to_e4m3(x.float() * expand_scales(1.0 / scale, (BLOCK, BLOCK), N, K))
    return q.contiguous(), scale


def correct_offsets(offsets: Tensor, limit: int) -> Tensor:
    """Group offsets clamped to [0, limit], then raised to the largest offset before."""
    return offsets.clamp(0, limit).cummax(0).values


def cast_per_channel(
    x: Tensor,
    scale_format: str = "fp32",
    group_offsets: Tensor | None = None,
    transpose: bool = False,
    scale_layout: str = "row",
) -> tuple[Tensor, Tensor]:
    M, K = x.shape
    offsets = [0, M] if group_offsets is None else correct_offsets(group_offsets, M).tolist()
    groups = 0 if group_offsets is None else len(offsets) - 1
    q = x.new_zeros((K, M), dtype=torch.float8_e4m3fn)
    scale = x.new_zeros((K, -(-M // BLOCK) + groups), dtype=torch.float32)
    block = 0
    for first, last in itertools.pairwise(offsets):
        q[:, first:last], group_scale = cast_per_token(x[first:last].T, scale_format)
        scale[:, block : block + group_scale.shape[1]] = group_scale
        block += group_scale.shape[1]
    if not transpose:
        q, scale = row_major(q.T), scale.T
    return q, with_layout(scale, scale_layout)


def cast_back(q: Tensor, scale: Tensor, block: Sequence[int], out_dtype: torch.dtype) -> Tensor:
    return (q.float() * expand_scales(scale, block, *q.shape[-2:])).to(out_dtype).contiguous()


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = split_gate_up(gate_up.float())
    return (gate * sigmoid(gate) * up).to(gate_up.dtype)


def swiglu_cast(
    gate_up: Tensor,
    weights: Tensor | None = None,
    limit: float | None = None,
    scale_format: str = "fp32",
    scale_layout: str = "row",
) -> tuple[Tensor, Tensor]:
    gate, up = clamp_gate_up(*split_gate_up(gate_up.float()), limit)
    y = gate * sigmoid(gate) * up
    if weights is not None:
        y = y * weights[:, None]
    return cast_per_token(y, scale_format, scale_layout)


def split_gate_up(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """(gate, up), each [M, I], of gate_up [M, 2I]."""
    I = gate_up.shape[1] // 2
    return gate_up[:, :I], gate_up[:, I:]


def clamp_gate_up(gate: Tensor, up: Tensor, limit: float | None) -> tuple[Tensor, Tensor]:
    """(min(gate, limit), clamp(up, -limit, limit)); NaN stays NaN. No-op without a limit."""
    if limit is None:
        return gate, up
    lowest = 0.0 - limit  # +0 for a limit of 0; -limit would be -0
    up = torch.where(up > limit, limit, torch.where(up < lowest, lowest, up))
    return torch.where(gate > limit, limit, gate), up


def swiglu_cast_backward(
    grad: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor | None = None,
    weights: Tensor | None = None,
    limit: float | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    gate_up = gate_up.float()
    if gate_up_scale is not None:
        gate_up = gate_up * expand_scales(gate_up_scale, (1, BLOCK), *gate_up.shape)
    raw_gate, raw_up = split_gate_up(gate_up)
    gate, up = (x.double() for x in clamp_gate_up(raw_gate, raw_up, limit))
    weight = 1.0 if weights is None else weights.double()[:, None]
    s = torch.sigmoid(gate)
    y = gate * s * up * weight
    # d silu / dg = σ(g) (1 + g (1 - σ(g)))
    grad_gate = grad.double() * weight * up * s * (1 + gate * (1 - s))
    grad_up = grad.double() * weight * gate * s
    if limit is not None:
        grad_gate = torch.where(raw_gate > limit, 0.0, grad_gate)
        grad_up = torch.where(raw_up.abs() > limit, 0.0, grad_up)
    grad_weights = None if weights is None else (grad.double() * gate * s * up).sum(1).float()
    return torch.cat((grad_gate, grad_up), 1).to(grad.dtype), y.to(grad.dtype), grad_weights


def rmsnorm_cast(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    scale_format: str = "fp32",
    scale_layout: str = "row",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    new_residual = None if residual is None else (x.float() + residual.float()).to(x.dtype)
    h = (x if residual is None else new_residual).float()
    chunks = h.split(8192, 1)  # squares are added pairwise in chunks, then over the chunks
    squares = sum((sum_pairs(chunk * chunk) for chunk in chunks), h.new_zeros(1))  # [M, 1]
    normed = (h * inverse_rms(squares, h.shape[1], eps) * weight.float()).to(x.dtype)
    return *cast_per_token(normed, scale_format, scale_layout), normed, new_residual
