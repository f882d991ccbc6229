"""sequence_balance_loss: the report's equations, the model's loss, gradients in float64."""

from __future__ import annotations

import pytest
import torch

import deepkern
from deepkern.testing import compare, ops
from model.plain import balance_loss

SCORES = {
    "sigmoid": torch.sigmoid,
    "softmax": lambda x: x.softmax(-1),
    "sqrtsoftplus": lambda x: torch.nn.functional.softplus(x).sqrt(),
}


def equations(logits, topk_idx, score, alpha) -> torch.Tensor:
    """Equations 17 to 20 of the report in float64, token by token and expert by expert."""
    losses = []
    for x, chosen in zip(logits.double(), topk_idx.tolist(), strict=True):
        (S, E), topk = x.shape, topk_idx.shape[2]
        s = SCORES[score](x)
        loss = 0.0
        for i in range(E):
            f = E / (topk * S) * sum(row.count(i) for row in chosen)
            P = sum(s[t, i] / s[t].sum() for t in range(S)) / S
            loss = loss + f * P
        losses.append(alpha * loss)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("score", list(SCORES))
@pytest.mark.parametrize(
    ("B", "S", "E", "topk"),
    [(2, 7, 5, 2), (1, 70, 3, 3), (3, 33, 12, 1)],
    ids=["one_chunk", "three_chunks", "three_sequences"],
)
def test_equations(backend, score, B, S, E, topk, generator):
    logits, idx, *rule = ops.inputs(
        "sequence_balance_loss", generator, B=B, S=S, E=E, topk=topk, score=score, none=0.2
    )
    x = logits.requires_grad_()
    loss = deepkern.sequence_balance_loss(x, idx, *rule)
    exact = logits.detach().double().requires_grad_()
    want = equations(exact, idx, *rule)
    assert loss.dtype == torch.float32 and loss.shape == ()
    compare.assert_close(loss, want)
    (got,) = torch.autograd.grad(loss * 3.0, x)
    compare.assert_close(got, torch.autograd.grad(want * 3.0, exact)[0])


@pytest.mark.parametrize("score", list(SCORES))
def test_gradient_by_finite_differences(score, generator):
    """The gradient against central differences of the equations."""
    logits, idx, *rule = ops.inputs(
        "sequence_balance_loss", generator, B=2, S=3, E=4, topk=2, score=score
    )
    x, step = logits.requires_grad_(), 1e-5
    (got,) = torch.autograd.grad(deepkern.sequence_balance_loss(x, idx, *rule), x)
    for at in ((0, 0, 0), (1, 2, 3), (0, 1, 2)):
        delta = torch.zeros_like(x, dtype=torch.float64)
        delta[at] = step
        up, down = (equations(x.detach().double() + d, idx, *rule) for d in (delta, -delta))
        assert got[at].item() == pytest.approx((up - down).item() / (2 * step), rel=1e-3, abs=1e-9)


def test_equals_the_loss_of_the_model(backend, generator):
    """model/plain.py, whose loss has no alpha."""
    logits, idx, *_ = ops.inputs("sequence_balance_loss", generator, B=2, S=40, E=16, topk=3)
    order = torch.rand(2, 40, 16, generator=generator, device=logits.device).argsort(2)
    idx = order[..., :3].contiguous()
    got = deepkern.sequence_balance_loss(logits, idx, "sigmoid", 1.0)
    want = balance_loss(idx.flatten(0, 1), logits.double().sigmoid().flatten(0, 1), 2)
    compare.assert_close(got, want)


def test_even_load_costs_alpha(backend, device):
    logits = torch.zeros(1, 8, 8, device=device)
    idx = torch.arange(8, device=device).view(1, 8, 1)
    loss = deepkern.sequence_balance_loss(logits, idx, "sigmoid", 0.25)
    assert loss.item() == pytest.approx(0.25)


def test_sequences_are_independent(backend, generator):
    logits, idx, *rule = ops.inputs("sequence_balance_loss", generator, B=3, S=20, E=6, topk=2)
    losses = [
        deepkern.sequence_balance_loss(logits[b, None], idx[b, None], *rule) for b in range(3)
    ]
    together = deepkern.sequence_balance_loss(logits, idx, *rule)
    assert together.item() == pytest.approx(sum(loss.item() for loss in losses) / 3)


def test_hostile_indices_are_ignored(backend, generator):
    logits, idx, *rule = ops.inputs(
        "sequence_balance_loss", generator, B=1, S=4, E=5, topk=2, none=0.0
    )
    idx[0, :, 1] = torch.tensor([-1, 5, 2**63 - 1, -(2**63)], device=idx.device)
    loss = deepkern.sequence_balance_loss(logits, idx, *rule)
    # Half of the slots are invalid, and the factor 1 / topk counts all slots.
    alone = deepkern.sequence_balance_loss(logits, idx[..., :1].contiguous(), *rule)
    assert loss.item() == pytest.approx(alone.item() / 2)


def test_strided_logits_and_int32(backend, generator):
    logits, idx, *rule = ops.inputs("sequence_balance_loss", generator, B=2, S=9, E=6, topk=2)
    idx = idx.clamp(-1, 6)
    want = deepkern.sequence_balance_loss(logits, idx, *rule)
    wide = torch.cat([logits, logits], 2).transpose(0, 1).contiguous().transpose(0, 1)[..., :6]
    compare.assert_bitwise(deepkern.sequence_balance_loss(wide, idx.int(), *rule), want)


@pytest.mark.parametrize("order", ["reverse", "random:3"])
def test_any_order_of_programs(order, generator, monkeypatch):
    args = ops.inputs("sequence_balance_loss", generator, B=3, S=70, E=6, topk=2)
    with deepkern.backend("triton"):
        want = deepkern.sequence_balance_loss(*args)
        monkeypatch.setenv("DEEPKERN_INTERPRETER_ORDER", order)
        compare.assert_bitwise(deepkern.sequence_balance_loss(*args), want)


def test_bad_score(backend, device):
    with pytest.raises(ValueError, match="sequence_balance_loss: score: expected 'sigmoid' or"):
        deepkern.sequence_balance_loss(
            torch.zeros(1, 1, 2, device=device), torch.zeros(1, 1, 1, device=device).long(), "relu"
        )


@pytest.mark.gpu
@pytest.mark.parametrize("size", ops.sizes("sequence_balance_loss").gpu, ids=str)
def test_gpu_sizes(backend, size, generator):
    args = ops.inputs("sequence_balance_loss", generator, **size)
    want = deepkern.reference.sequence_balance_loss(*args)
    compare.assert_matches("sequence_balance_loss", deepkern.sequence_balance_loss(*args), want)
