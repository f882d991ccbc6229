"""Inputs, sizes, cost and baseline of expert_dispatch."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from ..costs import each_tensor_once
from ..random_inputs import values
from ..routing import V3_TOKENS, indices, zipf_indices
from . import Sizes, cast_per_token

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


def inputs(
    generator: Generator,
    T: int,
    E: int,
    topk: int,
    K: int,
    alignment: int = 1,
    dtype: torch.dtype = BF16,
    scaled: bool | None = None,
    none: float = 0.1,
    cast: str | None = None,
    skewed: bool = False,
) -> tuple[Tensor, Tensor, int, Tensor | None, int, str | None]:
    """Row t of `x` starts with t % 256, so that neighbouring rows differ."""
    x = values(generator, T, K, dtype=torch.float32)
    if K:
        x[:, 0] = torch.arange(T, device=x.device) % 256
    scale = torch.rand(T, -(-K // 128), generator=generator, device=x.device)
    scale = scale if (dtype == FP8 if scaled is None else scaled) else None
    x = x.clamp(-448, 448).to(dtype)
    idx = zipf_indices(generator, T, E, topk) if skewed else indices(generator, T, E, topk, none)
    return x, idx, E, scale, alignment, cast


SIZES = Sizes(
    small=[
        {"T": 20, "E": 10, "topk": 3, "K": 256, "alignment": 2, "scaled": True},
        {"T": 37, "E": 10, "topk": 3, "K": 300, "alignment": 4, "dtype": FP8},
        {"T": 200, "E": 40, "topk": 2, "K": 64},
        {"T": 5, "E": 1, "topk": 1, "K": 1, "dtype": torch.float32, "scaled": True},
        {"T": 3, "E": 256, "topk": 8, "K": 1100, "alignment": 2, "dtype": torch.float16},
        {"T": 9, "E": 6, "topk": 3, "K": 1300, "alignment": 2, "cast": "fp32"},
        {"T": 5, "E": 6, "topk": 9, "K": 100, "dtype": torch.float32, "cast": "ue8m0"},
        {"T": 0, "E": 8, "topk": 2, "K": 128},
        {"T": 4, "E": 8, "topk": 2, "K": 0, "dtype": FP8},
        {"T": 4, "E": 8, "topk": 0, "K": 16},
    ],
    cpu=[{"T": 256, "E": 256, "topk": 8, "K": 7168, "dtype": FP8, "none": 0.0}],
    gpu=[
        {"T": T, "E": 256, "topk": 8, "K": 7168, "none": 0.0, "skewed": skewed, **cast}
        for T in V3_TOKENS
        for skewed in (False, True)
        for cast in ({"dtype": FP8}, {"cast": "ue8m0"})
    ]
    + [{"T": 4096, "E": 256, "topk": 8, "K": 7168, "alignment": 128, "none": 0.5}],
    inspect=[
        {"T": 4096, "E": 256, "topk": 8, "K": 7168, "dtype": FP8},
        {"T": 4096, "E": 64, "topk": 6, "K": 2048},
        {"T": 128, "E": 2000, "topk": 8, "K": 2048},
        {"T": 4096, "E": 256, "topk": 8, "K": 7168, "cast": "fp32"},
    ],
)
EXACT = True
cost = each_tensor_once


def baseline(
    x, topk_idx, num_experts, x_scale=None, alignment=1, cast=None, num_assigned=None
) -> tuple:  # fmt: skip
    """Cast if requested, stable argsort, index_select."""
    if cast is not None:
        x, x_scale = cast_per_token.baseline(x, cast)
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
        gathered = source.index_select(0, order // max(topk, 1))
        if len(order) < rows:
            gathered = source.new_zeros(rows, source.shape[1]).index_copy_(0, row, gathered)
        return gathered

    group_index = row.new_full((rows,), -1, dtype=torch.int32)
    group_index[row] = expert[order].int()
    handle = row.new_full((T * topk,), -1, dtype=torch.int32)
    handle[order] = row.int()
    scale = None if x_scale is None else sort(x_scale)
    return sort(x).view(x.dtype), scale, group_index, counts.int(), handle.view(T, topk)
