"""Conversions and 16-bit arithmetic of csrc/ptx/numbers.h against a table of all values."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from numpy import ndarray

from tests.compiled.operands import (
    FORMATS,
    finite_values,
    library,
    pointer,
)

NANS = {"f16": 0x7FFF, "bf16": 0x7FFF, "tf32": 0x3FFFF, "e4m3": 0x7F, "e5m2": 0x7F, "e3m2": 0x1F,
        "e2m3": 0x1F, "e2m1": 0x7}  # fmt: skip
ROUNDINGS = ("rn", "rz", "rm", "rp", "rna")


def rounded(x: ndarray, name: str, rounding: str, saturate: bool) -> ndarray:
    """Codes of finite x: a search in the table of all values."""
    values = finite_values(name)
    step = values[-1] - values[-2]
    table = np.append(values, values[-1] + step)  # the first value past the largest
    magnitude, negative = np.abs(x), np.signbit(x)
    low = np.searchsorted(table, magnitude, side="right") - 1
    high = np.minimum(low + (table[low] < magnitude), len(values))
    below, above = magnitude - table[low], table[high] - magnitude
    nearest = np.where(below < above, low, high)
    tie = below == above
    even = np.where(low % 2 == 0, low, high)
    chosen = {"rn": np.where(tie, even, nearest), "rna": np.where(tie, high, nearest), "rz": low,
              "rm": np.where(negative, high, low), "rp": np.where(negative, low, high)}  # fmt: skip
    codes = chosen[rounding]
    beyond = codes >= len(values)
    towards_zero = {"rz": True, "rm": ~negative, "rp": negative}.get(rounding, False)
    limit = len(values) - 1
    infinity = limit + 1 if FORMATS[name][3] or name == "e4m3" else limit
    codes = np.where(beyond, np.where(saturate | towards_zero, limit, infinity), codes)
    sign = 1 << FORMATS[name][1] + FORMATS[name][2]
    return (codes + np.where(negative, sign, 0)).astype(np.uint32)


@pytest.mark.parametrize("saturate", [False, True], ids=["", "satfinite"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", FORMATS)
def test_conversion_rounds_to_a_neighbour(
    rng: np.random.Generator, name: str, rounding: str, saturate: bool
):
    values, count = finite_values(name), 20_000
    i = rng.integers(0, len(values) - 1, count)
    between = values[i] + (values[i + 1] - values[i]) * rng.choice([0, 0.5, 0.25, 0.75], count)
    any_size = 2.0 ** rng.uniform(np.log2(values[1]) - 4, np.log2(values[-1]) + 2, count)
    edges = values[-1] * np.array([1, 1 + 1e-9, 1.02, 1.04, 1.07, 1.13, 1.2, 1.5, 4])
    x = np.concatenate([between, any_size, edges, [0.0]])
    x *= rng.choice([-1, 1], len(x))
    codes = np.empty(len(x), np.uint32)
    index = FORMATS[name][0]
    library().deepkern_ptx_test_encode(
        pointer(x), len(x), index, ROUNDINGS.index(rounding), saturate, pointer(codes)
    )
    assert codes.tolist() == rounded(x, name, rounding, saturate).tolist()


@pytest.mark.parametrize("name", FORMATS)
def test_conversion_of_infinity_and_nan(name: str):
    x, codes = np.array([np.inf, -np.inf, np.nan, -np.nan]), np.empty(4, np.uint32)
    library().deepkern_ptx_test_encode(pointer(x), 4, FORMATS[name][0], 0, 1, pointer(codes))
    largest = len(finite_values(name)) - 1
    sign = 1 << FORMATS[name][1] + FORMATS[name][2]
    assert codes.tolist() == [largest, largest + sign, NANS[name], NANS[name]]


@pytest.mark.parametrize("name", ["bf16", "f16"])
def test_16_bit_fma_rounds_once(rng: np.random.Generator, name: str):
    values, count = finite_values(name), 3000
    index = rng.integers(0, len(values), (3, count))
    # Addends near half of the last bit of the product make ties and near-ties.
    if name == "bf16":
        index[:2] = rng.integers(100 << 7, 140 << 7, (2, count))
        index[2] = (index[0] >> 7) + (index[1] >> 7) - 127 + rng.integers(-12, 12, count) << 7
        # An odd number of 8 bits times 1.5 is a tie; an addend below 2^-53 of it decides.
        ties = slice(count // 2)
        index[0, ties] = (index[0, ties] & ~127) + rng.integers(0, 21, count // 2) * 2 + 1
        index[1, ties] = index[1, ties] & ~127 | 64
        index[2, ties] = index[2, ties] - (60 << 7)
    negative = rng.integers(0, 2, (3, count))
    codes = (index + (negative << 15)).astype(np.uint16)
    d = np.empty(count, np.uint16)
    library().deepkern_ptx_test_fma(
        *(pointer(c) for c in codes), count, ("bf16", "f16").index(name), pointer(d)
    )
    for i in range(count):
        a, b, c = (Fraction(values[k]) * (1 - 2 * int(n))
                   for k, n in zip(index[:, i], negative[:, i], strict=True))  # fmt: skip
        exact = a * b + c
        if exact == 0:
            continue  # the sign of a zero sum is the default rounding's
        error = [abs(abs(exact) - Fraction(v)) for v in _near(values, float(abs(exact)))]
        got = int(d[i]) & 0x7FFF
        if abs(exact) >= Fraction(values[-1]) + Fraction(values[-1] - values[-2]) / 2:
            assert got == len(values)
            continue
        best = abs(abs(exact) - Fraction(values[got]))
        assert best == min(error), (codes[:, i], d[i])
        assert error.count(best) == 1 or got % 2 == 0, (codes[:, i], d[i])
        assert (d[i] >> 15 == 1) == (exact < 0)


def _near(values: ndarray, x: float) -> ndarray:
    i = int(np.searchsorted(values, x))
    return values[max(i - 2, 0) : i + 2]
