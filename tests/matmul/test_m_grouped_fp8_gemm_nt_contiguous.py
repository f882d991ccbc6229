"""m_grouped_fp8_gemm_nt_contiguous: group sizes, padding, any index, batch invariance."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deepkern
from deepkern.runtime import arch, tiles
from deepkern.runtime.arch import ARCHS
from deepkern.testing import compare, ops
from deepkern.testing.random_inputs import values

F32, BF16 = torch.float32, torch.bfloat16
OP = "m_grouped_fp8_gemm_nt_contiguous"
product = deepkern.m_grouped_fp8_gemm_nt_contiguous


def make(generator, M, N, K, G, **kwargs):
    return ops.inputs(OP, generator, M=M, N=N, K=K, G=G, **kwargs)


def with_index(args, index) -> tuple:
    """The arguments with group_index replaced by `index`."""
    index = torch.as_tensor(index, dtype=torch.int32, device=args[0].device)
    return (*args[:4], index, *args[5:])


def check(args) -> torch.Tensor:
    with compare.poison():
        got = product(*args)
    compare.assert_matches(OP, got, deepkern.reference.m_grouped_fp8_gemm_nt_contiguous(*args))
    return got


@pytest.mark.parametrize("b_rows", [128, 1])
@pytest.mark.parametrize(
    ("M", "N", "K"), [(1, 1, 1), (3, 8, 100), (127, 100, 129), (129, 200, 128), (257, 130, 260)]
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
    a, a_scale = deepkern.reference.cast_per_token(values(generator, M, K + 16), scale_format)
    b, b_scale = deepkern.reference.cast_per_block(values(generator, 2, N, K + 16), scale_format)
    blocks = -(-K // 128)
    index = torch.arange(M, dtype=torch.int32, device=a.device) * 3 // max(M, 1) - 1
    check((a[:, :K], a_scale[:, :blocks], b[:, :, :K], b_scale[:, :, :blocks], index, F32))


GROUPS = {
    "no groups": [-1] * 150,
    "one group": [2] * 150,
    "padding between groups": [0, 0, -1] * 20 + [1] * 20 + [-1] * 30 + [3] * 40,
    "last group empty": [0] * 75 + [1] * 75,
    "first groups empty": [3] * 150,
    "one row per group": list(range(4)) + [-1] * 146,
    "unsorted": [3, 0, 2, 1, -1] * 30,
    "out of range": [4, -2, 2**31 - 1, -(2**31), 1] * 30,
    "descending": [3] * 40 + [2] * 40 + [1] * 40 + [0] * 30,
}


@pytest.mark.parametrize("groups", GROUPS.values(), ids=list(GROUPS))
def test_group_index(backend, generator, groups):
    args = with_index(make(generator, 150, 70, 140, G=4, out_dtype=F32), groups)
    got = check(args)
    skipped = torch.tensor([not 0 <= g < 4 for g in groups])
    assert not got[skipped.to(got.device)].any()


@settings(max_examples=10, deadline=None)
@given(
    groups=st.lists(st.integers(-2, 6), max_size=120),
    G=st.integers(0, 5),
    N=st.integers(0, 140),
    K=st.integers(0, 300),
    seed=st.integers(0, 2**31),
)
def test_any_groups(groups, G, N, K, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    with deepkern.backend("triton"):
        check(with_index(make(generator, len(groups), N, K, G, out_dtype=F32), groups))


def test_row_bits_independent_of_batch(backend, generator):
    """For a single row, fp8_gemm_nt on its group, and the first rows of the batch."""
    a, a_scale, b, b_scale, index, _ = make(generator, 257, 140, 300, G=3, out_dtype=F32)
    got = product(a, a_scale, b, b_scale, index, F32)
    for row in (0, 1, 100, 127, 128, 200, 255, 256):
        only = slice(row, row + 1)
        alone = product(a[only], a_scale[only], b, b_scale, index[only], F32)
        compare.assert_bitwise(alone, got[only], f"row {row}")
        if index[row] >= 0:
            g = int(index[row])
            single = deepkern.fp8_gemm_nt(a[only], a_scale[only], b[g], b_scale[g], F32)
            compare.assert_bitwise(single, got[only], f"row {row} without groups")
    for M in (3, 64, 65, 129):
        part = product(a[:M], a_scale[:M], b, b_scale, index[:M], F32)
        compare.assert_bitwise(part, got[:M], f"{M} rows")


@pytest.mark.gpu
@pytest.mark.parametrize(("N", "K"), [(4096, 7168), (7168, 2048), (100, 1000)])
def test_row_bits_independent_of_batch_on_gpu(generator, N, K):
    """All rows in one group of four: every M from 1 to 257, and 100 equal launches."""
    a, a_scale, b, b_scale, *_ = make(generator, 257, N, K, G=4, out_dtype=F32)
    index = torch.full((257,), 2, dtype=torch.int32, device=a.device)
    with deepkern.backend("triton"):
        whole = product(a, a_scale, b, b_scale, index, F32)
        dense = deepkern.fp8_gemm_nt(a, a_scale, b[2], b_scale[2], F32)
        if tiles.choose_num_splits(arch.of(a.device), N, K) == 1:
            compare.assert_bitwise(dense, whole, "without groups")
        for M in range(1, 258):
            part = product(a[:M], a_scale[:M], b, b_scale, index[:M], F32)
            compare.assert_bitwise(part, whole[:M], f"{M} rows")
        for _ in range(100):
            compare.assert_bitwise(product(a, a_scale, b, b_scale, index, F32), whole, "again")


@pytest.mark.proof
@pytest.mark.parametrize("b_rows", [128, 1])
@pytest.mark.parametrize("target", ARCHS.values(), ids=list(ARCHS))
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU cannot launch for another target")
def test_all_tiles_give_the_same_bits(target, b_rows, generator):
    """Batch invariance requires it, because the choice of tile depends on M."""
    args = make(generator, 150, 140, 272, G=3, b_rows=b_rows, out_dtype=F32)
    with deepkern.backend("triton"), arch.compile_for(target):
        got = []
        for tile in tiles.supported_tiles(target, b_rows):
            with tiles.override_tile_choice(lambda *_, t=tile: t):
                got.append(product(*args))
            compare.assert_bitwise(got[-1], got[0], str(tile))
    want = deepkern.reference.m_grouped_fp8_gemm_nt_contiguous(*args)
    compare.assert_close(got[0], want, op=OP)


def test_strided_operands_and_scales(backend, generator):
    a, a_scale, b, b_scale, index, _ = make(generator, 60, 140, 300, G=4, b_rows=1)
    strided = (
        a[::2, 16:272], a_scale[::2, :2].t().contiguous().t(),
        b[::2, 3:, 16:272], b_scale[::2, 3:, :2].transpose(1, 2).contiguous().transpose(1, 2),
        index[::2], F32,
    )  # fmt: skip
    got = check(strided)
    compact = tuple(x.contiguous() if isinstance(x, torch.Tensor) else x for x in strided)
    compare.assert_bitwise(product(*compact), got)


def test_transposed_weights(backend, generator):
    """b in the layout nn, [G, K, N], as a transposed view."""
    a, a_scale, b, b_scale, index, _ = make(generator, 60, 70, 160, G=3)
    transposed = b.view(torch.uint8).transpose(1, 2).contiguous().view(b.dtype).transpose(1, 2)
    got = product(a, a_scale, transposed, b_scale, index, F32)
    compare.assert_bitwise(got, product(a, a_scale, b, b_scale, index, F32))


def test_nan_stays_in_its_row(backend, generator):
    a, a_scale, b, b_scale, index, _ = make(generator, 90, 40, 200, G=3)
    index = torch.arange(90, dtype=torch.int32, device=a.device) // 30
    a[31, 7], a_scale[60, 1] = float("nan"), float("nan")
    got = product(a, a_scale, b, b_scale, index)
    is_nan = torch.zeros(90, dtype=torch.bool, device=a.device)
    is_nan[31] = is_nan[60] = True
    assert torch.equal(got.isnan().all(1), is_nan) and torch.equal(got.isnan().any(1), is_nan)


def test_more_groups_than_rows(kernel_backend, generator):
    check(make(generator, 5, 40, 128, G=300, out_dtype=F32))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([0, 3, 1], "values from -1 to 2, got [3]"),
        ([1, 0, 0], "ascending values, or -1, got [1, 0, 0]"),
    ],
    ids=["out-of-range", "descending"],
)
def test_debug_check_of_group_index(backend, generator, monkeypatch, index, message):
    monkeypatch.setenv("DEEPKERN_DEBUG", "1")
    args = with_index(make(generator, 3, 8, 128, G=3), index)
    with pytest.raises(ValueError) as caught:
        product(*args)
    assert str(caught.value) == f"{OP}: group_index: expected {message}"


def test_bad_shape_of_b_scale(backend, generator):
    a, a_scale, b, b_scale, index, _ = make(generator, 4, 300, 200, G=2)
    with pytest.raises(ValueError, match=r"b_scale: expected .*, so 3 or 300 rows, got shape"):
        product(a, a_scale, b, b_scale[:, :2], index)
