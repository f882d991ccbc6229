"""Weights of the model: number formats, random initial values, and reading from a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import deepkern
from deepkern.arithmetic import cdiv
from model.checkpoint import Checkpoint, CheckpointError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
WHOLE = slice(None)  # all rows or columns of a weight


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


def resolve_dtype(dtype: torch.dtype | str, checkpoint: Checkpoint) -> torch.dtype:
    """A dtype or its name; "auto" is the checkpoint's, as in transformers.

    The checkpoint's is the one that config.json names, else that of the embedding.
    """
    if dtype == "auto":
        embedding = checkpoint.stored["model.embed_tokens.weight"].torch_dtype
        stored = DTYPES.get(checkpoint.config.stored_dtype or "") or embedding
        return stored if stored in DTYPES.values() else torch.bfloat16  # type: ignore[return-value]
    resolved = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved is None or resolved not in DTYPES.values():
        names = ", ".join(["auto", *DTYPES])
        raise ValueError(f"DeepSeek: dtype: expected one of {names}, got {dtype!r}")
    return resolved


# A tensor that needs no conversion is a view of the mapped file.  Every other one is read,
# converted and freed before the next, so loading takes the memory of the model and of one weight.


def load_real(
    checkpoint: Checkpoint,
    name: str,
    precision: Precision,
    dtype: torch.dtype | None = None,
    mapped: bool = True,
) -> Tensor:
    """Reads a tensor, dequantizes it if it is FP8, and converts it to `dtype` or the model's.

    mapped: the result may be a view of the mapped file.
    """
    device, dtype = precision.device, dtype or precision.dtype
    mapped = mapped and checkpoint.stored[name].torch_dtype == dtype
    tensor, scale = checkpoint.read(name, mapped and torch.device(device).type == "cpu")
    tensor = tensor.to(device)
    if scale is None:
        return tensor.to(dtype)
    return deepkern.cast_back(tensor, scale.to(device), checkpoint.block, dtype)


def load_matrix(
    checkpoint: Checkpoint,
    name: str,
    precision: Precision,
    mapped: bool = True,
    rows: slice = WHOLE,
    columns: slice = WHOLE,
) -> Matrix:
    """Reads the weight [N, K] of a Linear: e4m3 and its scales with `fp8`, else real.

    rows, columns: the part that is kept; its FP8 values and scales are those of the whole weight.
    """
    if rows != WHOLE or columns != WHOLE:
        return cut(load_matrix(checkpoint, name, precision, mapped), rows, columns)
    if not precision.fp8:
        return load_real(checkpoint, name, precision, mapped=mapped), None
    mapped = mapped and checkpoint.stored[name].torch_dtype == torch.float8_e4m3fn
    weight, scale = checkpoint.read(name, mapped and torch.device(precision.device).type == "cpu")
    if scale is None:
        return quantize_weight(weight.to(precision.device), precision)
    if checkpoint.block != (128, 128):
        file, block = checkpoint.stored[name].file, checkpoint.block
        raise CheckpointError(f"{file}: tensor {name} is FP8 in blocks of {block}, not 128x128")
    return weight.to(precision.device), scale.to(precision.device)


def cut(matrix: Matrix, rows: slice, columns: slice) -> Matrix:
    """A copy of some rows and columns of a weight and their scales; the weight itself if all.

    The columns must start at a multiple of 128 or be inside one block.  If the rows do not start at
    a multiple of 128, there is one scale per row.
    """
    weight, scale = matrix
    if weight[rows, columns].shape == weight.shape:
        return matrix
    n, k = (range(size)[part] for size, part in zip(weight.shape, (rows, columns), strict=True))
    weight = weight[n.start : n.stop, k.start : k.stop].clone(memory_format=torch.contiguous_format)
    if scale is not None:
        scale = scale[:, k.start // 128 : cdiv(k.stop, 128)]
        if n.start % 128:
            scale = scale.repeat_interleave(128, 0)[n.start : n.stop]
        else:
            scale = scale[n.start // 128 : cdiv(n.stop, 128)]
        scale = scale.contiguous()
    return weight, scale


def load_stack(
    checkpoint: Checkpoint,
    groups: Sequence[Sequence[str]],
    precision: Precision,
    rows: Sequence[slice] = (),
    columns: slice = WHOLE,
) -> Matrix:
    """Weights [N_i, K] of each group, one below the other -> [groups, ΣN_i, K] and its scales.

    The scales are those of the 128x128 blocks, [groups, ΣN_i/128, K/128].  If an N_i but the last
    is not a multiple of 128, a block would hold rows of two weights, and the scales are repeated to
    one per row, [groups, ΣN_i, K/128].

    rows, columns: the part of each weight of a group, and of all, that is kept; by default all.
    """
    shapes = [checkpoint.stored[name].shape or (0, 0) for name in groups[0]]
    rows = rows or [WHOLE] * len(shapes)
    counts = [len(range(shape[0])[part]) for shape, part in zip(shapes, rows, strict=True)]
    dtype = torch.float8_e4m3fn if precision.fp8 else precision.dtype
    shape = len(groups), sum(counts), len(range(shapes[0][1])[columns])
    stack, scales = torch.empty(shape, dtype=dtype, device=precision.device), []
    for out, names in zip(stack, groups, strict=True):
        parts = []
        for name, own, part in zip(names, rows, out.split(counts), strict=True):
            weight, scale = load_matrix(checkpoint, name, precision, False, own, columns)
            part.copy_(weight)
            parts.append(scale)
        scales.append(concat_scales(parts, counts))
    return stack, torch.stack(scales) if precision.fp8 else None  # type: ignore[arg-type]


def load_rows(
    checkpoint: Checkpoint,
    names: Sequence[str],
    precision: Precision,
    rows: Sequence[slice] = (),
    columns: slice = WHOLE,
) -> Matrix:
    """The weights of one product, one below the other; the rest as in `load_stack`."""
    if len(names) == 1:
        own = rows[0] if rows else WHOLE
        return load_matrix(checkpoint, names[0], precision, rows=own, columns=columns)
    weight, scale = load_stack(checkpoint, [names], precision, rows, columns)
    return weight[0], None if scale is None else scale[0]


def concat_scales(scales: Sequence[Tensor | None], rows: Sequence[int]) -> Tensor | None:
    """Scales of weights with `rows` rows each, for the weights one below the other.

    Each has one per block or one per row.
    """
    parts = [scale for scale in scales if scale is not None]
    if not parts:
        return None
    pairs = list(zip(parts, rows, strict=True))
    if any(count % 128 for count in rows[:-1]) or any(len(s) == n for s, n in pairs):
        parts = [
            scale if len(scale) == count else scale.repeat_interleave(128, 0)[:count]
            for scale, count in pairs
        ]
    return torch.cat(parts)
