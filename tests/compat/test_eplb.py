"""compat.eplb: EPLB's signature, types and promises."""

from __future__ import annotations

import inspect

import pytest
import torch

import deepkern
import deepkern.compat.eplb as eplb


def test_signature_and_results(seed):
    weight = torch.rand(3, 32, generator=torch.Generator().manual_seed(seed)) ** 2
    names = ["weight", "num_replicas", "num_groups", "num_nodes", "num_gpus"]
    assert list(inspect.signature(eplb.rebalance_experts).parameters) == names
    call = dict(zip(names, (weight, 48, 8, 4, 16), strict=True))
    phy2log, log2phy, count = eplb.rebalance_experts(**call)
    assert phy2log.shape == (3, 48) and count.shape == (3, 32) and log2phy.shape[:2] == (3, 32)
    assert log2phy.shape[2] == count.max()
    assert all(x.dtype == torch.int64 and x.device.type == "cpu" for x in (phy2log, log2phy, count))
    for layer in range(3):
        for slot, expert in enumerate(phy2log[layer].tolist()):
            assert slot in log2phy[layer, expert].tolist()
    for a, b in zip(
        (phy2log, log2phy, count), deepkern.rebalance_experts(*call.values()), strict=True
    ):
        assert torch.equal(a, b)


def test_errors():
    with pytest.raises(ValueError, match="num_replicas: expected a multiple of num_gpus = 16"):
        eplb.rebalance_experts(torch.ones(1, 32), 40, 8, 4, 16)
