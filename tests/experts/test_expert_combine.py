"""expert_combine: against the sum in float64; unnamed rows, order of sums, both gradients."""

from __future__ import annotations

import pytest
import torch

import deepkern
from deepkern.testing import compare, ops


def plain(y: torch.Tensor, weights: torch.Tensor, handle: torch.Tensor) -> torch.Tensor:
    """The sum in float64 by indexing; handles outside [0, rows) read a row of zeros."""
    y = torch.cat([y.double(), y.new_zeros(1, y.shape[1], dtype=torch.float64)])
    valid = (handle >= 0) & (handle < len(y) - 1)
    rows = y[torch.where(valid, handle, len(y) - 1).long()]  # [T, topk, K]
    return (torch.where(valid, weights.double(), 0.0)[:, :, None] * rows).sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("topk", "K"),
    [(1, 1), (3, 1030), (8, 100), (11, 17), (2, 3584), (2, 7168)],
    ids=["1x1", "two_blocks", "topk_8", "topk_11", "K_3584", "K_7168"],
)
def test_sum_in_float64(backend, dtype, topk, K, generator):
    # Enough values: the rounding of a single one to bf16 may exceed the bound of their mean.
    T = max(9, 500 // K)
    y, weights, handle = ops.inputs("expert_combine", generator, T=T, topk=topk, K=K, dtype=dtype)
    got = deepkern.expert_combine(y, weights, handle)
    assert got.dtype == dtype
    compare.assert_close(got, plain(y, weights, handle), dtype=dtype)


def test_rounds_once(backend, generator):
    """bf16 inputs and output, fp32 sums: within half a unit in the last place of the exact sum."""
    y, weights, handle = ops.inputs("expert_combine", generator, T=40, topk=8, K=64, none=0.0)
    got = deepkern.expert_combine(y.abs(), weights, handle)  # nothing cancels
    exact = plain(y.abs(), weights, handle)
    assert ((got.double() - exact).abs() <= exact * 2**-8 * 0.501 * 2).all()
    nearest = exact.float().bfloat16()
    assert (got != nearest).sum() <= got.numel() // 200  # only ties of fp32 sums may differ


def test_sums_in_the_order_of_the_slots(backend, device):
    """In fp32, 2^24 + 1 = 2^24: the result shows whether the ones are added first."""
    y = torch.tensor([[2.0**24], [1.0], [1.0]], device=device)
    ones = torch.ones(2, 3, device=device)
    handle = torch.tensor([[0, 1, 2], [1, 2, 0]], dtype=torch.int32, device=device)
    got = deepkern.expert_combine(y, ones, handle)[:, 0].tolist()
    exact = 2.0**24 + 2
    assert got == ([exact, exact] if backend == "torch" else [2.0**24, exact])


def test_slots_without_a_row_are_ignored(backend, device):
    y = torch.tensor([[1.0, 2.0], [torch.nan, torch.inf]], device=device)
    weights = torch.tensor([[2.0, torch.nan, torch.inf], [torch.nan] * 3], device=device)
    handle = torch.tensor([[0, -1, 2], [-(2**31), 2**31 - 1, -7]], dtype=torch.int32, device=device)
    got = deepkern.expert_combine(y, weights, handle)
    assert got.tolist() == [[2.0, 4.0], [0.0, 0.0]]


def test_row_named_twice(backend, device):
    y = torch.tensor([[1.0], [10.0]], device=device)
    handle = torch.tensor([[1, 1], [1, 0]], dtype=torch.int32, device=device)
    got = deepkern.expert_combine(y, torch.ones(2, 2, device=device), handle)
    assert got.tolist() == [[20.0], [11.0]]


@pytest.mark.parametrize(
    ("rows", "T", "topk", "K"),
    [(0, 3, 2, 4), (5, 0, 2, 4), (5, 3, 0, 4), (5, 3, 2, 0)],
    ids=["no_rows", "no_tokens", "no_slots", "no_columns"],
)
def test_empty(backend, rows, T, topk, K, device):
    y = torch.ones(rows, K, device=device, requires_grad=True)
    weights = torch.ones(T, topk, device=device, requires_grad=True)
    handle = torch.zeros(T, topk, dtype=torch.int32, device=device)
    got = deepkern.expert_combine(y, weights, handle)
    assert got.shape == (T, K) and (rows * topk or (got == 0).all())
    got.sum().backward()
    assert y.grad.shape == y.shape and (weights.grad == (4 if K and rows else 0)).all()


def test_strided_arguments(backend, generator):
    device = generator.device
    y = torch.randn(12, 40, generator=generator, device=device)[:, 3:30]
    weights = torch.rand(6, 9, generator=generator, device=device).bfloat16()[:, 1:3]
    handle = torch.arange(54, dtype=torch.int32, device=device).view(6, 9)[:, 4:6]
    got = deepkern.expert_combine(y, weights, handle)
    compare.assert_close(got, plain(y, weights, handle))
    assert (got[:1] != 0).all() and (got[2:] == 0).all()


def test_shared_is_added_before_rounding(device):
    """1 + 2^-9 + 0.75 · 2^-8 in bf16 is 1 + 2^-7; rounded twice it would be 1."""
    y = torch.tensor([[1.0], [2.0**-9]], dtype=torch.bfloat16, device=device)
    weights = torch.ones(1, 2, device=device)
    handle = torch.tensor([[0, 1]], dtype=torch.int32, device=device)
    shared = torch.full((1, 1), 2.0**-8 * 0.75, device=device)
    for name in ("torch", "triton"):
        with deepkern.backend(name):
            got = deepkern.expert_combine(y, weights, handle, shared)
        assert got.item() == 1 + 2.0**-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_the_shared_expert(backend, dtype, generator):
    y, weights, handle, shared = ops.inputs(
        "expert_combine", generator, T=7, topk=3, K=130, shared=dtype
    )
    wide = torch.cat([shared, shared], 1).requires_grad_()  # its rows are strided
    out = deepkern.expert_combine(y, weights, handle, wide[:, :130])
    compare.assert_close(out, plain(y, weights, handle) + shared.double())
    towards = torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype)
    (got,) = torch.autograd.grad(out, wide, towards)
    assert torch.equal(got[:, :130], towards.to(dtype)) and not got[:, 130:].any()


