"""Whether noisy times of one or more runs a side differ: a rank test and its interval.

The Mann-Whitney U test (Mann and Whitney 1947) assumes no distribution: a stall counts as one large
value, however long it is. Go's `benchstat` compares benchmarks with it, too. Its interval is the
Hodges-Lehmann one: order statistics of all differences y - x (Hollander and Wolfe, "Nonparametric
Statistical Methods", chapter 4); exact for up to MOST_EXACT samples. Nothing is drawn at random:
the same samples give the same interval.

The samples of one run share what the machine does during that run, so they do not show by how much
runs differ. With several runs a side the interval is wider by Student's interval of the difference
of the sides' mean medians. The number of runs is small, so the quantile matters: at 1 %, it is 4.6
for 3 runs a side and 3.4 for 5, where the normal distribution's is 2.6. The sum of both half-widths
is more than the errors need, which add in quadrature.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import mpmath
import numpy as np

Samples = Sequence[float] | np.ndarray
Runs = Sequence[Samples]  # the samples of each run of one side

MOST_SERIAL = 0.9  # a larger correlation of a few samples is not distinguishable from a trend
MOST_EXACT = 200  # samples of both sides; counting takes longer, and past 1000 exceeds a float64


class Shift(NamedTuple):
    """How much larger y is than x: the median of all differences, and an interval."""

    estimate: float
    low: float
    high: float

    def widened(self, by: float) -> Shift:
        return Shift(self.estimate, self.low - by, self.high + by)


@functools.cache
def u_counts(n: int, m: int) -> np.ndarray:
    """The number of orders of n + m values in which U is 0 ... n * m: float64 [n * m + 1].

    They are the coefficients of prod_i (1 - q^(m + i)) / (1 - q^i), i = 1 ... n.
    """
    counts = np.ones(1)
    for i in range(1, n + 1):
        product = np.zeros(i * m + 1)
        product[: len(counts)] = counts
        product[m + i :] -= counts[: max(len(counts) - i, 0)]
        for r in range(i):
            product[r::i] = np.cumsum(product[r::i])
        counts = product
    return counts


@functools.cache
def rejected(n: int, m: int, alpha: float) -> int:
    """How many of the least values of U are rejected: their probability is at most alpha / 2."""
    if n + m > MOST_EXACT:
        normal = statistics.NormalDist(n * m / 2, math.sqrt(n * m * (n + m + 1) / 12))
        return max(0, math.floor(normal.inv_cdf(alpha / 2) + 0.5))
    counts = u_counts(n, m)
    return int(np.searchsorted(np.cumsum(counts) / counts.sum(), alpha / 2, side="right"))


@functools.cache
def rounds_needed(alpha: float) -> int:
    """The fewest samples on both sides that can differ significantly."""
    return next(n for n in range(1, 100) if rejected(n, n, alpha))


def serial_correlation(runs: Runs) -> float:
    """The lag-1 correlation of the ranks of successive values of each run, at least 0."""
    ranks = [np.argsort(np.argsort(run)) - (len(run) - 1) / 2 for run in runs]
    products = sum((r[1:] * r[:-1]).sum() for r in ranks) / max(
        sum((r * r).sum() for r in ranks), 1
    )
    return float(np.clip(products, 0, MOST_SERIAL))


@functools.cache
def student_quantile(alpha: float, degrees: int) -> float:
    """Student's t is outside of plus and minus this with the probability alpha."""

    def excess(x: float) -> mpmath.mpf:
        return mpmath.betainc(degrees / 2, 0.5, 0, x, regularized=True) - alpha

    x = mpmath.findroot(excess, (0, 1), solver="bisect", tol=1e-20, verify=False)
    return float(mpmath.sqrt(degrees * (1 / x - 1)))


def between_runs(x: Runs, y: Runs, alpha: float) -> float:
    """Half of the width of Student's interval of the shift of the runs' medians.

    The variance is that of both sides together. 0 with one run on each side, which do not show it.
    """
    sides = [[float(np.median(run)) for run in runs] for runs in (x, y)]
    degrees = sum(len(medians) - 1 for medians in sides)
    if not degrees:
        return 0.0
    variance = sum(len(medians) * float(np.var(medians)) for medians in sides) / degrees
    error = math.sqrt(variance * sum(1 / len(medians) for medians in sides))
    return student_quantile(alpha, degrees) * error


def shift(x: Runs, y: Runs, alpha: float) -> Shift:
    """The shift from x to y; it is outside the interval with a probability of at most alpha.

    Successive samples on a busy machine are correlated. As for the mean of such a series, the
    interval is wider by sqrt((1 + r) / (1 - r)), where r is the larger one of the two sides' lag-1
    correlations within their runs. It is wider by `between_runs`, too. With too few samples the
    interval is infinite.
    """
    pooled = [np.concatenate([np.asarray(run, float) for run in runs]) for runs in (x, y)]
    differences = np.sort(np.subtract.outer(pooled[1], pooled[0]).ravel())
    estimate, tail = float(np.median(differences)), rejected(len(pooled[0]), len(pooled[1]), alpha)
    if not tail:
        return Shift(estimate, -math.inf, math.inf)
    r = max(serial_correlation(x), serial_correlation(y))
    wider = math.sqrt((1 + r) / (1 - r))
    low, high = (wider * (float(differences[i]) - estimate) for i in (tail - 1, -tail))
    return Shift(estimate, estimate + low, estimate + high).widened(between_runs(x, y, alpha))
