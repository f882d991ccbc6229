"""The indexer as docs/attention.md has it, from projected queries and keys to chosen tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

PAGE = Path(__file__).parent.parent.parent / "docs/attention.md"


@pytest.fixture
def documented() -> dict:
    """The names that the page's Python defines."""
    section = PAGE.read_text().split("## The indexer")[1]
    code = section.split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(compile(code, str(PAGE), "exec"), names)
    return names


def scores(q, k, weights, norm_weight, norm_bias, cos, sin) -> torch.Tensor:
    """float64, no FP8, no Hadamard rotation: it leaves products as they are."""

    def turned(x, angle):
        pairs = torch.complex(x[..., :32], x[..., 32:64]) * angle
        return torch.cat((pairs.real, pairs.imag, x[..., 64:]), -1)

    angle = torch.complex(cos.double(), sin.double())
    k = F.layer_norm(k.double(), (128,), norm_weight.double(), norm_bias.double(), 1e-6)
    q, k = turned(q.double(), angle[:, None]), turned(k, angle)
    products = torch.einsum("shd,nd->shn", q, k).relu()
    return torch.einsum("shn,sh->sn", products, weights.double())


def test_the_pages_code(backend, documented, generator):
    T, H, topk = 40, 8, 6
    device = generator.device

    def randn(*shape):
        return torch.randn(shape, generator=generator, device=device)

    position = torch.arange(T, device=device)[:, None]
    angle = position * 10000.0 ** -(torch.arange(32, device=device) / 32)
    given = (randn(T, H, 128), randn(T, 128), randn(T, H), 1 + 0.1 * randn(128), 0.1 * randn(128),
             angle.cos(), angle.sin())  # fmt: skip
    got = documented["chosen_tokens"](*given, topk)
    want = scores(*given).masked_fill(position < position.T, -torch.inf)
    assert got.shape == (T, topk) and got.dtype == torch.int32
    for s in range(T):
        seen = min(s + 1, topk)
        chosen = got[s, :seen].long()
        assert (got[s, seen:] == -1).all() and (chosen >= 0).all() and (chosen <= s).all()
        # FP8 may swap near ties, never lose a clearly better key.
        worst, best = want[s, chosen].min(), want[s].topk(seen).values[-1]
        assert best - worst <= 0.1 * want[s, : s + 1].abs().max(), s
    overlap = [
        len(set(got[s].tolist()) & set(want[s].topk(topk).indices.tolist())) for s in range(topk, T)
    ]
    assert sum(overlap) / len(overlap) > 0.9 * topk
