"""Every bug planted in mla_prefill and its gradients is found: see test_planted_bugs.py."""

from __future__ import annotations

import pytest
import torch

from bench.emulator import build, sources

from .planted_search import ANY, WRONG, check_is_caught, find_error
from .prefill import backward_of, backward_operands, operands, prefill_of

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

BACKWARD_BUGS = {
    # grad_q.
    "dq_no_wait_for_empty_queries": ANY,
    "dq_no_wait_for_keys": ANY,
    "dq_multiplies_first_keys": WRONG,
    "dq_without_delta": WRONG,
    "dq_no_clearing_of_tail": WRONG,
    "dq_no_fence_after_tail": "no fence_async_proxy followed",
    "dq_releases_keys_early": ANY,
    # grad_k and grad_v.
    "dkv_no_wait_for_empty_keys": ANY,
    "dkv_no_wait_for_queries": ANY,
    "dkv_multiplies_first_rows": WRONG,
    "dkv_no_mask": WRONG,
    "dkv_no_clearing_of_tail": WRONG,
    "dkv_no_fence_after_tail": "no fence_async_proxy followed",
    "dkv_no_wait_for_p": ANY,
    "dkv_no_wait_for_free_p": ANY,
    "dkv_releases_rows_early": ANY,
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


def backward_cases(generator) -> list[tuple]:
    """Several steps and items a block, heads that add to one key, NaN in the next sequence."""
    found = []
    for lengths, keys, size in (((290, 140), (330, 150), {"H": 2, "Hk": 1}),
                                ((270, 9), (200, 9), {"H": 1, "causal": False})):  # fmt: skip
        grad_out, q, k, v, out, lse, *rest = backward_operands(generator, lengths, keys, **size)
        for x, ends in ((grad_out, lengths), (q, lengths), (k, keys)):
            x[ends[0] :] = torch.nan
        found.append((grad_out, q, k, v, out, lse, *rest))
    return found


HOW = {"seeds": 12, "blocks": 2}


@pytest.mark.proof
@pytest.mark.parametrize("bug", BUGS)
def test_bug_is_caught(bug, generator):
    calls = cases(generator)
    check_is_caught(bug, "mla_prefill", BUGS[bug], prefill_of, "mla_prefill", calls, **HOW)


@pytest.mark.proof
@pytest.mark.parametrize("bug", BACKWARD_BUGS)
def test_backward_bug_is_caught(bug, generator):
    want, calls = BACKWARD_BUGS[bug], backward_cases(generator)
    check_is_caught(bug, "mla_prefill", want, backward_of, "mla_prefill_backward", calls, **HOW)


@pytest.mark.proof
def test_correct_kernels_pass_the_search(generator):
    library = build(sources())
    assert find_error(prefill_of(library), "mla_prefill", cases(generator), **HOW) == ""
    calls = backward_cases(generator)
    assert find_error(backward_of(library), "mla_prefill_backward", calls, **HOW) == ""
