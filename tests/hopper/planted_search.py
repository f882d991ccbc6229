"""The search for a planted bug: a kernel in adversarial schedules, compared with the oracle."""

from __future__ import annotations

import re
from collections.abc import Callable

import deepkern
from deepkern.testing import compare

from .conftest import EmulatorFailure, planted

WRONG = "wrong result"
ANY = "."  # a race: the schedule decides which error comes first


def find_error(run: Callable, op: str, calls: list[tuple], seeds: int = 20, **how) -> str:
    """The first error that the emulator or a comparison finds, or an empty string."""
    want = [getattr(deepkern.reference, op)(*args) for args in calls]
    for seed in range(seeds):
        order = ("random", "earliest", "latest")[seed % 3]
        for args, exact in zip(calls, want, strict=True):
            try:
                compare.assert_matches(op, run(*args, seed=seed, order=order, **how), exact)
            except EmulatorFailure as failure:
                return str(failure)
            except compare.Mismatch:
                return WRONG
    return ""


def check_is_caught(
    bug: str, kernel: str, expected: str, run_of: Callable, op: str, calls: list[tuple], **how
) -> None:
    """Compiles `kernel` with the bug; the search must find an error that matches `expected`."""
    with planted(bug, kernel) as library:
        found = find_error(run_of(library), op, calls, **how)
    assert re.search(expected, found, re.DOTALL), f"expected {expected!r}, found {found!r}"
