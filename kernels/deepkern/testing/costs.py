"""The least that a call has to do: bytes to move and floating-point operations.

Bytes count every tensor in and out once, unless the op reads or writes only a part of one. FLOPs
count the multiplications and additions of matrix products; an op without any has 0.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_leaves


class Cost(NamedTuple):
    """What one call moves and computes."""

    bytes: int
    flops: int = 0
    fp8: bool = False  # whether the products can run at the tensor cores' FP8 rate


def tensor_bytes(*values) -> int:
    """Bytes of all tensors in `values`, which may be nested."""
    return sum(x.numel() * x.element_size() for x in tree_leaves(values) if isinstance(x, Tensor))


def each_tensor_once(**tensors) -> Cost:
    """The cost of an op that reads and writes each of its tensors once and multiplies none."""
    return Cost(tensor_bytes(tensors))


def row_bytes(cache: Tensor) -> int:
    """Bytes of one token of a paged cache [blocks, page, 1, width], or of one row of a matrix."""
    return cache.shape[-1] * cache.element_size()
