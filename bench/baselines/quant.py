"""Plain PyTorch for the casts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import baseline

FP8 = torch.float8_e4m3fn


def _scale(amax: Tensor, scale_format: str) -> Tensor:
    scale = amax.clamp(min=1e-4) / 448
    if scale_format == "ue8m0":
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    # NaN and inf in spoil their block.
    return torch.where(amax.isfinite(), scale, torch.nan)


@baseline
def cast_per_token(
    x: Tensor, scale_format: str = "fp32", scale_layout: str = "row"
) -> tuple[Tensor, Tensor]:
    """amax, divide and cast, op by op."""
    K = x.shape[-1]
    blocks = F.pad(x, (0, -K % 128)).unflatten(-1, (-1, 128)).float()
    scale = _scale(blocks.abs().amax(-1), scale_format)
    q = (blocks / scale[..., None]).clamp(-448, 448).to(FP8)
    return q.flatten(-2)[..., :K], _laid_out(scale, scale_layout)


def _laid_out(scale: Tensor, layout: str) -> Tensor:
    return scale if layout == "row" else scale.mT.contiguous().mT


@baseline
def cast_per_channel(
    x, scale_format="fp32", group_offsets=None, transpose=False, scale_layout="row"
) -> tuple[Tensor, Tensor]:
    """amax, divide, cast and transpose, op by op and group by group."""
    M, K = x.shape
    offsets = [0, M] if group_offsets is None else group_offsets.tolist()
    scales, casts = [], []
    for first, last in zip(offsets, offsets[1:], strict=False):
        rows = x[first:last].float()
        scale = F.pad(rows, (0, 0, 0, (first - last) % 128)).unflatten(0, (-1, 128)).abs().amax(1)
        scales.append(_scale(scale, scale_format))
        spread = scales[-1].repeat_interleave(128, 0)[: last - first]
        casts.append((rows / spread).clamp(-448, 448).to(FP8))
    q = torch.cat(casts) if casts else x.new_zeros((M, K)).to(FP8)  # the groups are all of the rows
    groups = 0 if group_offsets is None else len(offsets) - 1
    scale = x.new_zeros((-(-M // 128) + groups, K), dtype=torch.float32)
    used = torch.cat(scales) if scales else scale
    scale[: len(used)] = used
    if transpose:
        q, scale = q.T.contiguous(), scale.T.contiguous()
    return q, _laid_out(scale, scale_layout)


@baseline
def cast_per_block(x: Tensor, scale_format: str = "fp32") -> tuple[Tensor, Tensor]:
    """amax, divide and cast, op by op."""
    N, K = x.shape[-2:]
    blocks = F.pad(x, (0, -K % 128, 0, -N % 128)).float()
    blocks = blocks.unflatten(-1, (-1, 128)).unflatten(
        -3, (-1, 128)
    )  # [.., N/128, 128, K/128, 128]
    scale = _scale(blocks.abs().amax((-1, -3)), scale_format)
    q = (blocks / scale[..., :, None, :, None]).clamp(-448, 448).to(FP8)
    return q.flatten(-2).flatten(-3, -2)[..., :N, :K], scale


def _spread(scale: Tensor, block: Sequence[int], N: int, K: int) -> Tensor:
    """One scale for every value."""
    wide = scale.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return wide[..., :N, :K]


@baseline
def cast_back(q: Tensor, scale: Tensor, block: Sequence[int], out_dtype: torch.dtype) -> Tensor:
    """Cast, spread the scales, multiply."""
    return (q.float() * _spread(scale, block, *q.shape[-2:])).to(out_dtype)


def _swiglu(gate_up: Tensor, weights: Tensor | None, limit: float | None) -> Tensor:
    gate, up = gate_up.float().tensor_split(2, -1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    y = F.silu(gate) * up
    return y if weights is None else y * weights[:, None]


@baseline
def swiglu_cast(
    gate_up, weights=None, limit=None, scale_format="fp32", scale_layout="row"
) -> tuple[Tensor, Tensor]:
    """F.silu, multiply, cast op by op."""
    return cast_per_token(_swiglu(gate_up, weights, limit), scale_format)


@baseline
def swiglu_cast_backward(
    grad, gate_up, gate_up_scale=None, weights=None, limit=None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Dequantise, autograd through F.silu."""
    gate_up = gate_up.float()
    if gate_up_scale is not None:
        gate_up = cast_back(gate_up, gate_up_scale, (1, 128), torch.float32)
    with torch.enable_grad():
        given = [gate_up.detach()] if weights is None else [gate_up.detach(), weights.detach()]
        given = [x.requires_grad_() for x in given]
        y = _swiglu(*given, None, limit) if weights is None else _swiglu(*given, limit)
        grads = torch.autograd.grad(y, given, grad.float())
    return grads[0].to(grad.dtype), y.detach().to(grad.dtype), *(grads[1:] or (None,))


@baseline
def rmsnorm_cast(
    x, weight, eps=1e-6, residual=None, scale_format="fp32", scale_layout="row"
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Add, F.rms_norm, cast op by op."""
    h = x if residual is None else x + residual
    normed = F.rms_norm(h.float(), h.shape[-1:], weight.float(), eps).to(x.dtype)
    return *cast_per_token(normed, scale_format), normed, None if residual is None else h
