"""Every bug planted in mla_prefill's kernels is found: see test_planted_bugs.py."""

from __future__ import annotations

import re

import pytest
import torch

import deepkern
from bench.emulator import build, sources
from deepkern.testing import compare

from .conftest import EmulatorFailure, planted
from .prefill import PrefillFunction, operands, prefill_of
from .test_planted_bugs import ANY, WRONG

# Hook -> regular expression of the expected error.
BUGS = {
    # Producer.
    "one_warp_releases_queries": ANY,
    "announces_too_few_rows": ANY,
    "keys_of_head_0": WRONG,
    "no_wait_for_empty_queries": ANY,
    "prefill_producer_keeps_registers": "deadlock",
    # Products.
    "no_wait_for_query_tile": ANY,
    "no_wait_for_values": ANY,
    "values_of_first_keys": WRONG,
    "no_wait_for_prefill_scores": ANY,
    "releases_values_early": ANY,
    "rescales_before_pv_ends": ANY,
    "queries_not_released": "deadlock",
    # Softmax, masks, the end of a sequence.
    "prefill_sum_not_rescaled": WRONG,
    "no_prefill_mask": WRONG,
    "no_mask_after_first_step": WRONG,
    "no_clearing_of_value_tail": WRONG,
    "no_fence_after_value_tail": "no fence_async_proxy followed",
    "no_wait_after_value_tail": ANY,
    "stores_queries_of_next_sequence": ANY,
}


def cases(generator) -> list[tuple]:
    """Several items a block; masks in several steps; the next sequence's values are NaN."""
    found = []
    for lengths, keys, size in (((300, 140), (470, 150), {"H": 2, "Hk": 2}),
                                ((130,), (300,), {"H": 3, "Hk": 1, "causal": False}),
                                ((200, 100), (290, 30), {"H": 1})):  # fmt: skip
        q, k, v, *rest = operands(generator, lengths, keys, **size)
        q[..., 0] *= 30  # the row maximum changes from step to step
        v[keys[0] :] = torch.nan
        found.append((q, k, v, *rest))
    return found


def find_error(prefill: PrefillFunction, generator) -> str:
    """The first error that the emulator or a comparison finds, or an empty string."""
    calls = [(args, deepkern.reference.mla_prefill(*args)) for args in cases(generator)]
    for seed in range(12):
        for args, exact in calls:
            order = ("random", "earliest", "latest")[seed % 3]
            try:
                got = prefill(*args, seed=seed, order=order, blocks=2)
                compare.assert_matches("mla_prefill", got, exact)
            except EmulatorFailure as failure:
                return str(failure)
            except compare.Mismatch:
                return WRONG
    return ""


@pytest.mark.proof
@pytest.mark.parametrize("bug", BUGS)
def test_bug_is_caught(bug, generator):
    with planted(bug, "mla_prefill") as library:
        found = find_error(prefill_of(library), generator)
    assert re.search(BUGS[bug], found, re.DOTALL), f"expected {BUGS[bug]!r}, found {found!r}"


@pytest.mark.proof
def test_correct_kernel_passes_the_search(generator):
    assert find_error(prefill_of(build(sources())), generator) == ""
