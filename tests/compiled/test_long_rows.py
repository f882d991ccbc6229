"""Rows of topk_indices on several programs, in compiled form: any order, the same indices."""

from __future__ import annotations

import pytest
import torch

import deepkern
from deepkern.testing import compare, ops

TARGETS = ["sm_90", *(pytest.param(t, marks=pytest.mark.slow) for t in ("sm_80", "sm_120"))]


def hostile(generator: torch.Generator, N: int, k: int) -> torch.Tensor:
    """Equal values in several chunks; half of a row in k groups; NaN, infinities, -0."""
    logits = torch.randn(4, N, generator=generator)
    logits[0] = 0.0
    logits[0, 4090:4100], logits[0, ::3] = 1.0, -0.0
    column = torch.arange(N)
    group = (column - column // 1024 * 256) % 1024
    strong = group < k
    logits[1, strong] = logits[1, strong].abs() + 10
    logits[1, group == 3] = 10.0
    logits[2, ::5], logits[2, 1::7], logits[2, 2::999] = torch.nan, -torch.inf, torch.inf
    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", TARGETS)
def test_long_rows(target, dtype, generator, seed):
    """Against the reference in every order of the machine, together and each row alone."""
    N, k = 3 * 4096 + 1, 500
    logits = hostile(generator, N, k).to(dtype)
    lengths = torch.tensor([N, N, 8192, 100], dtype=torch.int32)
    want = deepkern.reference.topk_indices(logits, k, lengths)
    for i, order in enumerate(("random", "earliest", "latest")):
        with deepkern.backend("triton"), deepkern.compiled(target, seed=seed + i, order=order):
            compare.assert_bitwise(deepkern.topk_indices(logits, k, lengths), want, order)
    with deepkern.backend("triton"), deepkern.compiled(target, seed=seed):
        for s in range(4):
            alone = deepkern.topk_indices(logits[s : s + 1], k, lengths[s : s + 1])
            compare.assert_bitwise(alone, want[s : s + 1], f"row {s}")


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 4096])
def test_least_and_largest_k(k, generator, seed):
    """Most programs and warps, and the fewest groups."""
    logits, _, lengths = ops.inputs("topk_indices", generator, 2, 140000, k, ragged=True)
    with deepkern.backend("triton"), deepkern.compiled("sm_90", seed=seed):
        got = deepkern.topk_indices(logits, k, lengths)
    compare.assert_bitwise(got, deepkern.reference.topk_indices(logits, k, lengths))
