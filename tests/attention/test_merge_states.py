"""merge_states: softmax from two halves, queries without keys, gradients, strides."""

from __future__ import annotations

import math

import pytest
import torch

import deepkern
from deepkern.testing import compare, ops

INF = math.inf


def split_softmax(generator, lead, S, H, D, n):
    """float64 scores [..., H, S, n] and values [..., H, n, D], n even."""
    device = generator.device
    scores = torch.randn(*lead, H, S, n, generator=generator, device=device).double() * 3
    return scores, torch.randn(*lead, H, n, D, generator=generator, device=device).double()


def attend(scores, values):
    """out [..., S, H, D] and lse [..., H, S] by torch's softmax."""
    return (scores.softmax(-1) @ values).transpose(-2, -3), scores.logsumexp(-1)


@pytest.mark.parametrize("lead", [(), (2,)], ids=["no-batch", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_two_halves_equal_full_softmax(backend, lead, dtype, generator):
    scores, values = split_softmax(generator, lead, 5, 3, 24, 40)
    (out_a, lse_a), (out_b, lse_b) = (
        attend(s, v) for s, v in zip(scores.split(20, -1), values.split(20, -2), strict=True)
    )
    parts = out_a.to(dtype), lse_a.float(), out_b.to(dtype), lse_b.float()
    assert not parts[0].is_contiguous() and parts[0].stride(-1) == 1
    out, lse = deepkern.merge_states(*parts)
    want, want_lse = attend(scores, values)
    assert out.is_contiguous() and lse.is_contiguous() and out.dtype == dtype
    compare.assert_close(lse, want_lse)
    if dtype != torch.float32:  # the halves are rounded before the merge
        weight = (lse_a - want_lse).exp().mT[..., None]
        want = weight * parts[0].double() + (1 - weight) * parts[2].double()
    compare.assert_close(out, want)


def test_lse_of_any_strides(backend, generator):
    """FlashMLA's prefill returns a transposed [T, H]."""
    out_a, lse_a, out_b, lse_b = ops.inputs("merge_states", generator, (), 7, 4, 32)
    want = deepkern.merge_states(out_a, lse_a, out_b, lse_b)
    transposed = lse_a.T.contiguous().T
    apart = torch.full((4, 7, 2), math.nan, device=lse_b.device)
    apart[..., 1] = lse_b
    for got, expected in zip(
        deepkern.merge_states(out_a, transposed, out_b, apart[..., 1]), want, strict=True
    ):
        compare.assert_bitwise(got, expected)


def test_queries_without_keys(backend, generator):
    """-inf on one side gives the other exactly, on both 0 and -inf; out is not read there."""
    out = torch.randn(2, 1, 4, 16, generator=generator, device=generator.device).bfloat16()
    lse = torch.tensor([0.5, -INF, 3.0, -INF], device=out.device).expand(1, 4).T
    garbage = torch.where(lse.T[..., None] == -INF, math.nan, out[0])
    other = torch.tensor([-INF, 1.5, -INF, -INF], device=out.device).expand(1, 4).T
    other_garbage = torch.where(other.T[..., None] == -INF, INF, out[1])
    got, got_lse = deepkern.merge_states(garbage, lse, other_garbage, other)
    assert got_lse[:, 0].tolist() == [0.5, 1.5, 3.0, -INF]
    compare.assert_bitwise(got[0, [0, 2]], out[0, 0, [0, 2]])
    compare.assert_bitwise(got[0, 1], out[1, 0, 1])
    assert (got[0, 3] == 0).all()


def test_extremes_of_lse(backend, generator):
    """Sums of exponentials past fp32's range merge; +inf and NaN affect their own row only."""
    lse_a = torch.tensor([[300.0, -300.0, 300.0, INF, math.nan, INF]], device=generator.device).T
    lse_b = torch.tensor([[300.0, -300.0, -300.0, 0.0, 0.0, -INF]], device=generator.device).T
    a, b = torch.randn(2, 1, 6, 8, generator=generator, device=generator.device)
    out, lse = deepkern.merge_states(a, lse_a, b, lse_b)
    torch.testing.assert_close(out[0, :2], (a + b)[0, :2] / 2)
    compare.assert_bitwise(out[0, 2], a[0, 2])
    torch.testing.assert_close(lse[:3, 0].cpu(), torch.tensor([300.0, -300.0, 300.0])
                               + torch.tensor([math.log(2), math.log(2), 0]))  # fmt: skip
    assert out[0, 3:].isnan().all() and lse[3:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradients_match_float64_autograd(backend, dtype, generator):
    parts = ops.inputs("merge_states", generator, (2,), 3, 4, 40, dtype, empty=False)
    given = [x.clone().requires_grad_() for x in parts]
    out, lse = deepkern.merge_states(*given)
    grad_out = torch.randn(out.shape, generator=generator, device=out.device).to(dtype)
    grad_lse = torch.randn(lse.shape, generator=generator, device=out.device)
    got = torch.autograd.grad((out, lse), given, (grad_out, grad_lse))

    wide = [x.double().requires_grad_() for x in parts]
    out_a, lse_a, out_b, lse_b = wide
    merged = torch.logaddexp(lse_a, lse_b)
    weight = (lse_a - merged).exp().mT[..., None]
    want = torch.autograd.grad(
        (weight * out_a + (1 - weight) * out_b, merged),
        wide,
        (grad_out.double(), grad_lse.double()),
    )
    for g, w in zip(got, want, strict=True):
        compare.assert_close(g, w)


def test_gradients_of_queries_without_keys(backend, generator):
    """Zero on the side without keys, even if its out is NaN; 1 on the other side."""
    parts = ops.inputs("merge_states", generator, (), 6, 5, 16, torch.float32)
    given = [x.clone().requires_grad_() for x in parts]
    out, lse = deepkern.merge_states(*given)
    grads = torch.autograd.grad(out.sum() + lse[lse > -INF].sum(), given)
    lse_a, lse_b = parts[1], parts[3]
    for grad, lse_grad, own, other in (
        (*grads[:2], lse_a, lse_b),
        (*grads[2:], lse_b, lse_a),
    ):
        nothing, alone = own == -INF, (own > -INF) & (other == -INF)
        assert nothing.any() and alone.any()
        assert (grad[nothing.mT] == 0).all() and (lse_grad[nothing] == 0).all()
        assert (grad[alone.mT] == 1).all() and (lse_grad[alone] == 1).all()


def test_only_one_output_used(backend, generator):
    parts = ops.inputs("merge_states", generator, (2,), 1, 3, 16, torch.float32, empty=False)
    given = [x.clone().requires_grad_() for x in parts]
    out, _ = deepkern.merge_states(*given)
    grads = torch.autograd.grad(out.sum(), given)
    assert all(g.isfinite().all() for g in grads)
    # The weights add up to 1: the result does not change if both lse grow by the same amount.
    torch.testing.assert_close(grads[1], -grads[3])


def test_bits_independent_of_other_rows(backend, generator):
    parts = ops.inputs("merge_states", generator, (3,), 4, 5, 64)
    out, lse = deepkern.merge_states(*parts)
    alone = [x[1:2, 2:3, 3:4] if x.dim() == 4 else x[1:2, 3:4, 2:3] for x in parts]
    one, one_lse = deepkern.merge_states(*alone)
    compare.assert_bitwise(one[0, 0, 0], out[1, 2, 3])
    compare.assert_bitwise(one_lse[0, 0, 0], lse[1, 3, 2])


def test_dtypes_may_differ(backend, generator):
    out_a, lse_a, out_b, lse_b = ops.inputs("merge_states", generator, (), 3, 2, 16)
    out, _ = deepkern.merge_states(out_a, lse_a, out_b.float(), lse_b)
    assert out.dtype == torch.bfloat16
    compare.assert_bitwise(out, deepkern.merge_states(out_a, lse_a, out_b, lse_b)[0])


def test_error_for_transposed_lse(generator):
    out_a, lse_a, out_b, lse_b = ops.inputs("merge_states", generator, (), 7, 4, 32)
    with pytest.raises(ValueError, match=r"merge_states: lse_a: expected H = 4 in fp32 \[..., H"):
        deepkern.merge_states(out_a, lse_a.T, out_b, lse_b)


def test_error_for_too_many_rows(generator):
    """Row numbers are 32-bit up to the end of the last tile: past 2**31 they would wrap."""
    lse = torch.empty(1, device=generator.device).expand(2**31 - 2047, 1)
    out = torch.empty(1, 1, 1, device=generator.device).expand(1, 2**31 - 2047, 1)
    with pytest.raises(ValueError, match=r"merge_states: lse_a: expected at most 2\*\*31 - 2048"):
        deepkern.merge_states.op.allocate(out, lse, out, lse)