def test_token_bits_independent_of_T(backend, generator):
    y, weights, handle = ops.inputs("expert_combine", generator, T=13, topk=5, K=70)
    out = deepkern.expert_combine(y, weights, handle)
    for t in (0, 6, 12):
        one = deepkern.expert_combine(y, weights[t : t + 1], handle[t : t + 1])
        compare.assert_bitwise(one[0], out[t])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("topk", "K"),
    [(3, 1030), (8, 20), (4, 1), (3, 7168)],
    ids=["two_blocks", "topk_8", "K_1", "K_7168"],
)
def test_gradients(backend, topk, K, dtype, generator):
    y, weights, handle = ops.inputs(
        "expert_combine", generator, T=9, topk=topk, K=K, dtype=dtype, none=0.3
    )
    weights = weights.to(dtype)
    y, weights = y.requires_grad_(), weights.requires_grad_()
    out = deepkern.expert_combine(y, weights, handle)
    towards = torch.randn(out.shape, generator=generator, device=out.device).to(dtype)
    got = torch.autograd.grad(out, (y, weights), towards)
    exact = [t.detach().double().requires_grad_() for t in (y, weights)]
    want = torch.autograd.grad(plain(*exact, handle), exact, towards.double())
    for g, w in zip(got, want, strict=True):
        assert g.dtype == dtype
        if dtype == torch.bfloat16:  # rounded once; one of the 27 weights may dominate the rest
            atol = 1e-5 * w.abs().max().item()
            torch.testing.assert_close(g.double(), w, rtol=2.0**-8, atol=atol)
        else:
            compare.assert_close(g, w)
    named = handle[(handle >= 0) & (handle < len(y))].long()
    unnamed = torch.ones(len(y), dtype=torch.bool, device=y.device)
    unnamed[named] = False
    assert unnamed.any() and (got[0][unnamed] == 0).all()


def test_expanded_gradient(backend, generator):
    y, weights, handle = ops.inputs("expert_combine", generator, T=4, topk=2, K=6, none=0.0)
    weights.requires_grad_()
    deepkern.expert_combine(y, weights, handle).sum().backward()
    want = y.double().sum(1)[handle.long()]
    compare.assert_close(weights.grad, want)


def test_gradient_of_row_named_twice(device):
    """The last slot counts, in any order of the programs; grad_weights is right for all slots."""
    y = torch.tensor([[3.0]], device=device)
    weights = torch.tensor([[2.0, 5.0], [7.0, 11.0]], device=device)
    handle = torch.tensor([[0, 0], [0, -1]], dtype=torch.int32, device=device)
    with deepkern.backend("triton"):
        grad_y, grad_weights = torch.ops.deepkern.expert_combine_backward(
            torch.ones(2, 1, device=device), y, weights, handle
        )
    assert grad_y.tolist() == [[7.0]] and grad_weights.tolist() == [[3.0, 3.0], [3.0, 0.0]]


@pytest.mark.parametrize("order", ["reverse", "random:5"])
def test_any_order_of_programs(order, generator, monkeypatch):
    monkeypatch.setenv("DEEPKERN_INTERPRETER_ORDER", order)
    name = "expert_combine_backward"
    args = ops.inputs(name, generator, T=30, topk=3, K=40, none=0.4)
    with deepkern.backend("triton"):
        got = torch.ops.deepkern.expert_combine_backward(*args)
    compare.assert_matches(name, got, deepkern.reference.expert_combine_backward(*args))


def test_debug_check(backend, device, monkeypatch):
    monkeypatch.setenv("DEEPKERN_DEBUG", "1")
    y = torch.ones(3, 2, device=device, requires_grad=True)
    weights, handle = (
        torch.ones(2, 1, device=device),
        torch.tensor([[3], [-1]], device=device).int(),
    )
    with pytest.raises(ValueError, match=r"expert_combine: handle: .* got 3 at \(0, 0\)"):
        deepkern.expert_combine(y, weights, handle)
    out = deepkern.expert_combine(y, weights, torch.ones_like(handle))
    with pytest.raises(ValueError, match="expert_combine_backward: handle: .*at most once"):
        out.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("size", ops.sizes("expert_combine").gpu, ids=str)
def test_gpu_sizes(backend, size, generator):
    args = ops.inputs("expert_combine", generator, **size)
    got = deepkern.expert_combine(*args)
    compare.assert_matches("expert_combine", got, deepkern.reference.expert_combine(*args))
