"""cast_per_block: partial blocks, stacks of matrices, NaN and inf inside their block."""

from __future__ import annotations

import pytest
import torch

import deepkern
from deepkern.runtime import arch
from deepkern.testing import compare
from deepkern.testing.random_inputs import values


def check(x, scale_format="fp32"):
    got = deepkern.cast_per_block(x, scale_format)
    want = deepkern.reference.cast_per_block(x, scale_format)
    compare.assert_matches("cast_per_block", got, want)
    return got


def expand_scales(scale, N, K):
    """The scale of each value, computed independently of the reference."""
    return torch.kron(scale, torch.ones(128, 128, device=scale.device))[..., :N, :K]


@pytest.mark.parametrize(("N", "K"), [(1, 1), (127, 129), (128, 128), (129, 127), (200, 300)])
def test_dequantized_value_within_half_an_ulp(backend, generator, N, K):
    x = values(generator, N, K)
    q, scale = deepkern.cast_per_block(x)
    assert scale.shape == (-(-N // 128), -(-K // 128))
    scale = expand_scales(scale, N, K).double()
    # Half a unit in the last place of e4m3 (3 mantissa bits), or of its subnormals.
    bound = torch.maximum(x.double().abs() * 2**-4, scale * 2**-10) * 1.001
    assert ((q.double() * scale - x.double()).abs() <= bound).all()


def test_scale_is_amax_over_448(backend, generator):
    x = values(generator, 256, 384, dtype=torch.float32)
    _, scale = check(x)
    for i in range(2):
        for j in range(3):
            block = x[128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
            assert scale[i, j] == block.abs().max() / 448


def test_ue8m0_rounds_scales_up(backend, generator):
    x = values(generator, 150, 140, dtype=torch.float32)
    _, plain = check(x)
    _, scale = check(x, "ue8m0")
    assert (torch.frexp(scale).mantissa == 0.5).all()
    assert ((scale >= plain) & (scale < 2 * plain)).all()


def test_every_bf16_value(kernel_backend, device):
    x = torch.arange(2**16, dtype=torch.int32, device=device).to(torch.int16).view(torch.bfloat16)
    check(x.reshape(256, 256))
    finite = x[x.isfinite()]  # sorted by magnitude, so blocks have different scales
    check(finite[: finite.numel() // 256 * 256].reshape(-1, 256), "ue8m0")


def test_zero_block(backend, device):
    q, scale = check(torch.zeros(130, 256, device=device))
    assert (q.view(torch.uint8) == 0).all()
    assert (scale == torch.tensor(1e-4) / 448).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_stay_in_their_block(backend, bad, generator):
    x = values(generator, 200, 300)
    good_q, good_scale = deepkern.cast_per_block(x)
    x[130, 200] = bad
    q, scale = deepkern.cast_per_block(x)
    assert q[128:, 128:256].float().isnan().all() and scale[1, 1].isnan()
    q[128:, 128:256], scale[1, 1] = good_q[128:, 128:256], good_scale[1, 1]
    compare.assert_bitwise(q, good_q)
    compare.assert_bitwise(scale, good_scale)


def test_stack_equals_separate_matrices(backend, generator):
    x = values(generator, 3, 140, 150)
    q, scale = check(x)
    for g in range(3):
        q_alone, scale_alone = deepkern.cast_per_block(x[g])
        compare.assert_bitwise(q[g], q_alone)
        compare.assert_bitwise(scale[g], scale_alone)


def test_strided_rows_and_matrices(backend, generator):
    wide = values(generator, 5, 140, 400)
    view = wide[::2, 3:, 100:333]
    got = deepkern.cast_per_block(view)
    compare.assert_matches("cast_per_block", got, deepkern.reference.cast_per_block(view.clone()))


def test_bad_rank_and_scale_format(backend, device):
    with pytest.raises(ValueError, match="^cast_per_block: x: expected rank 2 or 3, got rank 4$"):
        deepkern.cast_per_block(torch.zeros(1, 1, 1, 1, device=device))
    with pytest.raises(ValueError, match="^cast_per_block: scale_format: expected 'fp32' or"):
        deepkern.cast_per_block(torch.zeros(1, 1, device=device), "e8m0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU cannot launch for another target")
def test_target_without_fp8(generator):
    x = values(generator, 140, 200, dtype=torch.float32)
    x[0, 0], x[139, 199] = float("nan"), float("inf")
    with deepkern.backend("triton"), arch.compile_for(arch.ARCHS["sm_80"]):
        check(x)
        check(x, "ue8m0")
