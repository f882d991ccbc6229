"""Weights of the model: number formats, random initial values, and reading from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import deepkern
from model.checkpoint import Checkpoint, CheckpointError


class Precision(NamedTuple):
    """Number formats and device of a model.

    With `fp8` every `Linear` and every routed expert keeps e4m3 weights with 128x128 scales and
    casts its input per token, with scales in `scale_format`, "fp32" or "ue8m0".  Otherwise they
    compute in `dtype`.
    """

    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    fp8: bool = False
    scale_format: str = "fp32"


# A module starts with random weights.  `load(checkpoint, name)` replaces them; `name` is
# the module's name in the checkpoint.

Matrix = tuple[Tensor, Tensor | None]  # weight [N, K]; scale of each 128x128 block if it is e4m3


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter without gradient."""
    return nn.Parameter(tensor, requires_grad=False)


def random_weight(*shape: int) -> Tensor:
    """fp32 [..., outputs, inputs], uniform in ±1/sqrt(inputs), the default of nn.Linear."""
    bound = shape[-1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound)


def quantize_weight(weight: Tensor, precision: Precision) -> Matrix:
    """real [..., N, K] -> e4m3 and its scales with `fp8`, else `dtype` and None."""
    if precision.fp8:
        return deepkern.cast_per_block(weight)
    return weight.to(precision.dtype), None


def load_real(
    checkpoint: Checkpoint, name: str, precision: Precision, dtype: torch.dtype | None = None
) -> Tensor:
    """Reads a tensor, dequantizes it if it is FP8, and converts it to `dtype` or the model's."""
    tensor, scale = checkpoint.read(name)
    tensor, dtype = tensor.to(precision.device), dtype or precision.dtype
    if scale is None:
        return tensor.to(dtype)
    return deepkern.cast_back(tensor, scale.to(precision.device), checkpoint.block, dtype)


def load_matrix(checkpoint: Checkpoint, name: str, precision: Precision) -> Matrix:
    """Reads the weight [N, K] of a Linear: e4m3 and its scales with `fp8`, else real."""
    if not precision.fp8:
        return load_real(checkpoint, name, precision), None
    weight, scale = checkpoint.read(name)
    if scale is None:
        return quantize_weight(weight.to(precision.device), precision)
    if checkpoint.block != (128, 128):
        file, block = checkpoint.stored[name].file, checkpoint.block
        raise CheckpointError(f"{file}: tensor {name} is FP8 in blocks of {block}, not 128x128")
    return weight.to(precision.device), scale.to(precision.device)


def concat_rows(parts: list[Matrix]) -> Matrix:
    """Weights [N_i, K] with their block scales -> one [ΣN_i, K], whose product gives all outputs.

    If an N_i but the last is not a multiple of 128, a block would hold rows of two weights.  The
    scales are then repeated to one per row, [ΣN_i, K/128].
    """
    weight = join(torch.cat, [weight for weight, _ in parts])
    scales = [scale for _, scale in parts if scale is not None]
    if not scales:
        return weight, None
    if any(len(part) % 128 for part, _ in parts[:-1]):
        lengths = [len(part) for part, _ in parts]
        scales = [
            scale.repeat_interleave(128, 0)[:rows]
            for scale, rows in zip(scales, lengths, strict=True)
        ]
    return weight, torch.cat(scales)


def join(function: Callable[[list[Tensor]], Tensor], tensors: list[Tensor]) -> Tensor:
    """function(tensors) for torch.cat or torch.stack; e4m3 tensors are passed as bytes."""
    if tensors[0].dtype != torch.float8_e4m3fn:
        return function(tensors)
    return function([t.view(torch.uint8) for t in tensors]).view(torch.float8_e4m3fn)
