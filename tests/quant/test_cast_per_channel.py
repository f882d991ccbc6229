"""cast_per_channel: as cast_per_token of the transpose, group by group, whatever offsets hold."""

from __future__ import annotations

import pytest
import torch

import deepkern
from deepkern.testing import compare
from deepkern.testing.inputs.quant import values

OP = "cast_per_channel"


def check(*args, **kwargs):
    with compare.poison():
        got = deepkern.cast_per_channel(*args, **kwargs)
    compare.assert_matches(OP, got, deepkern.reference.cast_per_channel(*args, **kwargs))
    return got


def offsets_of(x: torch.Tensor, offsets: list[int]) -> torch.Tensor:
    return torch.tensor(offsets, dtype=torch.int32, device=x.device)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("scale_layout", ["row", "column"])
@pytest.mark.parametrize(
    ("M", "K"), [(0, 5), (5, 0), (1, 1), (3, 129), (127, 3), (129, 128), (257, 70), (300, 130)]
)
def test_shapes(backend, generator, M, K, transpose, scale_layout):
    scale_format = ("fp32", "ue8m0")[(M + K) % 2]
    check(values(generator, M, K), scale_format, None, transpose, scale_layout)


OFFSETS = {
    "even": [0, 128, 256, 300],
    "ragged": [0, 1, 130, 300],
    "empty": [0, 0, 300, 300],
    "not all rows": [5, 40, 200, 290],
    "hostile": [-(2**31), 400, 7, 2**31 - 1],
    "backwards": [300, 200, 100, 0],
    "no group": [0],
}


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=list(OFFSETS))
def test_any_offsets(backend, generator, offsets, transpose):
    x = values(generator, 300, 70)
    check(x, "fp32", offsets_of(x, offsets), transpose)


def test_is_cast_per_token_of_the_transpose(backend, generator):
    x = values(generator, 300, 70)
    got = deepkern.cast_per_channel(x, transpose=True)
    for g, w in zip(got, deepkern.cast_per_token(x.t().contiguous()), strict=True):
        compare.assert_bitwise(g, w)


def test_groups_are_cast_one_by_one(backend, generator):
    x, offsets, block = values(generator, 300, 70), [0, 100, 100, 229, 300], 0
    q, scale = deepkern.cast_per_channel(x, group_offsets=offsets_of(x, offsets))
    for first, last in zip(offsets, offsets[1:], strict=False):
        q_alone, scale_alone = deepkern.cast_per_channel(x[first:last])
        compare.assert_bitwise(q[first:last], q_alone)
        compare.assert_bitwise(scale[block : block + len(scale_alone)], scale_alone)
        block += len(scale_alone)
    assert not scale[block:].any()


def test_nan_and_inf_spoil_their_block_only(backend, generator):
    x = values(generator, 300, 70)
    good = deepkern.cast_per_channel(x)[1]
    x[130, 3], x[0, 7] = float("nan"), float("inf")
    scale = check(x)[1]
    spoilt = torch.zeros_like(scale, dtype=torch.bool)
    spoilt[1, 3] = spoilt[0, 7] = True
    assert torch.equal(scale.isnan(), spoilt)
    compare.assert_bitwise(scale[~spoilt], good[~spoilt])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dtypes_and_strided_rows(backend, generator, dtype):
    check(values(generator, 300, 140, dtype=dtype)[::2, 3:100], transpose=True)
