"""The rank test: compared with enumeration and published tables; its interval's coverage."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from bench import noise


@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 3), (4, 3), (4, 4)])
def test_u_counts_every_order(n, m):
    counts = np.zeros(n * m + 1)
    for places in itertools.combinations(range(n + m), n):
        counts[sum(places) - n * (n - 1) // 2] += 1
    assert np.array_equal(noise.u_counts(n, m), counts)


@pytest.mark.parametrize(("n", "critical"), [(5, 2), (8, 13), (10, 23), (15, 64), (20, 127)])
def test_critical_values_of_the_published_table(n, critical):
    """U at most `critical` is significant at 5 %, two-sided."""
    assert noise.rejected(n, n, 0.05) == critical + 1


def test_rounds_needed():
    for alpha in (0.05, 0.01, 0.01 / 60):
        n = noise.rounds_needed(alpha)
        assert 2 / math.comb(2 * n, n) <= alpha < 2 / math.comb(2 * n - 2, n - 1)
    few = noise.shift([0.0, 0.1, 0.2], [1.0, 1.1, 1.2], 0.05)
    assert few == (1.0, -math.inf, math.inf)


def test_the_interval_covers_the_shift(rng):
    """At most 5 % of intervals miss; Cauchy samples have no mean."""
    missed = 0
    for _ in range(1000):
        x, y = rng.standard_cauchy((2, 15))
        moved = noise.shift(x, y + 3.0, 0.05)
        missed += not moved.low <= 3.0 <= moved.high
    assert missed <= 75  # 50 expected at most, standard deviation 7


def test_correlated_samples_widen_the_interval(rng):
    """Averages of 3 successive samples; intervals for independent ones miss 5 times as often."""
    missed = {"corrected": 0, "plain": 0}
    for _ in range(500):
        x, y = (np.convolve(rng.standard_normal(22), np.ones(3), "valid") for _ in range(2))
        moved = noise.shift(x, y, 0.05)
        missed["corrected"] += not moved.low <= 0 <= moved.high
        plain = noise.shift(rng.permutation(x), rng.permutation(y), 0.05)
        missed["plain"] += not plain.low <= 0 <= plain.high
    assert missed["corrected"] < 0.6 * missed["plain"] and missed["corrected"] <= 60, missed
