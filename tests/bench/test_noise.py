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
    few = noise.shift([[0.0, 0.1, 0.2]], [[1.0, 1.1, 1.2]], 0.05)
    assert few == (1.0, -math.inf, math.inf)


def test_the_interval_covers_the_shift(rng):
    """At most 5 % of intervals miss; Cauchy samples have no mean."""
    missed = 0
    for _ in range(1000):
        x, y = rng.standard_cauchy((2, 15))
        moved = noise.shift([x], [y + 3.0], 0.05)
        missed += not moved.low <= 3.0 <= moved.high
    assert missed <= 75  # 50 expected at most, standard deviation 7


def test_correlated_samples_widen_the_interval(rng):
    """Averages of 3 successive samples; intervals for independent ones miss 5 times as often."""
    missed = {"corrected": 0, "plain": 0}
    for _ in range(500):
        x, y = (np.convolve(rng.standard_normal(22), np.ones(3), "valid") for _ in range(2))
        moved = noise.shift([x], [y], 0.05)
        missed["corrected"] += not moved.low <= 0 <= moved.high
        plain = noise.shift([rng.permutation(x)], [rng.permutation(y)], 0.05)
        missed["plain"] += not plain.low <= 0 <= plain.high
    assert missed["corrected"] < 0.6 * missed["plain"] and missed["corrected"] <= 60, missed


@pytest.mark.parametrize("alpha", [0.05, 1e-4])
def test_many_samples_have_almost_the_exact_limit(alpha, monkeypatch):
    """Past MOST_EXACT samples the normal distribution; it rejects at most as many orders."""
    exact = noise.rejected(150, 155, alpha)
    monkeypatch.setattr(noise, "MOST_EXACT", 100)
    normal = noise.rejected.__wrapped__(150, 155, alpha)
    assert 0.99 * exact < normal <= exact + 1
    assert noise.rejected.__wrapped__(600, 600, alpha) > 0, "no overflow"


@pytest.mark.parametrize(
    ("alpha", "degrees", "quantile"),
    [(0.05, 1, 12.706), (0.01, 4, 4.604), (0.01, 8, 3.355), (0.001, 6, 5.959), (0.05, 30, 2.042)],
)
def test_quantiles_of_the_published_table(alpha, degrees, quantile):
    """Student's t, two-sided."""
    assert noise.student_quantile(alpha, degrees) == pytest.approx(quantile, abs=6e-4)


def test_runs_that_differ_widen_the_interval(rng):
    """Each run has an offset of its own; without `between_runs` most intervals miss."""
    missed = {"runs": 0, "pooled": 0}
    for _ in range(300):
        x, y = (rng.standard_normal((3, 1)) + 0.1 * rng.standard_normal((3, 20)) for _ in range(2))
        moved = noise.shift(x, y, 0.05)
        missed["runs"] += not moved.low <= 0 <= moved.high
        pooled = noise.shift([x.ravel()], [y.ravel()], 0.05)
        missed["pooled"] += not pooled.low <= 0 <= pooled.high
    assert missed["runs"] <= 25, missed  # 15 expected at most, standard deviation 4
    assert missed["pooled"] > 3 * missed["runs"], missed


def test_one_run_a_side_says_nothing_about_runs():
    assert noise.between_runs([[1.0, 2.0]], [[3.0, 5.0]], 0.05) == 0.0
    one = noise.between_runs([[0.0], [2.0]], [[7.0]], 0.05)
    assert one == pytest.approx(12.706 * (2 * 1.5) ** 0.5, rel=1e-3), "variance 2, one degree"
