"""plan_moves: as few moves as any permutation of GPUs needs, and moves that give the placement."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

import deepkern
from deepkern.runtime import native

pytestmark = pytest.mark.skipif(
    native.load("_host")[1] is not None, reason=str(native.load("_host")[1])
)


def gpus_of(slots: list[int], num_gpus: int) -> list[Counter]:
    size = len(slots) // num_gpus
    return [Counter(slots[g * size : (g + 1) * size]) for g in range(num_gpus)]


def permutations(num_gpus: int, num_nodes: int):
    """All permutations of GPUs that keep nodes whole."""
    size = num_gpus // num_nodes
    for nodes in itertools.permutations(range(num_nodes)):
        for inner in itertools.product(itertools.permutations(range(size)), repeat=num_nodes):
            yield [n * size + g for n, order in zip(nodes, inner, strict=True) for g in order]


def fewest(old: list[int], new: list[int], num_gpus: int, num_nodes: int) -> int:
    before, after = gpus_of(old, num_gpus), gpus_of(new, num_gpus)
    return min(
        sum((after[g] - before[to]).total() for g, to in enumerate(order))
        for order in permutations(num_gpus, num_nodes)
    )


CASES = {  # E, (num_replicas, num_groups, num_nodes, num_gpus), nodes that are kept whole
    "one_node": (10, (15, 1, 1, 5), 1),
    "two_nodes": (8, (16, 4, 2, 4), 2),
    "three_nodes": (12, (24, 6, 3, 6), 3),
    "groups_do_not_divide": (7, (12, 3, 2, 6), 1),  # all GPUs are interchangeable
}


@pytest.mark.parametrize(("E", "cluster", "whole"), CASES.values(), ids=CASES)
def test_fewest_moves(E, cluster, whole, seed):
    R, num_groups, num_nodes, num_gpus = cluster
    generator = torch.Generator().manual_seed(seed)
    load = torch.rand(8, E, generator=generator) ** 2
    old = deepkern.rebalance_experts(load, *cluster)[0]
    new = deepkern.rebalance_experts(load * torch.rand(8, E, generator=generator), *cluster)[0]
    phy2log, log2phy, logcnt, moves = deepkern.plan_moves(old, new, num_gpus, num_nodes, num_groups)
    assert_same_placement(phy2log, new, num_gpus, whole)
    for layer in range(8):
        count = (moves[:, 0] == layer).sum().item()
        assert count == fewest(old[layer].tolist(), new[layer].tolist(), num_gpus, whole)
    assert torch.equal(applied(old, moves), phy2log)
    for a, b in zip((log2phy, logcnt), native.host().replicas_of(phy2log.numpy(), E), strict=True):
        assert torch.equal(a, torch.from_numpy(b))
    assert_near_sources(old, moves, num_gpus, num_nodes)


def assert_same_placement(got, new, num_gpus: int, nodes: int) -> None:
    """The same nodes of the same GPUs, in any order."""

    def shape(row):
        gpus = [sorted(gpu.elements()) for gpu in gpus_of(row, num_gpus)]
        size = num_gpus // nodes
        return sorted(sorted(gpus[n * size : (n + 1) * size]) for n in range(nodes))

    assert [shape(row) for row in got.tolist()] == [shape(row) for row in new.tolist()]


def applied(old: torch.Tensor, moves: torch.Tensor) -> torch.Tensor:
    """The placement after all moves."""
    layer, to, source, expert = moves.T
    assert torch.equal(old[layer, source], expert)
    result = old.clone()
    result[layer, to] = expert
    assert len({(a, b) for a, b in zip(layer.tolist(), to.tolist(), strict=True)}) == len(moves)
    return result


def assert_near_sources(old, moves, num_gpus: int, num_nodes: int) -> None:
    size = old.shape[1] // num_gpus
    node = old.shape[1] // num_nodes
    for layer, to, source, expert in moves.tolist():
        holders = [s for s, e in enumerate(old[layer].tolist()) if e == expert]
        for near in (size, node):
            if any(s // near == to // near for s in holders):
                assert source // near == to // near
                break


def test_no_moves_between_equal_placements(seed):
    load = torch.rand(3, 256, generator=torch.Generator().manual_seed(seed))
    old = deepkern.rebalance_experts(load, 288, 8, 4, 32)[0]
    # Permuted nodes, permuted GPUs within nodes, and reversed slots.
    other = old.view(3, 4, 8, 9)[:, [2, 0, 3, 1]][:, :, torch.randperm(8)].flip(3).reshape(3, 288)
    phy2log, *_, moves = deepkern.plan_moves(old, other, 32, 4, 8)
    assert len(moves) == 0 and torch.equal(phy2log, old)


def test_sources_are_balanced():
    """Ten GPUs need an expert that two GPUs have: each sends it five times."""
    old = torch.tensor([[0, 0] + list(range(1, 11))])
    new = torch.tensor([[0] * 2 + [0] * 10])
    moves = deepkern.plan_moves(old, new, 12)[3]
    assert moves[:, 2].bincount().tolist() == [5, 5]


@pytest.mark.parametrize("threads", [2, 7])
def test_same_bits_for_any_num_threads(threads, seed):
    generator = torch.Generator().manual_seed(seed)
    old, new = (torch.rand(9, 288, generator=generator).argsort(1).numpy() for _ in range(2))
    first = native.host().plan_moves(old, new, 288, 1, 1, 32, threads=1)
    for a, b in zip(first, native.host().plan_moves(old, new, 288, 1, 1, 32, threads), strict=True):
        assert (a == b).all()


def test_no_layers():
    empty = torch.zeros(0, 8, dtype=torch.int64)
    phy2log, log2phy, logcnt, moves = deepkern.plan_moves(empty, empty, 4)
    assert phy2log.shape == (0, 8) and moves.shape == (0, 4) and log2phy.shape[0] == 0


@pytest.mark.parametrize(
    ("old", "new", "more", "named", "error"),
    [
        ([[0, 1]], [[0.5, 1]], (2,), "new_phy2log", TypeError),
        ([[0, 1]], [[0, 1, 1, 0]], (2,), "new_phy2log", ValueError),
        ([0, 1], [[0, 1]], (2,), "old_phy2log", ValueError),
        ([[0, -1]], [[0, 0]], (2,), "old_phy2log", ValueError),
        ([[0, 2**62]], [[0, 0]], (2,), "old_phy2log", ValueError),
        ([[0, 1]], [[0, 2]], (2,), "new_phy2log", ValueError),
        ([[0, 0]], [[0, 1]], (2,), "new_phy2log", ValueError),
        ([[0, 1]], [[1, 0]], (3,), "num_gpus", ValueError),
        ([[0, 1]], [[1, 0]], (2, 3), "num_nodes", ValueError),
        ([[0, 1]], [[1, 0]], (0,), "num_gpus", ValueError),
    ],
)
def test_errors_name_the_argument(old, new, more, named, error):
    with pytest.raises(error, match=f"^plan_moves: {named}: expected .*, got "):
        deepkern.plan_moves(torch.tensor(old), torch.tensor(new), *more)
