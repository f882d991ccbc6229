"""k_grouped_fp8_gemm_nt: groups of columns of any length and alignment, c, NaN."""

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

OP = "k_grouped_fp8_gemm_nt"
product = deepkern.k_grouped_fp8_gemm_nt


def make(generator, M, N, K, G, **kwargs):
    return ops.inputs(OP, generator, M=M, N=N, K=K, G=G, **kwargs)


def with_offsets(args, offsets) -> tuple:
    offsets = torch.as_tensor(offsets, dtype=torch.int32, device=args[0].device)
    return (*args[:4], offsets, *args[5:])


def check(args) -> torch.Tensor:
    with compare.poison():
        got = product(*args)
    compare.assert_matches(OP, got, deepkern.reference.k_grouped_fp8_gemm_nt(*args))
    return got


@pytest.mark.parametrize("c", [False, True])
@pytest.mark.parametrize(
    ("M", "N", "K"),
    [(1, 1, 1), (3, 8, 100), (127, 100, 129), pytest.param(129, 200, 500, marks=pytest.mark.slow)],
)
def test_odd_shapes(kernel_backend, generator, M, N, K, c):
    check(make(generator, M, N, K, G=3, c=c))


# M, N, total K and the scale format; the dimensions are not multiples of a tile.
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
    """The operands are slices of wider matrices; group 1 starts at a multiple of 16."""
    offsets = torch.tensor([0, K // 32 * 16, K], dtype=torch.int32)
    operands = []
    for rows in (M, N):
        x = values(generator, rows, K + 16)
        parts = [
            x[:, :K][:, i:j] for i, j in zip(offsets.tolist(), offsets.tolist()[1:], strict=False)
        ]
        scales = [deepkern.reference.cast_per_token(part, scale_format)[1] for part in parts]
        operands += [deepkern.reference.cast_per_token(x)[0][:, :K], torch.cat(scales, 1)]
    check((*operands, offsets.to(operands[0].device), None))


OFFSETS = {
    "one group": [0, 400, 400, 400, 400],
    "multiples of 128": [0, 128, 256, 384, 400],
    "multiples of 16": [0, 16, 160, 160, 400],
    "unaligned": [0, 1, 130, 131, 399],
    "columns outside all groups": [5, 20, 150, 151, 300],
    "descending": [400, 300, 200, 100, 0],
    "out of range": [-(2**31), 2**31 - 1, 7, -5, 390],
}


@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=list(OFFSETS))
def test_offsets(kernel_backend, generator, offsets):
    check(with_offsets(make(generator, 40, 70, 400, G=4), offsets))


@settings(max_examples=10, deadline=None)
@given(
    offsets=st.lists(st.integers(-10, 420), min_size=1, max_size=6),
    M=st.integers(0, 80),
    N=st.integers(0, 80),
    K=st.integers(0, 400),
    extra_columns=st.integers(-3, 2),
    seed=st.integers(0, 2**31),
)
def test_any_offsets(offsets, M, N, K, extra_columns, seed):
    """The scales may have too few columns; columns without scales count as zeros."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    a, a_scale, b, b_scale, *rest = make(generator, M, N, K, len(offsets) - 1)
    columns = slice(0, max(a_scale.shape[1] + extra_columns, 0))
    args = (a, a_scale[:, columns], b, b_scale[:, columns], *rest)
    with deepkern.backend("triton"):
        check(with_offsets(args, offsets))


@pytest.mark.proof
@pytest.mark.parametrize("target", ARCHS.values(), ids=list(ARCHS))
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU cannot launch for another target")
def test_all_tiles_give_the_same_bits(target, generator):
    args = make(generator, 130, 140, 330, G=3, c=True)
    want = deepkern.reference.k_grouped_fp8_gemm_nt(*args)
    got = []
    with deepkern.backend("triton"), arch.compile_for(target):
        for tile in tiles.supported_tiles(target, 1):
            with tiles.override_tile_choice(lambda *_, t=tile: t):
                got.append(product(*args))
            compare.assert_bitwise(got[-1], got[0], str(tile))
    compare.assert_close(got[0], want, op=OP)


def test_group_bits_independent_of_other_groups(backend, generator):
    offsets = [0, 144, 144, 160, 300]  # multiples of 16: others sum a block in other pieces
    args = with_offsets(make(generator, 40, 70, 300, G=4), offsets)
    a, a_scale, b, b_scale, *_ = args
    got, block = product(*args), 0
    for g in range(4):
        columns = slice(offsets[g], offsets[g + 1])
        length = columns.stop - columns.start
        scales = slice(block, block + -(-length // 128))
        block = scales.stop
        ends = torch.tensor([0, length], dtype=torch.int32, device=a.device)
        parts = a[:, columns], a_scale[:, scales], b[:, columns], b_scale[:, scales]
        compare.assert_bitwise(product(*parts, ends)[0], got[g], f"group {g}")
    for M in (1, 17, 39):
        compare.assert_bitwise(product(a[:M], a_scale[:M], *args[2:]), got[:, :M], f"{M} rows")


def test_nan_stays_in_its_group(backend, generator):
    offsets = [0, 70, 200, 300]
    args = with_offsets(make(generator, 20, 30, 300, G=3), offsets)
    args[0][:, 75], args[2][:, 199] = float("nan"), float("nan")
    got = product(*args)
    assert got[1].isnan().all() and got[0].isfinite().all() and got[2].isfinite().all()


def test_operands_from_cast_per_channel(backend, generator):
    """Gradients of grouped weights: d[g] is dyᵀ·x over the rows of the group."""
    x, dy = values(generator, 300, 60), values(generator, 300, 40)
    offsets = torch.tensor([0, 100, 100, 129, 300], dtype=torch.int32, device=x.device)
    a = deepkern.cast_per_channel(dy, group_offsets=offsets, transpose=True)
    b = deepkern.cast_per_channel(x, group_offsets=offsets, transpose=True)
    got = product(*a, *b, offsets)
    for g, (first, last) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:], strict=False)):
        want = dy[first:last].double().t() @ x[first:last].double()
        assert compare.diff(got[g], want) < 2e-3


def test_strided_operands_and_scales(backend, generator):
    a, a_scale, b, b_scale, offsets, _ = make(generator, 40, 30, 400, G=3)
    views = a[::2], a_scale[::2].t().contiguous().t(), b[3:], b_scale[3:].t().contiguous().t()
    compact = [x.contiguous() for x in views]
    compare.assert_bitwise(product(*views, offsets), product(*compact, offsets))


def test_strided_c(backend, generator):
    *args, c = make(generator, 20, 30, 200, G=2, c=True)
    wide = torch.cat([c, c], 2)[:, :, :30]
    compare.assert_bitwise(product(*args, wide), product(*args, c))


def test_bad_offsets_and_c(backend, generator):
    *args, c = make(generator, 20, 30, 200, G=2, c=True)
    with pytest.raises(ValueError, match="group_offsets: expected at least 1 offset, got none"):
        product(*args[:4], args[4][:0])
    with pytest.raises(ValueError, match=r"c: expected 2 matrices, got shape \(1, 20, 30\)"):
        product(*args, c[:1])


def test_debug_check_of_offsets(backend, generator, monkeypatch):
    monkeypatch.setenv("DEEPKERN_DEBUG", "1")
    args = with_offsets(make(generator, 4, 8, 100, G=2), [0, 101, 50])
    with pytest.raises(ValueError, match=r"group_offsets: expected ascending values in \[0, 100\]"):
        product(*args)
