"""rebalance_experts: valid, never worse than EPLB, deterministic. LoadStatistics: its input."""

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
# (num_replicas, num_groups, num_nodes, num_gpus) for 256 experts.
CASES = [(288, 8, 4, 32), (320, 8, 8, 64), (288, 8, 18, 144)]
CASE_IDS = ["prefill_32_gpus", "decode_64_gpus", "decode_144_gpus"]


def largest_load(load, phy2log, cluster) -> torch.Tensor:
    return deepkern.gpu_loads(load, phy2log, cluster[3]).amax(1)


def assert_valid(got, E: int, cluster) -> None:
    """Checks the definition of a placement by loops over lists."""
    phy2log, log2phy, logcnt = got
    R, num_groups, num_nodes, num_gpus = cluster
    assert [x.dtype for x in got] == [torch.int64] * 3 and phy2log.shape[1] == R
    for slots, inverse, counts in zip(*(x.tolist() for x in got), strict=True):
        assert sorted(set(slots)) == list(range(E)) and len(counts) == E
        for e in range(E):
            own = [slot for slot, expert in enumerate(slots) if expert == e]
            assert counts[e] == len(own)
            assert inverse[e] == own + [-1] * (log2phy.shape[2] - len(own))
        if num_groups % num_nodes == 0:
            size, node = E // num_groups, R // num_nodes
            homes = {(e // size, slot // node) for slot, e in enumerate(slots)}
            assert len(homes) == num_groups, "the experts of a group are on several nodes"
    assert log2phy.shape[2] == max(logcnt.max().item(), 1) if len(logcnt) else True


@st.composite
def clusters(draw):
    """(E, cluster): num_nodes divides num_groups in some and not in others."""
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
    # A replica's share of a subnormal load is not exact to 1e-12.
    value = data.draw(
        st.sampled_from(
            [st.integers(0, 5), st.integers(0, 10**6), st.floats(0, 1e9, allow_subnormal=False)]
        )
    )
    rows = data.draw(st.lists(st.lists(value, min_size=E, max_size=E), min_size=1, max_size=3))
    load = torch.tensor(rows, dtype=torch.float64)
    got = deepkern.rebalance_experts(load, *cluster)
    assert_valid(got, E, cluster)
    eplb = reference.rebalance_experts(load, *cluster)
    assert_valid(eplb, E, cluster)
    largest = largest_load(load, got[0], cluster)
    # 1e-12 for the order of sums.
    assert (largest <= largest_load(load, eplb[0], cluster) * (1 + 1e-12)).all()
    assert (largest >= deepkern.placement_bound(load, *cluster) * (1 - 1e-12)).all()


LOADS = {
    "uniform": lambda u: u,
    "skewed": lambda u: u**3,
    "exponential": lambda u: -(1 - u).log(),
    "zipf": lambda u: 1 / (1 + u.argsort(1)),
    "tokens": lambda u: (u * u * 1000).floor(),
}


@needs_host
@pytest.mark.parametrize("shape", LOADS)
@pytest.mark.parametrize("cluster", CASES, ids=CASE_IDS)
def test_deepseek_clusters(cluster, shape, seed):
    u = torch.rand(6, 256, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    load = LOADS[shape](u)
    got, eplb = (
        f(load, *cluster) for f in (deepkern.rebalance_experts, reference.rebalance_experts)
    )
    assert_valid(got, 256, cluster)
    ours, theirs = largest_load(load, got[0], cluster), largest_load(load, eplb[0], cluster)
    assert (ours <= theirs * (1 + 1e-12)).all()
    if cluster[1] % cluster[2] == 0:  # with several slots per GPU, EPLB is not optimal
        assert ours.mean() < theirs.mean()
        if shape != "zipf":  # one expert exceeds a node; the bound is not sharp
            assert (ours <= deepkern.placement_bound(load, *cluster) * 1.02).all()


@needs_host
def test_pairs_are_packed_optimally():
    """Two slots per GPU and no spare replicas: the largest goes with the smallest, and so on."""
    load = torch.rand(5, 64, dtype=torch.float64)
    ordered = load.sort(1).values
    best = (ordered + ordered.flip(1)).amax(1)
    got = deepkern.rebalance_experts(load, 64, 1, 1, 32)
    torch.testing.assert_close(largest_load(load, got[0], (64, 1, 1, 32)), best, rtol=1e-12, atol=0)


def test_example_of_deepseek():
    """The placement in the readme of https://github.com/deepseek-ai/EPLB, GPU by GPU."""
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
        # Two experts of equal load may be exchanged: compare the experts of each GPU.
        return sorted(sorted(row[i : i + 2]) for i in range(0, 16, 2))

    assert [gpus(row) for row in got.tolist()] == [gpus(row) for row in want]


@needs_host
@pytest.mark.parametrize("cluster", CASES, ids=CASE_IDS)
def test_same_bits_for_any_num_threads(cluster, seed):
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
        (8, (8, 1, 1, 8)),
        (8, (8, 4, 2, 4)),
        (5, (12, 5, 3, 12)),
        (1, (6, 1, 1, 3)),
        (6, (6, 6, 6, 6)),
        (12, (24, 12, 2, 4)),
    ],
    ids=["1_slot_per_gpu", "no_spares", "groups_do_not_divide", "1_expert", "6_nodes", "6_groups"],
)
def test_edge_cases(E, cluster):
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
def test_scaled_by_a_power_of_two(seed):
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


# LoadStatistics


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


def test_plan_follows_the_load():
    """The expert with the most recent load gets the spare replicas."""
    statistics = deepkern.LoadStatistics(1, 8, half_life=10)
    for step in range(200):
        tokens = torch.full((8,), 10)
        tokens[2 if step < 100 else 5] = 1000
        statistics.update(0, tokens)
    logcnt = deepkern.rebalance_experts(statistics.load, 12, 1, 1, 4)[2]
    assert logcnt[0].argmax() == 5 and logcnt[0, 5] >= 4 and logcnt[0, 2] == 1


def test_errors_of_load_statistics():
    statistics = deepkern.LoadStatistics(2, 3, half_life=2)
    for wrong, named in (
        (lambda: deepkern.LoadStatistics(2, 3, half_life=0), "half_life"),
        (lambda: statistics.update(2, torch.ones(3)), "layer"),
        (lambda: statistics.update(0, torch.ones(4)), "tokens_per_expert"),
    ):
        with pytest.raises(ValueError, match=f"^LoadStatistics: {named}: expected .*, got "):
            wrong()
