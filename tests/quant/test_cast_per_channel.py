"""cast_per_channel: equals cast_per_token of the transpose per group, for any offsets."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deepkern
from deepkern.quant.fp8 import with_padding
from deepkern.runtime import arch
from deepkern.testing import compare
from deepkern.testing.random_inputs import values

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
    ("M", "K", "scale_format"),
    [
        (0, 5, "ue8m0"),
        (5, 0, "ue8m0"),
        (1, 1, "fp32"),
        (3, 129, "fp32"),
        (127, 3, "fp32"),
        (129, 128, "ue8m0"),
        (257, 70, "ue8m0"),
        (300, 130, "fp32"),
    ],
)
def test_shapes(kernel_backend, generator, M, K, scale_format, transpose, scale_layout):
    check(values(generator, M, K), scale_format, None, transpose, scale_layout)


OFFSETS = {
    "multiples of 128": [0, 128, 256, 300],
    "unaligned": [0, 1, 130, 300],
    "empty groups": [0, 0, 300, 300],
    "rows outside all groups": [5, 40, 200, 290],
    "out of range": [-(2**31), 400, 7, 2**31 - 1],
    "descending": [300, 200, 100, 0],
    "no groups": [0],
}


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=list(OFFSETS))
def test_offsets(kernel_backend, generator, offsets, transpose):
    x = values(generator, 300, 70)
    check(x, "fp32", offsets_of(x, offsets), transpose)


def test_equals_cast_per_token_of_transpose(backend, generator):
    x = values(generator, 300, 70)
    got = deepkern.cast_per_channel(x, transpose=True)
    for g, w in zip(got, deepkern.cast_per_token(x.t().contiguous()), strict=True):
        compare.assert_bitwise(g, w)


def test_groups_equal_separate_casts(backend, generator):
    x, offsets, block = values(generator, 300, 70), [0, 100, 100, 229, 300], 0
    q, scale = deepkern.cast_per_channel(x, group_offsets=offsets_of(x, offsets))
    for first, last in itertools.pairwise(offsets):
        q_alone, scale_alone = deepkern.cast_per_channel(x[first:last])
        compare.assert_bitwise(q[first:last], q_alone)
        compare.assert_bitwise(scale[block : block + len(scale_alone)], scale_alone)
        block += len(scale_alone)
    assert not scale[block:].any()


def test_nan_and_inf_stay_in_their_block(backend, generator):
    x = values(generator, 300, 70)
    good = deepkern.cast_per_channel(x)[1]
    x[130, 3], x[0, 7] = float("nan"), float("inf")
    scale = check(x)[1]
    is_nan = torch.zeros_like(scale, dtype=torch.bool)
    is_nan[1, 3] = is_nan[0, 7] = True
    assert torch.equal(scale.isnan(), is_nan)
    compare.assert_bitwise(scale[~is_nan], good[~is_nan])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dtypes_and_strided_rows(kernel_backend, generator, dtype):
    check(values(generator, 300, 140, dtype=dtype)[::2, 3:100], transpose=True)


@settings(max_examples=15, deadline=None)
@given(
    M=st.sampled_from([0, 1, 128, 129, 256]) | st.integers(0, 300),
    K=st.sampled_from([0, 1, 64, 65]) | st.integers(0, 100),
    offsets=st.none()
    | st.lists(st.integers(-40, 340) | st.sampled_from([-(2**31), 2**31 - 1]), min_size=1)
    | st.lists(st.integers(0, 300), min_size=1, max_size=9).map(sorted),
    transpose=st.booleans(),
    scale_format=st.sampled_from(["fp32", "ue8m0"]),
    scale_layout=st.sampled_from(["row", "column"]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_offsets(M, K, offsets, transpose, scale_format, scale_layout, dtype, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = values(torch.Generator(device).manual_seed(seed), M, K, dtype=dtype)
    offsets = None if offsets is None else offsets_of(x, offsets)
    for backend in ("torch", "triton"):
        with deepkern.backend(backend):
            check(x, scale_format, offsets, transpose, scale_layout)


@pytest.mark.parametrize("M", [300, 304], ids=["unaligned", "aligned"])  # rows of q^T
@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
def test_transposed_groups_equal_cast_per_token(backend, generator, M, scale_format):
    offsets, block = [5, 32, 32, 176, 290], 0
    x = values(generator, M, 70)
    q, scale = deepkern.cast_per_channel(x, scale_format, offsets_of(x, offsets), True)
    for first, last in itertools.pairwise(offsets):
        q_alone, scale_alone = deepkern.cast_per_token(x[first:last].T.contiguous(), scale_format)
        compare.assert_bitwise(q[:, first:last], q_alone)
        blocks = scale_alone.shape[1]
        compare.assert_bitwise(scale[:, block : block + blocks], scale_alone)
        block += blocks
    q_bits = q.view(torch.uint8)
    assert block == 4 and scale.shape[1] == 3 + 4 and not scale[:, block:].any()
    assert not q_bits[:, :5].any() and not q_bits[:, 290:].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("transpose", [False, True])
def test_nan_and_inf_stay_in_their_group(backend, generator, bad, transpose):
    """Rows 100 and 101 are in one block of 128 rows, but in different groups."""
    x = values(generator, 200, 40)
    args = "fp32", offsets_of(x, [0, 101, 200]), transpose
    good_q, good_scale = deepkern.cast_per_channel(x, *args)
    x[101, 3] = bad
    q, scale = deepkern.cast_per_channel(x, *args)
    if transpose:
        q, scale, good_q, good_scale = q.T, scale.T, good_q.T, good_scale.T
    assert q[101:, 3].float().isnan().all() and scale[1, 3].isnan()
    keep = torch.ones_like(q, dtype=torch.bool)
    keep[101:, 3] = False
    assert torch.equal(q.float()[keep], good_q.float()[keep])
    keep = torch.ones_like(scale, dtype=torch.bool)
    keep[1, 3] = False
    assert torch.equal(scale[keep], good_scale[keep])


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_column_layout_and_padding(backend, generator, transpose, grouped):
    x = values(generator, 300, 70)
    offsets = offsets_of(x, [0, 10, 20, 300]) if grouped else None
    _, plain = deepkern.cast_per_channel(x, "fp32", offsets, transpose)
    _, scale = deepkern.cast_per_channel(x, "fp32", offsets, transpose, "column")
    rows = scale.shape[0]
    assert scale.stride() == (1, -(-rows // 4) * 4) and plain.is_contiguous()
    compare.assert_bitwise(scale, plain)
    whole = with_padding(scale, "column")
    assert whole.shape[0] > rows or rows % 4 == 0
    assert (whole[rows:] == 0).all()


def test_groups_are_independent(backend, generator):
    x = values(generator, 300, 70)
    offsets = offsets_of(x, [0, 33, 180, 300])
    before = deepkern.cast_per_channel(x, group_offsets=offsets)
    x[:33], x[180:] = 7.0, -3.0
    after = deepkern.cast_per_channel(x, group_offsets=offsets)
    compare.assert_bitwise(after[0][33:180], before[0][33:180])
    compare.assert_bitwise(after[1][1:3], before[1][1:3])


@pytest.mark.slow
def test_many_groups(backend, generator):
    """More groups than rows: most groups are empty and the others have one row."""
    x = values(generator, 40, 5)
    offsets = [min(g // 7, 40) for g in range(300)]
    _, scale = check(x, "fp32", offsets_of(x, offsets))
    assert scale.shape == (1 + 299, 5)
    compare.assert_bitwise(scale[:40], x.float().abs().clamp(min=1e-4) / 448)


def test_bad_arguments(backend, device):
    x = torch.zeros(4, 4, device=device)
    for arguments, words in (
        ({"scale_format": "e8m0"}, "scale_format: expected 'fp32' or 'ue8m0', got 'e8m0'"),
        ({"scale_layout": "col"}, "scale_layout: expected 'row' or 'column', got 'col'"),
        ({"group_offsets": offsets_of(x, [])}, "group_offsets: expected G [+] 1, so at least 1"),
    ):
        with pytest.raises(ValueError, match=f"^cast_per_channel: {words}"):
            deepkern.cast_per_channel(x, **arguments)


@pytest.mark.parametrize("offsets", [[0, 3, 2], [-1, 4], [0, 5]])
def test_debug_check_of_offsets(backend, device, monkeypatch, offsets):
    monkeypatch.setenv("DEEPKERN_DEBUG", "1")
    x = torch.zeros(4, 4, device=device)
    deepkern.cast_per_channel(x, group_offsets=offsets_of(x, [1, 1, 4]))
    with pytest.raises(ValueError, match=r"group_offsets: expected ascending values in \[0, 4\]"):
        deepkern.cast_per_channel(x, group_offsets=offsets_of(x, offsets))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU cannot launch for another target")
@pytest.mark.parametrize("transpose", [False, True])
def test_target_without_fp8(generator, transpose):
    x = values(generator, 208, 70, dtype=torch.float32)
    x[0, 0], x[199, 69] = float("nan"), float("inf")
    with deepkern.backend("triton"), arch.compile_for(arch.ARCHS["sm_80"]):
        check(x, "ue8m0", None, transpose)
        check(x, "fp32", offsets_of(x, [16, 100, 190]), transpose)
