"""Op calls without data: the cost of a call from its shapes.

A call's arguments are tensors on the meta device, which have a shape and no memory. Only indices
that a cost reads, such as sequence lengths, are on the CPU. The op's contract checks the shapes and
its fake kernel allocates the outputs; the formula is `cost` of `deepkern.testing.ops.<op>`, the one
that the roofs of `bench op` and `bench profile` use.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import deepkern
from deepkern.arithmetic import cdiv
from deepkern.testing.costs import Cost, each_tensor_once
from deepkern.testing.ops import cost

BF16, FP8, FP32 = torch.bfloat16, torch.float8_e4m3fn, torch.float32
INT32, INT64 = torch.int32, torch.int64
BLOCK = 128  # values per scale
TORCH = "torch"  # elementwise work that no op does: RoPE, concatenation, gradients of norms, loss
PATHS = ("fp8", "bf16")


class Call(NamedTuple):
    """`count` calls of one op with the same shapes."""

    part: str  # of the model: "attention", "experts", "dense MLP", "head", "optimizer"
    op: str  # or TORCH
    cost: Cost
    count: int = 1

    @property
    def flops(self) -> int:
        return self.cost.flops * self.count


def times(calls: Iterable[Call], count: int) -> list[Call]:
    """The calls, `count` times."""
    return [call._replace(count=call.count * count) for call in calls]


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def per_token(M: int, K: int) -> tuple[Tensor, Tensor]:
    """FP8 rows [M, K] and their scales per 1x128."""
    return meta(M, K, dtype=FP8), meta(M, cdiv(K, BLOCK), dtype=FP32)


def per_block(N: int, K: int, groups: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """An FP8 weight [*groups, N, K] and its scales per 128x128."""
    scale = meta(*groups, cdiv(N, BLOCK), cdiv(K, BLOCK), dtype=FP32)
    return meta(*groups, N, K, dtype=FP8), scale


def call(part: str, op: str, *args: object, count: int = 1, **kwargs: object) -> Call:
    """A call of `op`; its arguments are on the meta device, except indices that a cost reads."""
    registered = deepkern.OPS[op]
    given = registered.positional(args, kwargs)
    on_meta = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, given)
    return Call(part, op, cost(op, given, registered.allocate(*on_meta)), count)


def elementwise(part: str, *tensors: Tensor) -> Call:
    """Elementwise work of plain PyTorch, which reads or writes each of the tensors once."""
    return Call(part, TORCH, each_tensor_once(tensors=tensors))


# A linear layer [M, K] -> [M, N], by the recipe of deepkern.fp8_linear or in bf16.


def linear(part: str, M: int, N: int, K: int, path: str, cast: bool = True) -> list[Call]:
    """The forward pass; `cast`: whether the input is cast here, and not by the op before."""
    if path == "bf16":
        return [call(part, "gemm_nt", meta(M, K), meta(N, K))]
    casts = [call(part, "cast_per_token", meta(M, K))] if cast else []
    return [*casts, call(part, "fp8_gemm_nt", *per_token(M, K), *per_block(N, K), BF16, None)]


def linear_gradients(part: str, M: int, N: int, K: int, path: str) -> list[Call]:
    """The gradients of input and weight; that of the weight is added to an fp32 sum."""
    if path == "bf16":
        return [
            call(part, "gemm_nt", meta(M, N), meta(K, N)),
            call(part, "gemm_nt", meta(N, M), meta(K, M), FP32),
            elementwise(part, *[meta(N, K, dtype=FP32)] * 3),
        ]
    return [
        call(part, "cast_per_token", meta(M, N)),
        call(part, "fp8_gemm_nt", *per_token(M, N), *per_block(K, N), BF16, None),
        call(part, "cast_per_channel", meta(M, N), transpose=True),
        call(part, "cast_per_channel", meta(M, K), transpose=True),
        call(part, "fp8_gemm_nt", *per_token(N, M), *per_token(K, M), FP32,
             meta(N, K, dtype=FP32)),
    ]  # fmt: skip


# The same for E experts with equally many rows, [rows, K] -> [rows, N].


def expert_of_row(rows: int, E: int) -> Tensor:
    """int32 [rows], ascending: rows are sorted by expert."""
    return (torch.arange(rows, dtype=INT64) * E // max(rows, 1)).to(INT32)


def grouped(part: str, rows: int, N: int, K: int, E: int, path: str) -> Call:
    group = expert_of_row(rows, E)
    if path == "bf16":
        return call(part, "m_grouped_gemm_nt_contiguous", meta(rows, K), meta(E, N, K), group)
    operands = *per_token(rows, K), *per_block(N, K, (E,))
    return call(part, "m_grouped_fp8_gemm_nt_contiguous", *operands, group)


def grouped_weight_gradient(part: str, rows: int, N: int, K: int, E: int, path: str) -> list[Call]:
    """Added to an fp32 sum [E, N, K]."""
    if path == "bf16":
        each = -(-rows // E)
        one = call(part, "gemm_nt", meta(N, each), meta(K, each), FP32, count=E)
        return [one, elementwise(part, *[meta(E, N, K, dtype=FP32)] * 3)]
    offsets = torch.arange(E + 1, dtype=INT32) * (rows // E)
    casts = [call(part, "cast_per_channel", meta(rows, width), group_offsets=offsets,
                  transpose=True) for width in (N, K)]  # fmt: skip
    scales = rows // BLOCK + E
    a, b = (t for width in (N, K)
            for t in [(meta(width, rows, dtype=FP8), meta(width, scales, dtype=FP32))])  # fmt: skip
    total = meta(E, N, K, dtype=FP32)
    return [*casts, call(part, "k_grouped_fp8_gemm_nt", *a, *b, offsets, total)]
