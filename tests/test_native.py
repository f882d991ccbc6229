"""The compiled parts: every instruction set gives the same bits, and bad input is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import deepkern
from deepkern.runtime import native
from deepkern.testing import compare
from deepkern.testing.inputs import quant

pytestmark = pytest.mark.skipif(
    native.why_absent() is not None, reason=f"no native code: {native.why_absent()}"
)
ISAS = ["portable", "avx2", "avx512"]


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("DEEPKERN_CPU_ISA", request.param)
    try:
        native.native_op("cast_per_token")(torch.ones(1, 1), "fp32")
    except RuntimeError as error:
        assert "instruction set" in str(error)
        pytest.skip(f"this CPU lacks {request.param}")
    return request.param


def check(x: torch.Tensor, scale_format: str = "fp32") -> None:
    with deepkern.backend("cpu"):
        got = deepkern.cast_per_token(x, scale_format)
    want = deepkern.reference.cast_per_token(x, scale_format)
    compare.assert_matches("cast_per_token", got, want)


def test_every_16_bit_value(isa):
    codes = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        x = codes.view(dtype).reshape(-1, 128)
        check(x)
        # One value to a block, so that inf and NaN spoil nothing else and every scale occurs.
        check(torch.nn.functional.pad(codes.view(dtype)[::7, None], (0, 2)), "ue8m0")


@pytest.mark.parametrize("K", [1, 127, 128, 129, 1000])
def test_partial_blocks_and_strided_rows(isa, K):
    generator = torch.Generator().manual_seed(K)
    x = quant.values(generator, 9, K + 40, dtype=torch.float32)[:, 17 : 17 + K]
    check(x)
    check(quant.values(generator, 3, 5, K).transpose(0, 1))


def test_ties_saturation_and_subnormals(isa):
    # An amax of 448 makes the scale 1, so these are rounded as they stand.
    ties = torch.arange(0, 448, 0.5) / 2
    small = torch.arange(0, 64) * 2.0**-11
    x = torch.cat([ties, small, -ties, -small])
    x = x[: len(x) // 127 * 127].reshape(-1, 127)
    check(torch.cat([x, torch.full((len(x), 1), 448.0)], dim=1))


def test_unknown_isa_is_an_error(monkeypatch):
    monkeypatch.setenv("DEEPKERN_CPU_ISA", "neon")
    with pytest.raises(RuntimeError, match="instruction set"):
        native.native_op("cast_per_token")(torch.ones(1, 1), "fp32")


def test_many_rows_over_threads(generator):
    check(quant.values(torch.Generator().manual_seed(generator.initial_seed()), 5000, 130))


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 33))
def test_tile_schedule_against_a_loop(counts, block_m):
    want, row = [], 0
    for g, count in enumerate(counts):
        want += [(g, row + m) for m in range(0, count, block_m)]
        row += count
    group, first_row = native.host().grouped_tile_schedule(np.array(counts, np.int64), block_m)
    assert list(zip(group.tolist(), first_row.tolist(), strict=True)) == want
    assert group.dtype == first_row.dtype == np.int32


@pytest.mark.parametrize(
    ("counts", "block_m", "words"),
    [
        (np.array([[1]]), 16, "rank 1"),
        (np.array([3, -1]), 16, r"tokens_per_group\[1\]"),
        (np.array([2**31 - 1, 1]), 2**20, "2\\^31"),
        (np.array([3]), 0, "block_m"),
    ],
)
def test_tile_schedule_refuses(counts, block_m, words):
    with pytest.raises(ValueError, match=words):
        native.host().grouped_tile_schedule(counts, block_m)
