"""m_grouped_fp8_gemm_nt_masked: any number of valid rows; other rows are ignored."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deepkern
from deepkern.testing import compare, ops
from deepkern.testing.random_inputs import values

F32 = torch.float32
OP = "m_grouped_fp8_gemm_nt_masked"
product = deepkern.m_grouped_fp8_gemm_nt_masked


def make(generator, M, N, K, G, **kwargs):
    return ops.inputs(OP, generator, M=M, N=N, K=K, G=G, **kwargs)


def with_counts(args, counts) -> tuple:
    counts = torch.as_tensor(counts, dtype=torch.int32, device=args[0].device)
    return (*args[:4], counts, *args[5:])


def check(args) -> torch.Tensor:
    with compare.poison():
        got = product(*args)
    compare.assert_matches(OP, got, deepkern.reference.m_grouped_fp8_gemm_nt_masked(*args))
    return got


@pytest.mark.parametrize("b_rows", [128, 1])
@pytest.mark.parametrize(
    ("M", "N", "K"), [(1, 1, 1), (3, 8, 100), (127, 100, 129), (129, 200, 128)]
)
def test_odd_shapes(kernel_backend, generator, M, N, K, b_rows):
    check(make(generator, M, N, K, G=3, b_rows=b_rows, out_dtype=F32))


# M, N, K and the scale format; the dimensions are not multiples of a tile.
SHAPES = [
    (0, 8, 128, "ue8m0"),
    (1, 2112, 100, "fp32"),
    (3, 8, 7168, "ue8m0"),
    (127, 100, 1, "fp32"),
    (129, 1, 129, "fp32"),
    (257, 576, 90, "fp32"),
]


@pytest.mark.parametrize(("M", "N", "K", "scale_format"), SHAPES)
def test_odd_shapes_of_slices(kernel_backend, generator, M, N, K, scale_format):
    """The operands are slices of wider matrices."""
    a, a_scale = deepkern.reference.cast_per_token(values(generator, 2, M, K + 16), scale_format)
    b, b_scale = deepkern.reference.cast_per_block(values(generator, 2, N, K + 16), scale_format)
    blocks = -(-K // 128)
    counts = torch.tensor([M, M // 2], dtype=torch.int32, device=a.device)
    a, a_scale, b, b_scale = a[:, :, :K], a_scale[..., :blocks], b[..., :K], b_scale[..., :blocks]
    check((a, a_scale, b, b_scale, counts, F32))


COUNTS = {
    "all rows": [70, 70, 70, 70],
    "no rows": [0, 0, 0, 0],
    "one row": [0, 0, 1, 0],
    "out of range": [-5, 71, 2**31 - 1, -(2**31)],
}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=list(COUNTS))
def test_counts_and_nan_in_invalid_rows(backend, generator, counts):
    args = with_counts(make(generator, 70, 40, 200, G=4, out_dtype=F32), counts)
    clean = check(args)
    a, a_scale, *rest = args
    for g, count in enumerate(counts):
        valid = min(max(count, 0), 70)
        a[g, valid:], a_scale[g, valid:] = float("nan"), float("nan")
        assert not clean[g, valid:].any()
    compare.assert_bitwise(product(a, a_scale, *rest), clean)


@settings(max_examples=10, deadline=None)
@given(
    counts=st.lists(st.integers(-2, 45), max_size=6),
    M=st.integers(0, 40),
    N=st.integers(0, 140),
    K=st.integers(0, 300),
    expected_m=st.sampled_from([None, 0, 1, 40, 10**6]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(counts, M, N, K, expected_m, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    args = make(generator, M, N, K, len(counts), out_dtype=F32)
    with deepkern.backend("triton"):
        check((*with_counts(args, counts)[:6], expected_m))


def test_same_bits_as_the_contiguous_layout(backend, generator):
    a, a_scale, b, b_scale, counts, *_ = make(generator, 66, 140, 300, G=3)
    got = product(a, a_scale, b, b_scale, counts, F32)
    row = torch.arange(66, device=a.device)
    group = torch.arange(3, device=a.device)[:, None].expand(3, 66)
    index = torch.where(row < counts[:, None], group, -1).int().flatten()
    flat = deepkern.m_grouped_fp8_gemm_nt_contiguous(
        a.flatten(0, 1), a_scale.flatten(0, 1), b, b_scale, index, F32
    )
    compare.assert_bitwise(got.flatten(0, 1), flat)


@pytest.mark.parametrize("expected_m", [0, 1, 20, 64, 4096])
def test_expected_m_changes_no_bit(backend, generator, expected_m):
    args = make(generator, 70, 140, 260, G=2, out_dtype=F32)
    compare.assert_bitwise(product(*args[:6], expected_m), product(*args[:6]))


def test_column_major_scales(backend, generator):
    a, a_scale, b, b_scale, counts, *_ = make(generator, 30, 40, 300, G=3)
    column_major = a_scale.transpose(1, 2).contiguous().transpose(1, 2)
    got = product(a, column_major, b, b_scale, counts, F32)
    compare.assert_bitwise(got, product(a, a_scale, b, b_scale, counts, F32))


def test_strided_groups(backend, generator):
    a, a_scale, b, b_scale, counts, *_ = make(generator, 30, 40, 300, G=4)
    views = a[::2, 3:], a_scale[::2, 3:], b[::2], b_scale[::2], counts[::2]
    compact = [x.contiguous() for x in views]
    compare.assert_bitwise(product(*views, F32), product(*compact, F32))


def test_negative_expected_m(backend, generator):
    args = make(generator, 4, 8, 128, G=2)
    with pytest.raises(ValueError, match="expected_m: expected None or at least 0, got -1"):
        product(*args[:6], -1)


def test_debug_check_of_masked_m(backend, generator, monkeypatch):
    monkeypatch.setenv("DEEPKERN_DEBUG", "1")
    with pytest.raises(ValueError, match=r"masked_m: expected values from 0 to 4, got \[5\]"):
        product(*with_counts(make(generator, 4, 8, 128, G=2), [4, 5]))
