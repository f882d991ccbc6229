"""cast_per_block: blocks of 128x128, edges, NaN and inf kept in their block, older hardware."""

from __future__ import annotations

import pytest
import torch

import deepkern
from deepkern.runtime import arch
from deepkern.testing import compare
from deepkern.testing.inputs import quant


def spread(scale: torch.Tensor, N: int, K: int) -> torch.Tensor:
    """A value for every element from one for every block."""
    return scale.repeat_interleave(128, -2)[..., :N, :].repeat_interleave(128, -1)[..., :K]


def test_dequantised_value_is_near(backend, generator):
    x = quant.values(generator, 200, 300)
    q, scale = deepkern.cast_per_block(x)
    back = q.double() * spread(scale, 200, 300).double()
    # Half a unit in the last place of e4m3 (3 mantissa bits), or of its subnormals.
    bound = torch.maximum(x.double().abs() * 2**-4, spread(scale, 200, 300) * 2**-10) * 1.001
    assert ((back - x.double()).abs() <= bound).all()


def test_scale_is_amax_over_448(backend, generator):
    x = quant.values(generator, 256, 384, dtype=torch.float32)
    _, scale = deepkern.cast_per_block(x)
    assert torch.equal(scale, x.view(2, 128, 3, 128).abs().amax((1, 3)) / 448)


def test_ue8m0_scales_are_powers_of_two_and_large_enough(backend, generator):
    x = quant.values(generator, 300, 200, dtype=torch.float32)
    _, plain = deepkern.cast_per_block(x)
    _, scale = deepkern.cast_per_block(x, scale_format="ue8m0")
    assert (torch.frexp(scale).mantissa == 0.5).all()
    assert ((scale >= plain) & (scale < 2 * plain)).all()


@pytest.mark.parametrize("shape", [(1, 1), (127, 129), (128, 128), (129, 127), (3, 130, 5)])
def test_edges(backend, shape, generator):
    x = quant.values(generator, *shape, dtype=torch.float16)
    want = deepkern.reference.cast_per_block(x)
    compare.assert_matches("cast_per_block", deepkern.cast_per_block(x), want)


def test_groups_are_cast_one_by_one(backend, generator):
    x = quant.values(generator, 3, 140, 150)
    q, scale = deepkern.cast_per_block(x)
    for g in range(3):
        compare.assert_matches("cast_per_block", (q[g], scale[g]), deepkern.cast_per_block(x[g]))


def test_zero_blocks(backend, device):
    q, scale = deepkern.cast_per_block(torch.zeros(130, 130, device=device))
    assert (q.view(torch.uint8) == 0).all()
    assert (scale == torch.tensor(1e-4) / 448).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_spoil_their_block_only(backend, bad, generator):
    x = quant.values(generator, 256, 256)
    good_q, good_scale = deepkern.cast_per_block(x)
    x[3, 200] = bad
    q, scale = deepkern.cast_per_block(x)
    assert q[:128, 128:].float().isnan().all() and scale[0, 1].isnan()
    q[:128, 128:], scale[0, 1] = good_q[:128, 128:], good_scale[0, 1]
    compare.assert_bitwise(q, good_q)
    compare.assert_bitwise(scale, good_scale)


def test_strided_rows(backend, generator):
    view = quant.values(generator, 2, 300, 400)[:, ::2, 100:333]
    want = deepkern.reference.cast_per_block(view.clone())
    compare.assert_matches("cast_per_block", deepkern.cast_per_block(view), want)


def test_rank_4_is_refused(generator):
    with pytest.raises(ValueError, match="cast_per_block: x: expected rank 2 or 3, got rank 4"):
        deepkern.cast_per_block(torch.zeros(1, 1, 1, 1))


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_same_bits_where_the_hardware_has_no_e4m3(target, generator):
    x = quant.values(generator, 130, 140, dtype=torch.float32)
    x[0, 0], x[129, 139] = float("nan"), 0.0
    with arch.compile_for(arch.ARCHS[target]), deepkern.backend("triton"):
        got = deepkern.cast_per_block(x)
    compare.assert_matches("cast_per_block", got, deepkern.reference.cast_per_block(x))
