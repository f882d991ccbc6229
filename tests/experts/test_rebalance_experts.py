"""rebalance_experts: every placement is valid, none worse than EPLB's, the same bits every time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deepkern
from deepkern import reference
from deepkern.runtime import native

needs_host = pytest.mark.skipif(
    native.load("_host")[1] is not None, reason=str(native.load("_host")[1])
)
# (num_replicas, num_groups, num_nodes, num_gpus) for 256 experts: DeepSeek's prefill and decode.
CASES = [(288, 8, 4, 32), (320, 8, 8, 64), (288, 8, 18, 144)]


def fullest(load, phy2log, cluster) -> torch.Tensor:
    return deepkern.gpu_loads(load, phy2log, cluster[3]).amax(1)


def assert_valid(got, E: int, cluster) -> None:
    """By loops over the lists: what makes a placement one."""
    phy2log, log2phy, logcnt = got
    R, num_groups, num_nodes, num_gpus = cluster
    assert [x.dtype for x in got] == [torch.int64] * 3 and phy2log.shape[1] == R
    for slots, inverse, counts in zip(*(x.tolist() for x in got), strict=True):
        assert sorted(set(slots)) == list(range(E)) and len(counts) == E
        for e in range(E):
            mine = [slot for slot, expert in enumerate(slots) if expert == e]
            assert counts[e] == len(mine)
            assert inverse[e] == mine + [-1] * (log2phy.shape[2] - len(mine))
        if num_groups % num_nodes == 0:
            size, node = E // num_groups, R // num_nodes
            homes = {(e // size, slot // node) for slot, e in enumerate(slots)}
            assert len(homes) == num_groups, "the experts of a group are on several nodes"
    assert log2phy.shape[2] == max(logcnt.max().item(), 1) if len(logcnt) else True


@st.composite
def clusters(draw):
    """(E, cluster), with groups that fit the nodes and groups that do not."""
    num_nodes, gpus = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    num_groups = num_nodes * draw(st.integers(1, 4)) if draw(st.booleans()) else 5
    E = num_groups * draw(st.integers(1, 3))
    num_gpus = num_nodes * gpus
    slots = -(-E // num_gpus) + draw(st.integers(0, 3))
    return E, (slots * num_gpus, num_groups, num_nodes, num_gpus)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_valid_and_never_worse(data):
    E, cluster = data.draw(clusters())
    value = data.draw(
        st.sampled_from([st.integers(0, 5), st.integers(0, 10**6), st.floats(0, 1e9)])
    )
    rows = data.draw(st.lists(st.lists(value, min_size=E, max_size=E), min_size=1, max_size=3))
    load = torch.tensor(rows, dtype=torch.float64)
    got = deepkern.rebalance_experts(load, *cluster)
    assert_valid(got, E, cluster)
    eplb = reference.rebalance_experts(load, *cluster)
    assert_valid(eplb, E, cluster)
    held = fullest(load, got[0], cluster)
    # The sums are rounded in another order, and that is all.
    assert (held <= fullest(load, eplb[0], cluster) * (1 + 1e-12)).all()
    assert (held >= deepkern.placement_bound(load, *cluster) * (1 - 1e-12)).all()


LOADS = {
    "uniform": lambda u: u,
    "skewed": lambda u: u**3,
    "exponential": lambda u: -(1 - u).log(),
    "zipf": lambda u: 1 / (1 + u.argsort(1)),
    "tokens": lambda u: (u * u * 1000).floor(),
}


@needs_host
@pytest.mark.parametrize("shape", LOADS)
@pytest.mark.parametrize("cluster", CASES)
def test_deepseek_clusters(cluster, shape, seed):
    u = torch.rand(6, 256, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    load = LOADS[shape](u)
    got, eplb = (
        f(load, *cluster) for f in (deepkern.rebalance_experts, reference.rebalance_experts)
    )
    assert_valid(got, 256, cluster)
    ours, theirs = fullest(load, got[0], cluster), fullest(load, eplb[0], cluster)
    assert (ours <= theirs * (1 + 1e-12)).all()
    if cluster[1] % cluster[2] == 0:  # where GPUs have several slots, EPLB leaves room
        assert ours.mean() < theirs.mean()
        if shape != "zipf":  # one expert is more than a node can spread; the bound is not sharp
            assert (ours <= deepkern.placement_bound(load, *cluster) * 1.02).all()


@needs_host
def test_pairs_are_packed_as_well_as_they_can_be():
    """Two slots a GPU and nothing to replicate: the largest beside the smallest, and so on."""
    load = torch.rand(5, 64, dtype=torch.float64)
    ordered = load.sort(1).values
    best = (ordered + ordered.flip(1)).amax(1)
    got = deepkern.rebalance_experts(load, 64, 1, 1, 32)
    torch.testing.assert_close(fullest(load, got[0], (64, 1, 1, 32)), best, rtol=1e-12, atol=0)


def test_example_of_deepseek():
    """From the readme of https://github.com/deepseek-ai/EPLB: its placement, GPU by GPU."""
    load = torch.tensor(
        [
            [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
            [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
        ]
    )
    want = [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    got = reference.rebalance_experts(load, 16, 4, 2, 8)[0]

    def gpus(row):
        # Two experts of equal share may change places: compare what GPUs hold.
        return sorted(sorted(row[i : i + 2]) for i in range(0, 16, 2))

    assert [gpus(row) for row in got.tolist()] == [gpus(row) for row in want]


@needs_host
@pytest.mark.parametrize("cluster", CASES)
def test_same_bits_with_any_number_of_threads(cluster, seed):
    load = np.random.default_rng(seed).random((40, 256)) ** 3
    host = native.host()
    first = host.rebalance_experts(load, *cluster, threads=1)
    for threads in (2, 3, 64, 0):
        np.testing.assert_array_equal(host.rebalance_experts(load, *cluster, threads), first)
    alone = host.rebalance_experts(load[7:8], *cluster)
    np.testing.assert_array_equal(alone, first[7:8])


@pytest.mark.parametrize(
    ("E", "cluster"),
    [
        (8, (8, 1, 1, 8)),  # E = R = GPUs
        (8, (8, 4, 2, 4)),  # nothing to replicate
        (5, (12, 5, 3, 12)),  # a slot a GPU, groups that fit no nodes
        (1, (6, 1, 1, 3)),  # one expert, everywhere
        (6, (6, 6, 6, 6)),
        (12, (24, 12, 2, 4)),  # six groups to a node
    ],
)
def test_edges(E, cluster):
    one_hot = torch.zeros(E)
    one_hot[E // 2] = 1
    load = torch.stack(
        [torch.zeros(E), torch.ones(E), one_hot, torch.arange(E) * 1e-300, torch.full((E,), 3e38)]
    ).double()
    got = deepkern.rebalance_experts(load, *cluster)
    assert_valid(got, E, cluster)
    if cluster[1] % cluster[2] or cluster[2] == 1:
        assert got[2][2, E // 2] == cluster[0] - E + 1, "all spare replicas to the only loaded one"


@needs_host
def test_a_power_of_two_changes_nothing(seed):
    load = torch.rand(3, 256, generator=torch.Generator().manual_seed(seed)).double()
    want = deepkern.rebalance_experts(load, *CASES[0])[0]
    for factor in (2.0**1000, 2.0**-900):
        assert torch.equal(deepkern.rebalance_experts(load * factor, *CASES[0])[0], want)
    largest = torch.full((2, 256), torch.finfo(torch.float64).max, dtype=torch.float64)
    assert_valid(deepkern.rebalance_experts(largest, *CASES[0]), 256, CASES[0])


def test_no_layers():
    phy2log, log2phy, logcnt = deepkern.rebalance_experts(torch.zeros(0, 8), 16, 4, 2, 4)
    assert phy2log.shape == (0, 16) and log2phy.shape == (0, 8, 1) and logcnt.shape == (0, 8)


def test_any_dtype_and_device(device, seed):
    load = torch.randint(0, 200, (2, 16), generator=torch.Generator().manual_seed(seed))
    want = deepkern.rebalance_experts(load, 24, 4, 2, 8)
    for same in (load.to(device), load.numpy(), load.float(), load.half(), load.numpy().T.copy().T):
        for a, b in zip(deepkern.rebalance_experts(same, 24, 4, 2, 8), want, strict=True):
            assert a.device.type == "cpu" and torch.equal(a, b)
    assert (load >= 0).all(), "the load is only read"


def test_without_the_native_planner(monkeypatch):
    def absent():
        raise ImportError("deepkern._host was not built: install g++")

    monkeypatch.setattr(native, "host", absent)
    load = torch.rand(2, 16)
    with pytest.warns(RuntimeWarning, match="rebalance_experts: deepkern._host was not built"):
        got = deepkern.rebalance_experts(load, 24, 4, 2, 8)
    for a, b in zip(got, reference.rebalance_experts(load, 24, 4, 2, 8), strict=True):
        assert torch.equal(a, b)


GOOD = {
    "load": torch.ones(2, 16),
    "num_replicas": 24,
    "num_groups": 4,
    "num_nodes": 2,
    "num_gpus": 8,
}


@pytest.mark.parametrize(
    ("wrong", "named", "error"),
    [
        ({"load": [[1.0]]}, "load", TypeError),
        ({"load": torch.ones(2, 16, dtype=torch.bool)}, "load", TypeError),
        ({"load": torch.ones(2, 16, dtype=torch.complex64)}, "load", TypeError),
        ({"load": np.full((2, 16), "1")}, "load", TypeError),
        ({"load": torch.ones(16)}, "load", ValueError),
        ({"load": torch.ones(2, 0)}, "load", ValueError),
        ({"load": torch.full((2, 16), float("nan"))}, "load", ValueError),
        ({"load": torch.full((2, 16), float("inf"))}, "load", ValueError),
        ({"load": -torch.ones(2, 16, dtype=torch.int32)}, "load", ValueError),
        ({"num_replicas": 8}, "num_replicas", ValueError),
        ({"num_replicas": 25}, "num_replicas", ValueError),
        ({"num_replicas": 24.0}, "num_replicas", TypeError),
        ({"num_replicas": 2**40}, "num_replicas", ValueError),
        ({"num_groups": 6}, "num_groups", ValueError),
        ({"num_nodes": 0}, "num_nodes", ValueError),
        ({"num_groups": 0}, "num_groups", ValueError),
        ({"num_gpus": -8}, "num_gpus", ValueError),
        ({"num_nodes": 4, "num_gpus": 6}, "num_gpus", ValueError),
    ],
)
def test_errors_name_the_argument(wrong, named, error):
    with pytest.raises(error) as caught:
        deepkern.rebalance_experts(**GOOD | wrong)
    message = str(caught.value)
    assert message.startswith(f"rebalance_experts: {named}: expected "), message
    assert ", got " in message
