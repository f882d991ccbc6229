"""Every bug planted in the sparse kernels of mla_decode.cuh is found: see test_planted_bugs.py."""

from __future__ import annotations

import pytest
import torch

import deepkern

from .conftest import sparse_of
from .planted_search import ANY, WRONG, check_is_caught, find_error
from .test_mla_decode import CACHES
from .test_mla_sparse import operands, poisoned

OP = "mla_sparse_decode"
# The address may be in another tensor of the call.
OUTSIDE = "out of bounds|not synchronized"
# Hook -> regular expression of the expected error, with a bf16 cache.
BUGS = {
    # Indices.
    "index_not_clamped": OUTSIDE,
    "indices_of_first_query": ANY,
    "length_of_other_query": ANY,
    "place_of_other_token": ANY,
    # Gather.
    "no_wait_for_empty_tile": ANY,
    "announces_before_copies": ANY,
    "positions_not_announced": ANY,
    "gather_not_swizzled": WRONG,
    "absent_tokens_not_zeroed": WRONG,
    "absent_tokens_not_marked": WRONG,
    "three_warps_release_a_piece": ANY,
    "wait_piece_wrong_parity": "deadlock",
    # Consumers.
    "no_wait_for_piece_0": ANY,
    "no_wait_for_piece_1": ANY,
    "no_fence_for_piece_0": "cp.async wrote: no fence_async_proxy followed",
    "no_fence_for_piece_1": "cp.async wrote: no fence_async_proxy followed",
    "phase_not_advanced": ANY,
    "releases_other_piece": ANY,
    "items_in_one_place": ANY,
    # Epilogue.
    "sink_of_head_0": WRONG,
    "no_sink_in_single_split": WRONG,
    "no_sink_in_combine": WRONG,
    "lse_of_first_query": ANY,
    "all_splits_in_one_place": "the accesses are not synchronized",
}
# The same with an FP8 cache.
FP8_BUGS = {
    "index_not_clamped": OUTSIDE,
    "no_wait_for_empty_tile": ANY,
    "no_fence_after_unpacking": "no fence_async_proxy followed",
    "announces_half_filled_tile": ANY,
    "place_of_previous_tokens": ANY,
    "absent_fp8_tokens_not_marked": WRONG,
    "scale_of_block_0": WRONG,
    "no_wait_for_fp8_tile": ANY,
}


def cases(generator, kind: dict) -> list[tuple]:
    """Two splits and several queries; a full row tile; slot 0 is poisoned. A sink weighs as much as
    all tokens of the query that has the least lse."""
    found = []
    for size in ({"B": 2, "Sq": 2, "H": 3, "topk": 1100, "tokens": 400, "page": 16},
                 {"B": 3, "H": 64, "topk": 330, "tokens": 200},
                 {"B": 3, "Sq": 2, "H": 5, "topk": 70, "lengths": True}):  # fmt: skip
        args = list(operands(generator, sink=True, **size, **kind))
        q, cache, indices = args[:3]
        q[:, :, 0] *= 30  # the row maximum changes from tile to tile
        indices[indices == 0] = -1
        indices[:, :, 5::31] = cache.shape[0] * cache.shape[1] + 3
        if args[4] is not None:
            args[4] = torch.tensor([70, 3, 66], dtype=torch.int32)
        args = poisoned(tuple(args))
        lse = deepkern.reference.mla_sparse_decode(*args[:5])[1]
        args[5].copy_(lse.amin((0, 2)))
        found.append(args)
    return found


@pytest.mark.proof
@pytest.mark.parametrize("bug", BUGS)
def test_bug_is_caught(bug, generator):
    check_is_caught(bug, "mla_decode", BUGS[bug], sparse_of, OP, cases(generator, {}))


@pytest.mark.proof
@pytest.mark.parametrize("bug", FP8_BUGS)
def test_fp8_cache_bug_is_caught(bug, generator):
    calls = cases(generator, CACHES["fp8"])
    check_is_caught(bug, "mla_decode", FP8_BUGS[bug], sparse_of, OP, calls)


@pytest.mark.proof
@pytest.mark.parametrize("kind", CACHES.values(), ids=CACHES)
def test_correct_kernel_passes_the_search(emulated_sparse, kind, generator):
    assert find_error(emulated_sparse, OP, cases(generator, kind)) == ""
