"""gpu_loads and placement_bound: against every placement there is, in small cases."""

from __future__ import annotations

import itertools

import pytest
import torch

import deepkern


def placements(E: int, R: int, num_groups: int, num_nodes: int, num_gpus: int):
    """All placements, slot by slot."""
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    for slots in itertools.product(range(E), repeat=R):
        homes = {(e * num_groups // E, s * num_nodes // R) for s, e in enumerate(slots)}
        groups_of = [sum(node == n for _, node in homes) for n in range(num_nodes)]
        alike = groups_of == [num_groups // num_nodes] * num_nodes
        if len(set(slots)) == E and len(homes) == num_groups and alike:
            yield slots


CASES = [
    (3, (6, 1, 1, 3)),  # 2 slots a GPU
    (4, (6, 1, 1, 2)),  # 3 slots
    (4, (6, 2, 2, 2)),  # a group a node
    (4, (6, 4, 2, 2)),  # two groups a node
    (4, (6, 4, 2, 6)),  # one slot a GPU
]


@pytest.mark.parametrize(("E", "cluster"), CASES)
def test_bound_and_search_against_all_placements(E, cluster, seed):
    generator = torch.Generator().manual_seed(seed)
    load = torch.rand(50, E, generator=generator, dtype=torch.float64) ** 2
    every = torch.tensor(list(placements(E, *cluster)))  # [n, R]
    rows = (row.expand(len(every), E) for row in load)
    best = torch.stack([deepkern.gpu_loads(r, every, cluster[3]).amax(1).min() for r in rows])
    found = deepkern.rebalance_experts(load, *cluster)[0]
    held = deepkern.gpu_loads(load, found, cluster[3]).amax(1)
    assert (deepkern.placement_bound(load, *cluster) <= best * (1 + 1e-12)).all()
    assert (held >= best * (1 - 1e-12)).all()
    assert (held / best).mean() < 1.06
    if cluster[0] == cluster[3]:  # a slot a GPU: to count as EPLB does is the best there is
        torch.testing.assert_close(held, best, rtol=1e-12, atol=0)


def test_gpu_loads():
    load = torch.tensor([[6.0, 4.0, 1.0]])
    phy2log = torch.tensor([[0, 1, 0, 2, 0, 0]])
    got = deepkern.gpu_loads(load, phy2log, 3)
    assert got.tolist() == [[5.5, 2.5, 3.0]]
    for wrong, named in (
        ((load, phy2log, 4), "num_gpus"),
        ((load, phy2log, 0), "num_gpus"),
        ((-load, phy2log, 3), "load"),
        ((load, phy2log[0], 3), "phy2log"),
        ((load, phy2log.expand(2, 6), 3), "phy2log"),
        ((load, phy2log + 1, 3), "phy2log"),
        ((load, phy2log - 1, 3), "phy2log"),
        ((load, phy2log.int(), 3), "phy2log"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^gpu_loads: {named}: expected .* got "):
            deepkern.gpu_loads(*wrong)


def test_bound_by_hand():
    # Mean 4; the expert of 12 has at most 3 replicas (R - E + 1): 4; one GPU a node, 2 nodes.
    assert deepkern.placement_bound(torch.tensor([[12, 2, 1, 1]]), 6, 1, 1, 2).item() == 8
    assert deepkern.placement_bound(torch.tensor([[12, 2, 1, 1]]), 6, 1, 1, 6).item() == 4
    # A group to a node: the node of 14 has two GPUs. Two groups to a node: 12 with 1 beside it.
    assert deepkern.placement_bound(torch.tensor([[12, 2, 1, 1]]), 12, 2, 2, 4).item() == 7
    assert deepkern.placement_bound(torch.tensor([[12, 2, 1, 1]]), 12, 4, 2, 4).item() == 6.5
