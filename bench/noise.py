"""Whether two sets of noisy times differ: a rank test and its interval, exact for few samples.

The Mann-Whitney U test (Mann and Whitney 1947) assumes no distribution: a stall counts as one large
value, however long it is. Go's `benchstat` compares benchmarks with it, too. Its interval is the
Hodges-Lehmann one: order statistics of all differences y - x (Hollander and Wolfe, "Nonparametric
Statistical Methods", chapter 4). Nothing is drawn at random: the same samples give the same
interval.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Samples = Sequence[float] | np.ndarray

MOST_SERIAL = 0.9  # a larger correlation of a few samples is not distinguishable from a trend


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
    counts = u_counts(n, m)
    return int(np.searchsorted(np.cumsum(counts) / counts.sum(), alpha / 2, side="right"))


@functools.cache
def rounds_needed(alpha: float) -> int:
    """The fewest samples on both sides that can differ significantly."""
    return next(n for n in range(1, 100) if rejected(n, n, alpha))


def serial_correlation(values: Samples) -> float:
    """The lag-1 correlation of the ranks of successive values, at least 0."""
    ranks = np.argsort(np.argsort(values)) - (len(values) - 1) / 2
    products = (ranks[1:] * ranks[:-1]).sum() / max((ranks * ranks).sum(), 1)
    return float(np.clip(products, 0, MOST_SERIAL))


def shift(x: Samples, y: Samples, alpha: float) -> Shift:
    """The shift from x to y; it is outside the interval with a probability of at most alpha.

    Successive samples on a busy machine are correlated. As for the mean of such a series, the
    interval is wider by sqrt((1 + r) / (1 - r)), where r is the larger one of the two lag-1
    correlations. With too few samples the interval is infinite.
    """
    differences = np.sort(np.subtract.outer(np.asarray(y), np.asarray(x)).ravel())
    estimate, tail = float(np.median(differences)), rejected(len(x), len(y), alpha)
    if not tail:
        return Shift(estimate, -math.inf, math.inf)
    r = max(serial_correlation(x), serial_correlation(y))
    wider = math.sqrt((1 + r) / (1 - r))
    low, high = float(differences[tail - 1]), float(differences[-tail])
    return Shift(
        estimate, estimate + wider * (low - estimate), estimate + wider * (high - estimate)
    )
