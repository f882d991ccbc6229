"""cast_per_token: every bf16 value, scale layouts, NaN and inf inside their block."""

from __future__ import annotations

import math

import pytest
import torch

import deepkern
from deepkern.quant.fp8 import with_padding
from deepkern.testing import compare
from deepkern.testing.random_inputs import values


@pytest.fixture(params=["torch", "triton", "cpu"])
def backend(request, device):
    """Forces each backend in turn; `cpu` needs CPU tensors."""
    if request.param == "cpu" and device.type != "cpu":
        pytest.skip("cpu takes CPU tensors")
    with deepkern.backend(request.param):
        yield request.param


def test_dequantized_value_within_half_an_ulp(backend, generator):
    x = values(generator, 64, 384)
    q, scale = deepkern.cast_per_token(x)
    back = q.double() * scale.double().repeat_interleave(128, dim=1)
    # Half a unit in the last place of e4m3 (3 mantissa bits), or of its subnormals.
    bound = torch.maximum(x.double().abs() * 2**-4, scale.double().amax() * 2**-10) * 1.001
    assert ((back - x.double()).abs() <= bound).all()


def test_scale_is_amax_over_448(backend, generator):
    x = values(generator, 8, 256, dtype=torch.float32)
    _, scale = deepkern.cast_per_token(x)
    assert torch.equal(scale, x.unflatten(1, (2, 128)).abs().amax(-1) / 448)


def test_ue8m0_rounds_scales_up(backend, generator):
    x = values(generator, 32, 200, dtype=torch.float32)
    _, plain = deepkern.cast_per_token(x)
    _, scale = deepkern.cast_per_token(x, scale_format="ue8m0")
    assert (torch.frexp(scale).mantissa == 0.5).all()
    assert ((scale >= plain) & (scale < 2 * plain)).all()


def test_every_bf16_value(backend, device):
    x = torch.arange(2**16, dtype=torch.int32, device=device).to(torch.int16).view(torch.bfloat16)
    x = x.reshape(-1, 128)
    for scale_format in ("fp32", "ue8m0"):
        got = deepkern.cast_per_token(x, scale_format)
        compare.assert_matches(
            "cast_per_token", got, deepkern.reference.cast_per_token(x, scale_format)
        )


def test_zero_block(backend, device):
    q, scale = deepkern.cast_per_token(torch.zeros(3, 256, device=device))
    assert (q.view(torch.uint8) == 0).all()
    assert (scale == torch.tensor(1e-4) / 448).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_stay_in_their_block(backend, bad, generator):
    x = values(generator, 4, 384)
    good_q, good_scale = deepkern.cast_per_token(x)
    x[1, 130] = bad
    q, scale = deepkern.cast_per_token(x)
    assert q[1, 128:256].float().isnan().all() and scale[1, 1].isnan()
    q[1, 128:256], scale[1, 1] = good_q[1, 128:256], good_scale[1, 1]
    compare.assert_bitwise(q, good_q)
    compare.assert_bitwise(scale, good_scale)


def test_strided_rows_and_leading_dimensions(backend, generator):
    wide = values(generator, 6, 5, 512)
    view = wide[:, 1:4, 100:333]
    got = deepkern.cast_per_token(view)
    compare.assert_matches("cast_per_token", got, deepkern.reference.cast_per_token(view.clone()))


def test_row_bits_independent_of_batch(backend, generator):
    x = values(generator, 37, 256)
    q, scale = deepkern.cast_per_token(x)
    for row in (0, 17, 36):
        q_row, scale_row = deepkern.cast_per_token(x[row : row + 1])
        compare.assert_bitwise(q_row[0], q[row])
        compare.assert_bitwise(scale_row[0], scale[row])


@pytest.mark.parametrize(
    "shape", [(5, 300), (8, 128), (1, 200), (3, 2, 33, 300), (2, 0, 300), (4, 0)], ids=str
)
def test_column_layout_and_padding(backend, generator, shape):
    """Columns of the scale start at multiples of 16 bytes; the padding is zero."""
    x = values(generator, *shape)
    q_plain, plain = deepkern.cast_per_token(x)
    q, scale = deepkern.cast_per_token(x, scale_layout="column")
    compare.assert_bitwise(q, q_plain)
    compare.assert_bitwise(scale, plain)
    *lead, rows, blocks = scale.shape
    pitch = -(-rows // 4) * 4
    expected = torch.empty(*lead, blocks, pitch, device=scale.device).mT.stride()
    assert scale.stride() == expected and plain.is_contiguous()
    if scale.numel():
        assert scale.untyped_storage().nbytes() == 4 * blocks * pitch * math.prod(lead)
        assert (with_padding(scale, "column")[..., rows:, :] == 0).all()


def test_column_layout_of_rank_1(backend, generator):
    x = values(generator, 300)
    for g, w in zip(
        deepkern.cast_per_token(x, "fp32", "column"), deepkern.cast_per_token(x), strict=True
    ):
        compare.assert_bitwise(g, w)
        assert g.stride() == w.stride()


def test_column_layout_of_strided_matrices(backend, generator):
    view = values(generator, 6, 5, 512)[::2, 1:4, 100:333]
    got = deepkern.cast_per_token(view, "ue8m0", "column")
    want = deepkern.reference.cast_per_token(view.clone(), "ue8m0", "column")
    compare.assert_matches("cast_per_token", got, want)


def test_bad_scale_layout(backend, device):
    words = "^cast_per_token: scale_layout: expected 'row' or 'column', got 'columns'"
    with pytest.raises(ValueError, match=words):
        deepkern.cast_per_token(torch.zeros(1, 1, device=device), "fp32", "columns")
