"""choose_replicas and nearest_replicas: valid slots, even distribution, independent tokens."""

from __future__ import annotations

import pytest
import torch

import deepkern

CLUSTER = (24, 4, 2, 8)  # 3 slots a GPU, 4 GPUs a node


@pytest.fixture
def placement(device, seed) -> tuple[torch.Tensor, ...]:
    """phy2log [L, R], log2phy [L, 16, X], logcnt [L, 16] on the test's device."""
    load = torch.rand(5, 16, generator=torch.Generator().manual_seed(seed)) ** 3
    return tuple(x.to(device) for x in deepkern.rebalance_experts(load, *CLUSTER))


def test_slots_hold_the_chosen_experts(placement, generator):
    phy2log, log2phy, logcnt = placement
    idx = torch.randint(-2, 18, (500, 4), generator=generator, device=generator.device)
    idx[0] = torch.tensor([-(2**63), 2**63 - 1, 16, 2**32])
    valid = (idx >= 0) & (idx < 16)
    for layer in range(5):
        slot = deepkern.choose_replicas(idx, log2phy[layer], logcnt[layer])
        assert slot.dtype == torch.int64 and slot.shape == idx.shape
        assert ((slot >= 0) == valid).all() and (slot < 24).all()
        assert torch.equal(phy2log[layer][slot[valid]], idx[valid])


@pytest.mark.parametrize("stride", [1, 2, 3, 7, 8, 64])
def test_even_distribution(stride, device):
    """Every n-th token goes to an expert with 1 to 9 replicas."""
    count = torch.arange(1, 10, device=device)
    slots = torch.arange(81, device=device).view(9, 9)
    log2phy = slots.where(torch.arange(9, device=device) < count[:, None], -1)
    idx = torch.full((4096 * stride, 1), -1, device=device)
    for expert in range(9):
        idx[::stride] = expert
        slot = deepkern.choose_replicas(idx, log2phy, count)[::stride, 0]
        parts = (slot - 9 * expert).bincount(minlength=9)
        assert parts.sum() == 4096 and (parts[expert + 1 :] == 0).all()
        assert (parts[: expert + 1] - 4096 / (expert + 1)).abs().max() < 0.02 * 4096


def test_offset_distributes_small_batches(device):
    """One token on each of 64 ranks: with different offsets, two replicas get about half each."""
    idx = torch.zeros(1, 1, dtype=torch.int64, device=device)
    log2phy, logcnt = torch.tensor([[0, 1]], device=device), torch.tensor([2], device=device)
    parts = [0, 0]
    for rank in range(64):
        parts[deepkern.choose_replicas(idx, log2phy, logcnt, rank).item()] += 1
        on_device = torch.tensor(rank, device=device)
        assert parts[deepkern.choose_replicas(idx, log2phy, logcnt, on_device).item()] > 0
    assert min(parts) > 28


def test_choice_independent_of_batch(placement, generator):
    """A choice depends on the index of the token, offset included, not on the other tokens."""
    _, log2phy, logcnt = placement
    idx = torch.randint(0, 16, (300, 3), generator=generator, device=generator.device)
    whole = deepkern.choose_replicas(idx, log2phy[0], logcnt[0])
    part = deepkern.choose_replicas(idx[100:117], log2phy[0], logcnt[0], 100)
    assert torch.equal(part, whole[100:117])
    narrow = idx.int().t().contiguous().t()
    assert torch.equal(deepkern.choose_replicas(narrow, log2phy[0], logcnt[0]), whole)


def test_compile_fullgraph(placement):
    """A synchronization with the device would break the graph."""
    _, log2phy, logcnt = placement
    idx = torch.arange(16, device=log2phy.device).view(8, 2)
    compiled = torch.compile(deepkern.choose_replicas, fullgraph=True, backend="aot_eager")
    want = deepkern.choose_replicas(idx, log2phy[0], logcnt[0], 5)
    assert torch.equal(compiled(idx, log2phy[0], logcnt[0], 5), want)


def test_empty(device):
    none = torch.zeros(0, 3, dtype=torch.int64, device=device)
    replicas = (
        torch.zeros(4, 2, dtype=torch.int64, device=device),
        torch.ones(4, device=device).long(),
    )
    assert deepkern.choose_replicas(none, *replicas).shape == (0, 3)
    no_experts = torch.zeros(0, 2, dtype=torch.int64, device=device), replicas[1][:0]
    idx = torch.tensor([[0, 1]], device=device)
    assert deepkern.choose_replicas(idx, *no_experts).tolist() == [[-1, -1]]


def test_nearest_replicas(placement):
    """Against a Python loop over all replicas."""
    _, log2phy, logcnt = placement
    R, _, num_nodes, num_gpus = CLUSTER
    slots, node = R // num_gpus, R // num_nodes
    for gpu in range(num_gpus):
        near, count = deepkern.nearest_replicas(log2phy, logcnt, gpu, R, num_gpus, num_nodes)
        assert near.shape == log2phy.shape
        for layer in range(5):
            for e in range(16):
                every = [s for s in log2phy[layer, e].tolist() if s >= 0]
                on_gpu = [s for s in every if s // slots == gpu]
                on_node = [s for s in every if s // node == gpu * slots // node]
                want = on_gpu or on_node or every
                assert near[layer, e].tolist() == want + [-1] * (near.shape[2] - len(want))
                assert count[layer, e] == len(want)


def test_errors_name_the_argument(placement):
    _, log2phy, logcnt = (x[0] for x in placement)
    idx = torch.zeros(3, 2, dtype=torch.int64, device=log2phy.device)
    for args, named, error in (
        ((idx.float(), log2phy, logcnt), "topk_idx", TypeError),
        ((idx, log2phy[0], logcnt), "log2phy", ValueError),
        ((idx, log2phy, logcnt[1:]), "logcnt", ValueError),
        ((idx, log2phy, logcnt.int()), "logcnt", TypeError),
    ):
        with pytest.raises(error, match=f"^choose_replicas: {named}: expected .*, got "):
            deepkern.choose_replicas(*args)
    for args, named in (
        ((8, 24, 8, 2), "gpu"),
        ((0, 24, 7), "num_gpus"),
        ((0, 24, 8, 3), "num_nodes"),
    ):
        with pytest.raises(ValueError, match=f"^nearest_replicas: {named}: expected .*, got "):
            deepkern.nearest_replicas(log2phy, logcnt, *args)
