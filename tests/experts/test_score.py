"""score.py: the same bits in kernels and in PyTorch, near float64."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from deepkern.arithmetic import sum_pairwise
from deepkern.experts import score
from deepkern.reference import experts as reference
from deepkern.testing import compare


@triton.jit
def apply(x_ptr, y_ptr, N, NAME: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < N, other=0.0)
    if NAME == "exp":
        y = score.exp(x)
    elif NAME == "log1p":
        y = score.log1p(x)
    elif NAME == "sigmoid":
        y = score.sigmoid(x)
    else:
        y = score.sqrtsoftplus(x)
    tl.store(y_ptr + i, y, mask=i < N)


@triton.jit
def apply_to_rows(x_ptr, y_ptr, pairs_ptr, N: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + row * N + column)
    row_max, row_sum = score.softmax_stats(x)
    y = score.scores(x, row_max, row_sum, "softmax")
    tl.store(y_ptr + row * N + column, y)
    tl.store(pairs_ptr + row + tl.zeros((1,), tl.int32), sum_pairwise(y))


def ulps(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest distance from float64 values, in units in the last place of float32."""
    size = want.float().abs()
    unit = torch.nextafter(size, torch.full_like(size, torch.inf)) - size
    return ((got.double() - want).abs() / unit.double()).max().item()


SPECIAL = [0.0, -0.0, -1e-45, -1e-38, -87.3, -88.8, -103.9, -104.1, -1e30, -torch.inf, torch.nan]


def arguments(name: str, generator: torch.Generator, count: int) -> torch.Tensor:
    device = generator.device
    special = torch.tensor(SPECIAL, device=device)
    if name == "exp":
        return torch.cat([special, -torch.rand(count, generator=generator, device=device) * 110])
    if name == "log1p":  # all magnitudes
        exponent = torch.rand(count, generator=generator, device=device) * -140
        return torch.cat([special[:2].abs(), torch.tensor([1.0], device=device), exponent.exp2()])
    x = torch.randn(count, generator=generator, device=device) * 20
    return torch.cat([special, -special, x])


EXACT = {
    "exp": torch.exp,
    "log1p": torch.log1p,
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)).sqrt(),
}


@pytest.mark.parametrize("name", EXACT)
def test_kernel_bits_equal_reference(name, generator):
    x = arguments(name, generator, 60_000)
    got = torch.empty_like(x)
    apply[(triton.cdiv(len(x), 16384),)](
        x, got, len(x), NAME=name, BLOCK=16384, num_warps=16, enable_fp_fusion=False
    )
    compare.assert_bitwise(got, getattr(reference, name)(x), name)


# Measured: 0.97, 1.92, 2.40, 1.81. (torch.sigmoid on a CPU 2.46, sqrt(softplus) 1.44.)
@pytest.mark.parametrize(
    ("name", "bound"), [("exp", 1.1), ("log1p", 2.1), ("sigmoid", 2.6), ("sqrtsoftplus", 2.1)]
)
def test_near_float64(name, bound, generator):
    x = arguments(name, generator, 1_000_000)
    x = x[x.isfinite()]
    if name == "sqrtsoftplus":  # for smaller x, exp(x) is subnormal and less precise
        x = x[x > -87]
    assert ulps(getattr(reference, name)(x), EXACT[name](x.double())) <= bound


def test_special_values(device):
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0], device=device)
    assert reference.sigmoid(x).tolist()[:2] == [1.0, 0.0]
    assert reference.sigmoid(x)[2].isnan() and reference.sigmoid(x)[3] == 0.5
    assert reference.sqrtsoftplus(x).tolist()[:2] == [torch.inf, 0.0]
    assert reference.sqrtsoftplus(x)[2].isnan()
    assert reference.exp(torch.tensor([0.0, -0.0, -torch.inf])).tolist() == [1.0, 1.0, 0.0]


def test_softmax_and_sum_in_rows(generator):
    x = torch.randn(6, 64, generator=generator, device=generator.device) * 5
    x[1, 3], x[2, 3], x[3, 3], x[4] = torch.nan, torch.inf, -torch.inf, -torch.inf
    y, pairs = torch.empty_like(x), x.new_empty(6)
    apply_to_rows[(6,)](x, y, pairs, N=64, enable_fp_fusion=False)
    compare.assert_bitwise(y, reference.softmax(x))
    compare.assert_bitwise(pairs, reference.sum_pairs(y)[:, 0])
    assert y[[1, 2, 4]].isnan().all() and y[3, 3] == 0
    good = [0, 3, 5]
    torch.testing.assert_close(y[good].double(), x[good].double().softmax(1), rtol=3e-6, atol=0)
    torch.testing.assert_close(pairs[good], torch.ones(3, device=x.device), rtol=1e-6, atol=0)


def test_softmax_of_permuted_experts(generator):
    x = torch.randn(4, 256, generator=generator, device=generator.device) * 4
    order = torch.randperm(256, generator=generator, device=generator.device)
    compare.assert_bitwise(reference.softmax(x)[:, order], reference.softmax(x[:, order]))
