"""hadamard_transform: against the matrix, special values, gradients, sizes."""

from __future__ import annotations

import pytest
import torch

import deepkern
from deepkern.testing import compare

REAL = [torch.bfloat16, torch.float16, torch.float32]


def matrix(N: int, device) -> torch.Tensor:
    """(-1)^popcount(i & j), one entry at a time."""
    rows = [[(-1.0) ** (i & j).bit_count() for j in range(N)] for i in range(N)]
    return torch.tensor(rows, dtype=torch.float64, device=device)


@pytest.mark.parametrize("N", [1, 2, 8, 64, 128, 512])
def test_against_the_matrix(backend, N, generator):
    x = torch.randn(5, N, generator=generator, device=generator.device)
    got = deepkern.hadamard_transform(x, 0.3)
    compare.assert_close(got, x.double() @ matrix(N, x.device) * 0.3)


@pytest.mark.parametrize("N", [2048, 4096, 32768])
def test_long_rows_against_their_halves(backend, N, generator):
    """H of size 2N is [[H, H], [H, -H]]. The values are integers, so every sum is exact."""
    x = torch.randint(-3, 4, (2, N), generator=generator, device=generator.device).float()
    got = deepkern.hadamard_transform(x)
    half = N // 2
    low, high = (deepkern.reference.hadamard_transform(part) for part in x.split(half, 1))
    compare.assert_bitwise(got, torch.cat((low + high, low - high), 1))
    assert torch.equal(deepkern.hadamard_transform(got, 1 / N), x)  # its own inverse


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("N", [16, 128, 4096])
def test_strides_and_single_rounding(backend, dtype, N, generator):
    x = torch.randn(3, 2, N + 5, generator=generator, device=generator.device).to(dtype)
    x = x[..., 3 : 3 + N]
    got = deepkern.hadamard_transform(x, N**-0.5)
    compare.assert_bitwise(got, deepkern.reference.hadamard_transform(x, N**-0.5))
    assert got.dtype == dtype and got.is_contiguous()
    compare.assert_bitwise(got, deepkern.hadamard_transform(x.float(), N**-0.5).to(dtype))


def test_row_bits_independent_of_others(backend, generator):
    x = torch.randn(70, 128, generator=generator, device=generator.device)
    together = deepkern.hadamard_transform(x)
    compare.assert_bitwise(deepkern.hadamard_transform(x[33:34]), together[33:34])
    x[5, 7], x[6, 0] = torch.nan, torch.inf
    got = deepkern.hadamard_transform(x)
    compare.assert_bitwise(got, deepkern.reference.hadamard_transform(x))
    assert got.isfinite().all(1).sum() == 68


def test_gradients(backend, generator):
    x = torch.randn(3, 16, generator=generator, device=generator.device).requires_grad_()
    y = deepkern.hadamard_transform(x, 0.5)
    w = torch.randn(y.shape, generator=generator, device=y.device).requires_grad_()
    (grad,) = torch.autograd.grad(y, x, w, create_graph=True)
    compare.assert_close(grad, w.double() @ matrix(16, x.device) * 0.5)
    (second,) = torch.autograd.grad(grad.square().sum(), w)
    compare.assert_close(second, 2 * grad.double() @ matrix(16, x.device) * 0.5)
    # The gradient of sum() is an expanded tensor, with strides 0.
    (of_sum,) = torch.autograd.grad(deepkern.hadamard_transform(x).sum(), x)
    assert torch.equal(of_sum, deepkern.hadamard_transform(torch.ones_like(x)))


@pytest.mark.parametrize("N", [3, 100, 65536])
def test_errors(backend, N):
    with pytest.raises(ValueError, match="hadamard_transform: x: expected a power of two up to"):
        deepkern.hadamard_transform(torch.zeros(2, N))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("N", [2**i for i in range(16)])
def test_every_width(dtype, N, generator):
    x = torch.randn(1000, N, generator=generator, device=generator.device).to(dtype)
    with deepkern.backend("triton"):
        got = deepkern.hadamard_transform(x, N**-0.5)
    compare.assert_bitwise(got, deepkern.reference.hadamard_transform(x, N**-0.5))
