"""gpu_loads and placement_bound: against all placements, in small cases."""

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


CASES = {  # E, (num_replicas, num_groups, num_nodes, num_gpus)
    "2_slots_per_gpu": (3, (6, 1, 1, 3)),
    "3_slots_per_gpu": (4, (6, 1, 1, 2)),
    "1_group_per_node": (4, (6, 2, 2, 2)),
    "2_groups_per_node": (4, (6, 4, 2, 2)),
    "1_slot_per_gpu": (4, (6, 4, 2, 6)),
}


@pytest.mark.parametrize(("E", "cluster"), CASES.values(), ids=CASES)
def test_bound_and_search_by_enumeration(E, cluster, seed):
    generator = torch.Generator().manual_seed(seed)
    load = torch.rand(50, E, generator=generator, dtype=torch.float64) ** 2
    every = torch.tensor(list(placements(E, *cluster)))  # [n, R]
    rows = (row.expand(len(every), E) for row in load)
    best = torch.stack([deepkern.gpu_loads(r, every, cluster[3]).amax(1).min() for r in rows])
    found = deepkern.rebalance_experts(load, *cluster)[0]
    largest = deepkern.gpu_loads(load, found, cluster[3]).amax(1)
    assert (deepkern.placement_bound(load, *cluster) <= best * (1 + 1e-12)).all()
    assert (largest >= best * (1 - 1e-12)).all()
    assert (largest / best).mean() < 1.06
    if cluster[0] == cluster[3]:  # one slot per GPU: the greedy counts of EPLB are optimal
        torch.testing.assert_close(largest, best, rtol=1e-12, atol=0)


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


def test_bound_of_worked_examples():
    # Mean 4; the expert of 12 has at most 3 replicas (R - E + 1): 4; one GPU a node, 2 nodes.
    assert deepkern.placement_bound(torch.tensor([[12, 2, 1, 1]]), 6, 1, 1, 2).item() == 8
    assert deepkern.placement_bound(torch.tensor([[12, 2, 1, 1]]), 6, 1, 1, 6).item() == 4
    # One group per node: the node of 14 has two GPUs. Two groups per node: 12 is paired with 1.
    assert deepkern.placement_bound(torch.tensor([[12, 2, 1, 1]]), 12, 2, 2, 4).item() == 7
    assert deepkern.placement_bound(torch.tensor([[12, 2, 1, 1]]), 12, 4, 2, 4).item() == 6.5
