"""cast_back: block sizes, strides, every code, and round trips through the casts."""

from __future__ import annotations

import pytest
import torch

import deepkern
from deepkern.runtime import arch
from deepkern.testing import compare, ops
from deepkern.testing.random_inputs import values

REAL = [torch.bfloat16, torch.float16, torch.float32]


def check(q, scale, block, out_dtype=torch.float32):
    got = deepkern.cast_back(q, scale, block, out_dtype)
    want = deepkern.reference.cast_back(q, scale, block, out_dtype)
    compare.assert_matches("cast_back", got, want)
    return got


@pytest.fixture
def codes(device):
    """All 256 codes in two rows."""
    codes = torch.arange(256, dtype=torch.int32, device=device).to(torch.uint8)
    return codes.view(torch.float8_e4m3fn).reshape(2, 128)


@pytest.mark.parametrize("out_dtype", REAL)
def test_every_code(backend, codes, out_dtype, device):
    scale = torch.tensor([[0.3], [1.7e-3]], device=device)
    got = check(codes, scale, [1, 128], out_dtype)
    plain = (codes.float() * scale).to(out_dtype)
    compare.assert_bitwise(got, plain)


def test_value_of_each_code(backend, codes, device):
    """Against the definition of e4m3: sign, 4 exponent bits with bias 7, 3 mantissa bits."""
    got = check(codes, torch.ones(1, 1, device=device), [1000, 1000]).flatten().tolist()
    for code, value in enumerate(got):
        exponent, mantissa = (code >> 3) & 15, code & 7
        want = (mantissa / 8 + (exponent > 0)) * 2.0 ** (max(exponent, 1) - 7)
        if code & 127 == 127:
            assert value != value
        else:
            assert value == (-want if code & 128 else want)


BLOCKS = [(1, 128), (128, 128), (128, 1), (1, 1), (3, 7), (32, 128), (999, 5)]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block[0]}x{block[1]}")
def test_block_sizes(backend, generator, block):
    q, scale, _, _ = ops.inputs("cast_back", generator, N=150, K=200, block=block)
    got = check(q, scale, block)
    for n, k in ((0, 0), (149, 199), (127, 128), (33, 77)):
        assert got[n, k] == q[n, k].float() * scale[n // block[0], k // block[1]]


def test_round_trip_through_the_casts(backend, generator):
    x = values(generator, 2, 130, 200)
    for cast, block in ((deepkern.cast_per_token, [1, 128]), (deepkern.cast_per_block, [128, 128])):
        back = deepkern.cast_back(*cast(x), block, torch.bfloat16)
        assert compare.diff(back, x) < 1e-3
        again, _ = cast(back)  # values that e4m3 represents do not change
        compare.assert_bitwise(again.float(), cast(x)[0].float())


def test_rounds_once(backend, device):
    """1 + 2^-8 + 2^-20 is slightly more than the midpoint of two bf16 values."""
    q = torch.full((1, 1), 1.125, device=device).to(torch.float8_e4m3fn)
    scale = torch.tensor([[(1 + 2**-8 + 2**-20) / 1.125]], device=device)
    assert check(q, scale, [1, 1], torch.bfloat16).item() == 1 + 2**-7


def test_nan_and_inf(backend, generator):
    q, scale, block, _ = ops.inputs("cast_back", generator, N=5, K=300)
    q[1, 7] = float("nan")
    scale[2, 1], scale[3, 0] = float("nan"), float("inf")
    got = check(q, scale, block)
    want = torch.zeros(5, 300, dtype=torch.bool, device=got.device)
    want[1, 7], want[2, 128:256] = True, True
    want[3, :128] = q[3, :128].float() == 0  # inf * 0
    assert torch.equal(got.isnan(), want)


def test_strided_inputs(backend, generator):
    q, scale, _, _ = ops.inputs("cast_back", generator, N=40, K=300, G=4, block=(8, 64))
    view, column_major = q[1:3, :, 10:210], scale.mT.contiguous().mT[1:3, :, :4]
    got = deepkern.cast_back(view, column_major, (8, 64), torch.float32)
    want = deepkern.reference.cast_back(view.clone(), column_major.clone(), (8, 64), torch.float32)
    compare.assert_matches("cast_back", got, want)


@pytest.mark.parametrize("block", [(128,), (0, 128), (1, 128, 1), (-1, 1)], ids=str)
def test_bad_block(backend, block, device):
    q = torch.zeros(4, 4, device=device).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="^cast_back: block: expected .rows, cols., both at"):
        deepkern.cast_back(q, torch.ones(1, 1, device=device), block, torch.float32)


def test_bad_scale_shape_and_dtype(backend, device):
    q = torch.zeros(4, 300, device=device).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"^cast_back: scale: expected \(4, 3\) blocks of"):
        deepkern.cast_back(q, torch.ones(4, 2, device=device), (1, 128), torch.float32)
    with pytest.raises(ValueError, match="^cast_back: out_dtype: expected torch.bfloat16 or"):
        deepkern.cast_back(q, torch.ones(4, 3, device=device), (1, 128), torch.float64)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU cannot launch for another target")
@pytest.mark.parametrize("out_dtype", REAL)
def test_targets_without_fp8(codes, out_dtype, device):
    scale = torch.tensor([[0.3], [1.7e-3]], device=device)
    for target in ("sm_80", "gfx942"):
        with deepkern.backend("triton"), arch.compile_for(arch.ARCHS[target]):
            check(codes, scale, [1, 128], out_dtype)
            check(codes, torch.ones(2, 1, device=device), [1, 128], out_dtype)
