"""compat.deep_gemm_utils: DeepGEMM's casts, its layouts of scales and its measure of error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deepkern.compat.deep_gemm as deep_gemm
from deepkern.testing import compare

F32, BF16, FP8 = torch.float32, torch.bfloat16, torch.float8_e4m3fn


def normal(generator, *shape, dtype=BF16):
    return torch.randn(shape, generator=generator, device=generator.device).to(dtype)


@pytest.mark.parametrize("use_ue8m0", [False, True])
def test_casts(backend, generator, use_ue8m0):
    x = normal(generator, 256, 200)
    cast = {
        (1, 128): deep_gemm.per_token_cast_to_fp8,
        (128, 1): deep_gemm.per_channel_cast_to_fp8,
        (128, 128): deep_gemm.per_block_cast_to_fp8,
    }
    for (rows, columns), function in cast.items():
        q, scale = function(x, use_ue8m0)
        padded = torch.nn.functional.pad(x.float(), (0, -200 % columns))
        blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        want = blocks.abs().amax((1, 3)).clamp(min=1e-4) / 448
        if use_ue8m0:
            want = torch.exp2(want.log2().ceil())
        compare.assert_bitwise(scale, want)
        values = (blocks * (1 / want)[:, None, :, None]).flatten(2).flatten(0, 1)
        compare.assert_bitwise(q, values[:, :200].to(FP8))
    mn_major = cast[1, 128](x.T, use_ue8m0)
    for got, want in zip(mn_major, cast[128, 1](x, use_ue8m0), strict=True):
        compare.assert_bitwise(got, want.T)  # a transposed view, as DeepGEMM accepts


def test_cast_over_other_dimensions(generator):
    x = normal(generator, 3, 5, 7)
    for dims, reduced in (((0,), (1, 2)), ((0, -1), (1,)), ((1,), (0, 2)), ((0, 1, 2), ())):
        q, scale = deep_gemm.per_custom_dims_cast_to_fp8(x, dims, False)
        amax = x.float().abs()
        want = (amax.amax(reduced, keepdim=True) if reduced else amax) / 448
        compare.assert_bitwise(scale, want.squeeze())
        compare.assert_bitwise(q, (x * (1 / want)).to(FP8))
    _, scale = deep_gemm.per_custom_dims_cast_to_fp8(x, (0,), True)
    assert (torch.frexp(scale).mantissa == 0.5).all()


def test_packed_cast(backend, generator):
    x = normal(generator, 6, 700)
    q, packed = deep_gemm.per_token_cast_to_fp8(x, True, use_packed_ue8m0=True)
    want_q, scale = deep_gemm.per_token_cast_to_fp8(x, True)
    compare.assert_bitwise(q, want_q)
    assert packed.shape == (6, 2) and packed.dtype == torch.int32 and packed.is_contiguous()
    for j in range(6):
        exponent = packed[:, j // 4] >> 8 * (j % 4) & 0xFF
        compare.assert_bitwise(torch.exp2(exponent.float() - 127), scale[:, j])


@settings(max_examples=40, deadline=None)
@given(
    mn=st.integers(0, 40),
    k=st.integers(0, 1200),
    groups=st.one_of(st.none(), st.integers(0, 3)),
    seed=st.integers(0, 2**31),
)
def test_layouts_of_scales(mn, k, groups, seed):
    generator = torch.Generator().manual_seed(seed)
    lead, blocks = () if groups is None else (groups,), -(-k // 128)
    scale = torch.exp2(torch.randint(-126, 128, (*lead, mn, blocks), generator=generator).float())
    mn_major = deep_gemm.get_mn_major_tma_aligned_tensor(scale)
    pitch = deep_gemm.get_tma_aligned_size(mn, 4)
    assert pitch % 4 == 0 and 0 <= pitch - mn < 4
    compare.assert_bitwise(mn_major.contiguous(), scale.contiguous())
    if mn_major.numel():
        strides = (pitch * blocks, 1, pitch)[-scale.dim() :]
        assert mn_major.stride() == strides
        padded = mn_major.as_strided((*lead, pitch, blocks), strides)
        assert not padded[..., mn:, :].any()
        assert deep_gemm.get_mn_major_tma_aligned_tensor(mn_major) is mn_major
    packed = deep_gemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(mn_major)
    assert packed.dtype == torch.int32 and packed.shape == (*lead, mn, -(-blocks // 4))
    for layout in (scale, mn_major, packed):
        got = deep_gemm.transform_sf_into_required_layout(
            layout, mn, k, (1, 128, 128), groups, is_sfa=True
        )
        compare.assert_bitwise(got.contiguous(), scale.contiguous())
        assert not got.numel() or got.stride() == mn_major.stride()


def test_scales_per_block_are_remn_major():
    scale = torch.rand(2, 3, 5)
    for recipe, is_sfa in (((1, 128, 128), False), ((128, 128), None), ((1, 128, 128), None)):
        got = deep_gemm.transform_sf_into_required_layout(scale, 300, 640, recipe, 2, is_sfa)
        assert got is scale


def test_exponents_unpack_exactly(backend):
    """All 256 exponents: 0 is 2^-127, a subnormal, and 255 is NaN."""
    exponent = torch.arange(256, dtype=torch.int32)
    got = deep_gemm.transform_sf_into_required_layout(exponent[:, None], 256, 1, (1, 128))[:, 0]
    assert got[255].isnan()
    compare.assert_bitwise(got[:255].double(), torch.exp2(exponent[:255].double() - 127))


def test_packing_rounds_down_to_a_power_of_two():
    scale = torch.tensor([[1.0, 1.5, 1.99, 0.3, 7.0]])
    packed = deep_gemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(scale)
    got = deep_gemm.transform_sf_into_required_layout(packed, 1, 640, (1, 128))
    assert got.tolist() == [[1.0, 1.0, 1.0, 0.25, 4.0]]


def test_arithmetic():
    assert [deep_gemm.ceil_div(x, 4) for x in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert [deep_gemm.align(x, 4) for x in (0, 1, 4, 5)] == [0, 4, 4, 8]
    assert [deep_gemm.get_tma_aligned_size(5, size) for size in (1, 2, 4)] == [16, 8, 8]


def test_calc_diff(generator):
    x, y = normal(generator, 30), normal(generator, 30)
    cosine = 2 * (x.double() * y.double()).sum() / (x.double() ** 2 + y.double() ** 2).sum()
    assert deep_gemm.calc_diff(x, y).item() == pytest.approx(1 - cosine.item(), abs=1e-14)
    assert deep_gemm.calc_diff(x, x) == 0 and deep_gemm.calc_diff(x * 0, x * 0) == 0
    assert deep_gemm.calc_diff(x * torch.nan, x).isnan()
    assert deep_gemm.testing.calc_diff is deep_gemm.calc_diff


def test_errors_of_casts_and_layouts():
    with pytest.raises(ValueError, match="^per_token_cast_to_fp8: gran_k: expected 128, got 32"):
        deep_gemm.per_token_cast_to_fp8(torch.ones(2, 64), False, 32)
    with pytest.raises(ValueError, match="use_ue8m0: expected True, got False"):
        deep_gemm.per_token_cast_to_fp8(torch.ones(2, 64), False, use_packed_ue8m0=True)
    transform = deep_gemm.transform_sf_into_required_layout
    with pytest.raises(ValueError, match=r"sf: expected shape \(5, 2\), got \(4, 2\)"):
        transform(torch.ones(4, 2), 5, 200, (1, 128))
    with pytest.raises(ValueError, match=r"sf: expected rank 3 .*, got rank 2 \(5, 2\)"):
        transform(torch.ones(5, 2), 5, 200, (1, 128), 3)
    with pytest.raises(ValueError, match=r"sf: expected shape \(3, 5, 2\), got \(2, 5, 2\)"):
        transform(torch.ones(2, 5, 2), 5, 200, (1, 128), 3)
    with pytest.raises(TypeError, match="sf: expected dtype float32 or int32, got torch.bfloat16"):
        transform(torch.ones(5, 2).bfloat16(), 5, 200, (1, 128))
    with pytest.raises(ValueError, match="sf: expected rank 2 or 3, got rank 1"):
        deep_gemm.get_mn_major_tma_aligned_tensor(torch.ones(5))
    with pytest.raises(ValueError, match="recipe: expected .* got \\(1, 32\\)"):
        transform(torch.ones(5, 2), 5, 200, (1, 32))
