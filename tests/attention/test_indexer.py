"""The indexer code of docs/attention.md, from projected queries and keys to token indices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

PAGE = Path(__file__).parent.parent.parent / "docs/attention.md"


@pytest.fixture
def documented() -> dict:
    """The names that the Python code of the page defines."""
    section = PAGE.read_text().split("## The indexer")[1]
    code = section.split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(compile(code, str(PAGE), "exec"), names)
    return names


def scores(q, k, weights, norm_weight, norm_bias, cos, sin) -> torch.Tensor:
    """float64, without FP8 and without the Hadamard rotation, which preserves products."""

    def rotate(x, angle):
        pairs = torch.complex(x[..., :32], x[..., 32:64]) * angle
        return torch.cat((pairs.real, pairs.imag, x[..., 64:]), -1)

    angle = torch.complex(cos.double(), sin.double())
    k = F.layer_norm(k.double(), (128,), norm_weight.double(), norm_bias.double(), 1e-6)
    q, k = rotate(q.double(), angle[:, None]), rotate(k, angle)
    products = torch.einsum("shd,nd->shn", q, k).relu()
    return torch.einsum("shn,sh->sn", products, weights.double())


def test_code_of_the_page(backend, documented, generator):
    T, H, topk = 40, 8, 6
    device = generator.device

    def randn(*shape):
        return torch.randn(shape, generator=generator, device=device)

    position = torch.arange(T, device=device)[:, None]
    angle = position * 10000.0 ** -(torch.arange(32, device=device) / 32)
    args = (randn(T, H, 128), randn(T, 128), randn(T, H), 1 + 0.1 * randn(128), 0.1 * randn(128),
            angle.cos(), angle.sin())  # fmt: skip
    got = documented["chosen_tokens"](*args, topk)
    want = scores(*args).masked_fill(position < position.T, -torch.inf)
    assert got.shape == (T, topk) and got.dtype == torch.int32
    for s in range(T):
        count = min(s + 1, topk)
        selected = got[s, :count].long()
        assert (got[s, count:] == -1).all() and (selected >= 0).all() and (selected <= s).all()
        # FP8 may swap keys with almost equal scores, but must not miss a clearly better one.
        worst, best = want[s, selected].min(), want[s].topk(count).values[-1]
        assert best - worst <= 0.1 * want[s, : s + 1].abs().max(), s
    overlap = [
        len(set(got[s].tolist()) & set(want[s].topk(topk).indices.tolist())) for s in range(topk, T)
    ]
    assert sum(overlap) / len(overlap) > 0.9 * topk
