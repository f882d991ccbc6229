"""update_expert_bias: the rule in integers, and that it balances a router."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

import deepkern
from deepkern.testing import compare


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("rate", [0.001, 0.0, 0.5])
def test_rule(backend, rate, dtype, generator):
    """An expert with exactly the mean load, 100, keeps its bias."""
    load = torch.tensor([100, 99, 101, 0, 200, 100], dtype=dtype, device=generator.device)
    bias = torch.randn(6, generator=generator, device=generator.device)
    got = deepkern.update_expert_bias(bias, load, rate)
    step = bias.new_tensor([0, 1, -1, 1, -1, 0]) * bias.new_tensor(rate)
    compare.assert_bitwise(got, bias + step)


def test_default_rate(backend, device):
    got = deepkern.update_expert_bias(torch.zeros(2, device=device), torch.arange(2, device=device))
    assert got.tolist() == pytest.approx([0.001, -0.001])


def test_loads_equal_in_fp32(backend, device):
    """Loads that differ by one token and are equal in fp32."""
    load = torch.tensor([2**30, 2**30 + 1, 2**30 + 2], device=device)
    got = deepkern.update_expert_bias(torch.zeros(3, device=device), load, 1.0)
    assert got.tolist() == [1.0, 0.0, -1.0]


def test_more_experts_than_a_block(backend, generator):
    load = torch.randint(90, 110, (2500,), generator=generator, device=generator.device)
    got = deepkern.update_expert_bias(torch.zeros(2500, device=load.device), load, 1.0)
    mean = Fraction(int(load.sum()), 2500)
    assert got.tolist() == [(mean > n) - (mean < n) for n in load.tolist()]


def test_balances_a_router(backend, generator):
    """Repeated updates balance logits that favour some experts."""
    device = generator.device
    logits = torch.randn(256, 8, generator=generator, device=device)
    logits += torch.linspace(-1, 1, 8, device=device)
    bias = torch.zeros(8, device=device)
    loads = []
    for _ in range(25):
        _, idx = deepkern.route_topk(logits, bias, topk=2)
        load = deepkern.expert_load(idx, 8)
        loads.append(load.max().item() / 64)
        bias = deepkern.update_expert_bias(bias, load, 0.02)
    # Steps of 0.02 move a few of 256 tokens back and forth: at most 1.28 in 150 seeds.
    assert loads[0] > 1.5 and loads[-1] < 1.4
