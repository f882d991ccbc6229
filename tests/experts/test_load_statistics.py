"""LoadStatistics: decays layer by layer, forgets, and feeds a plan."""

from __future__ import annotations

import pytest
import torch

import deepkern


def test_decay_by_layer(device):
    statistics = deepkern.LoadStatistics(2, 3, half_life=2, device=device)
    one, two = torch.tensor([4, 0, 8], device=device), torch.tensor([0, 2, 0], device=device)
    statistics.update(0, one.int())
    for _ in range(2):
        statistics.update(0, two)
    want = torch.tensor([[2.0, 2 + 2 * 0.5**0.5, 4.0], [0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(statistics.load.cpu(), want, rtol=1e-12, atol=0)
    statistics.update(1, one.float())
    assert statistics.load[1].tolist() == [4, 0, 8]


def test_a_plan_follows_the_load():
    """The hot expert of now gets the spare replicas, not that of long ago."""
    statistics = deepkern.LoadStatistics(1, 8, half_life=10)
    for step in range(200):
        tokens = torch.full((8,), 10)
        tokens[2 if step < 100 else 5] = 1000
        statistics.update(0, tokens)
    logcnt = deepkern.rebalance_experts(statistics.load, 12, 1, 1, 4)[2]
    assert logcnt[0].argmax() == 5 and logcnt[0, 5] >= 4 and logcnt[0, 2] == 1


def test_errors_name_the_argument():
    statistics = deepkern.LoadStatistics(2, 3, half_life=2)
    for wrong, named in (
        (lambda: deepkern.LoadStatistics(2, 3, half_life=0), "half_life"),
        (lambda: statistics.update(2, torch.ones(3)), "layer"),
        (lambda: statistics.update(0, torch.ones(4)), "tokens_per_expert"),
    ):
        with pytest.raises(ValueError, match=f"^LoadStatistics: {named}: expected .*, got "):
            wrong()
