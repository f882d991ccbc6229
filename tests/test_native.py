"""The compiled parts: all instruction sets give the same bits, and bad arguments raise."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch

import deepkern
from deepkern.runtime import native
from deepkern.testing import compare
from deepkern.testing.random_inputs import values

needs_ops = pytest.mark.skipif(
    native.missing_reason() is not None, reason=str(native.missing_reason())
)


@pytest.fixture
def host() -> ModuleType:
    try:
        return native.host()
    except ImportError as error:
        pytest.skip(str(error))


def cast_by_definition(x: torch.Tensor, scale_format: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes (as uint8) and scales of [M, K] from a table of all e4m3 values."""
    M, K = x.shape
    width = min(K, 128)
    values = np.zeros((M, -(-K // width), width), np.float32)
    values.reshape(M, -1)[:, :K] = x.float().numpy()
    with np.errstate(all="ignore"):
        scale = np.maximum(np.abs(values).max(-1), np.float32(1e-4)) / np.float32(448)
        if scale_format == "ue8m0":
            fraction, exponent = np.frexp(scale)  # scale = fraction * 2^exponent, fraction >= 1/2
            scale = np.where(
                np.isfinite(scale), np.ldexp(np.float32(1), exponent - (fraction == 0.5)), scale
            )
        scale[~np.isfinite(values).all(-1)] = np.nan
        scaled = values * (np.float32(1) / scale)[..., None]

    code = np.arange(127)  # finite magnitudes, ascending
    magnitude = np.where(code < 8, code * 2.0**-9, (8 + code % 8) * 2.0 ** (code // 8 - 10))
    middle = (magnitude[1:] + magnitude[:-1]) / 2
    distance = np.abs(scaled.astype(np.float64))
    lower = np.searchsorted(middle, distance)  # on a tie the lower neighbour
    tie = np.append(middle, np.inf)[lower] == distance
    q = lower + (tie & (lower % 2 == 1)) + 128 * np.signbit(scaled)
    q = np.where(np.isnan(scaled), 0x7F, q).astype(np.uint8)
    return q.reshape(M, -1)[:, :K], scale


def check(x: torch.Tensor) -> None:
    """Compares the native op with the definition and the reference, for both scale formats."""
    for scale_format in ("fp32", "ue8m0"):
        q, scale = native.native_op("cast_per_token")(x, scale_format)
        rows = x.reshape(-1, x.shape[-1])
        codes, scales = cast_by_definition(rows, scale_format)
        np.testing.assert_array_equal(q.view(torch.uint8).reshape(rows.shape).numpy(), codes)
        np.testing.assert_array_equal(scale.reshape(scales.shape).numpy(), scales)
        with deepkern.backend("cpu"):
            got = deepkern.cast_per_token(x, scale_format)
        want = deepkern.reference.cast_per_token(x, scale_format)
        compare.assert_matches("cast_per_token", got, want)


@needs_ops
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value(isa, dtype):
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    check(x.reshape(-1, 128))
    # One value per block: inf and NaN affect no other value, and every scale occurs.
    check(x[:, None])
    # A 448 in each block makes the scale 1.
    small = torch.where(x.abs() <= 448, x, 0)
    check(torch.stack([small, torch.full_like(small, 448)], 1))


@needs_ops
def test_random_float32_bits(isa, seed):
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, (2000, 64), generator=generator).to(torch.int32)
    check(bits.view(torch.float32)[:, :1])
    # One exponent per row, so that the block's scale does not round the small values to zero.
    bits = bits & ~0x7F800000 | torch.randint(0, 254, (2000, 1), generator=generator).int() << 23
    check(bits.view(torch.float32))


@needs_ops
@pytest.mark.parametrize("K", [1, 127, 128, 129, 1000])
def test_partial_blocks_and_strided_rows(isa, K, seed):
    generator = torch.Generator().manual_seed(seed)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        check(values(generator, 9, K + 40, dtype=dtype)[:, 17 : 17 + K])
        check(values(generator, 3, 5, K, dtype=dtype).transpose(0, 1))


@needs_ops
def test_inf_and_nan_affect_only_their_block(isa):
    x = torch.ones(4, 300)
    x[0, 5], x[1, 130], x[2, 299] = float("inf"), float("nan"), float("-inf")
    x[3] = -0.0
    check(x)


@needs_ops
def test_ties_and_subnormals(isa):
    # An amax of 448 makes the scale 1.
    ties = torch.arange(0, 448, 0.5) / 2
    small = torch.arange(0, 64) * 2.0**-11
    x = torch.cat([ties, small, -ties, -small])
    x = x[: len(x) // 127 * 127].reshape(-1, 127)
    check(torch.cat([x, torch.full((len(x), 1), 448.0)], dim=1))


@needs_ops
@pytest.mark.parametrize(
    "shape", [(5, 300), (8, 128), (2, 5, 300), (3, 2, 7, 129), (40,), (5, 0), (3, 0, 5), (700, 900)]
)
def test_column_scale_layout(isa, shape, seed):
    """The same values; the column pitch is a multiple of 4, and the padding is zero."""
    x = values(torch.Generator().manual_seed(seed), *shape)
    q, scale = native.native_op("cast_per_token")(x, "fp32", "row")
    q_column, by_column = native.native_op("cast_per_token")(x, "fp32", "column")
    compare.assert_bitwise(q_column, q)
    compare.assert_bitwise(by_column, scale)
    if len(shape) == 1 or not scale.numel():
        return  # no columns to look at
    M, pitch = shape[-2], -(-shape[-2] // 4) * 4
    assert by_column.stride()[-2:] == (1, pitch)
    buffer = by_column.as_strided((by_column.numel() // M, pitch), (pitch, 1))
    assert (buffer[:, M:] == 0).all()


@needs_ops
def test_many_rows_over_threads(seed):
    check(values(torch.Generator().manual_seed(seed), 5000, 130))


@needs_ops
@pytest.mark.parametrize(
    ("x", "scale_format", "scale_layout", "message"),
    [
        (torch.ones(2, 2), "fp16", "row", "scale_format: expected ue8m0 or fp32, got fp16"),
        (torch.ones(2, 2), "fp32", "col", "scale_layout: expected column or row, got col"),
        (torch.ones(()), "fp32", "row", "x: expected rank 1 or more"),
        (torch.ones(2, 2, dtype=torch.int32), "fp32", "row", "x: expected dtype"),
        (torch.ones(3, 2).t(), "fp32", "row", "x: expected stride 1 in the last dimension, got 2"),
    ],
)
def test_bad_cast_arguments_raise(x, scale_format, scale_layout, message):
    with pytest.raises(RuntimeError, match=f"cast_per_token: {message}"):
        native.native_op("cast_per_token")(x, scale_format, scale_layout)


@needs_ops
def test_unknown_isa_raises(monkeypatch):
    monkeypatch.setenv("DEEPKERN_CPU_ISA", "neon")
    with pytest.raises(RuntimeError, match="instruction set"):
        native.native_op("cast_per_token")(torch.ones(1, 1), "fp32")


def test_unknown_op_is_none():
    assert native.native_op("no_such_op") is None


def test_tile_schedule_against_a_loop(host):
    hypothesis = pytest.importorskip("hypothesis")
    counts_of_groups = hypothesis.strategies.lists(
        hypothesis.strategies.integers(0, 40), max_size=12
    )

    @hypothesis.given(counts_of_groups, hypothesis.strategies.integers(1, 50))
    def check(counts, block_m):
        want, row = [], 0
        for g, count in enumerate(counts):
            want += [(g, row + m) for m in range(0, count, block_m)]
            row += count
        group, first_row = host.grouped_tile_schedule(np.array(counts, np.int32), block_m)
        assert list(zip(group.tolist(), first_row.tolist(), strict=True)) == want
        assert group.dtype == first_row.dtype == np.int32

    check()


@pytest.mark.parametrize(
    ("counts", "block_m", "message"),
    [
        (np.array([[1]]), 16, "rank 1"),
        (np.array([3, -1]), 16, r"tokens_per_group\[1\]"),
        (np.array([2**31 - 1, 1]), 2**20, "2\\^31"),
        (np.array([1, 2**63 - 1]), 2**63 - 1, r"tokens_per_group\[1\].*2\^31"),
        (np.array([3]), 0, "block_m"),
    ],
)
def test_bad_tile_schedule_arguments_raise(host, counts, block_m, message):
    with pytest.raises(ValueError, match=message):
        host.grouped_tile_schedule(counts, block_m)


def test_tile_schedule_rejects_floats(host):
    with pytest.raises(TypeError):
        host.grouped_tile_schedule(np.array([1.5]), 16)
