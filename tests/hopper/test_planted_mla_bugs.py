"""Every bug planted in mla_decode's kernels is found: see test_planted_bugs.py."""

from __future__ import annotations

import re

import pytest
import torch

from bench.emulator import sources

from . import test_planted_bugs as gemm
from . import test_planted_prefill_bugs as prefill
from . import test_planted_sparse_bugs as sparse
from .conftest import mla_of
from .planted_search import ANY, WRONG, check_is_caught, find_error
from .test_mla_decode import CACHES, operands, scales_of, small_weights

FP8 = CACHES["fp8"]
# Hook -> regular expression of the expected error, with a bf16 cache.
BUGS = {
    # Producer.
    "no_wait_for_empty_piece": ANY,
    "no_wait_for_empty_tile": ANY,
    "wait_piece_wrong_parity": "deadlock",
    "announces_too_few_piece_bytes": ANY,
    "no_fence_after_gather": "no fence_async_proxy followed",
    "place_of_other_token": WRONG,
    "no_wait_for_gather": ANY,
    "gather_not_swizzled": WRONG,
    "loads_start_of_page": WRONG,
    "loads_tokens_past_the_end": ANY,
    "absent_tokens_not_marked": WRONG,
    "no_causal_mask": WRONG,
    "no_wait_for_queries": ANY,
    "no_wait_for_empty_queries": ANY,
    "one_warpgroup_releases_queries": ANY,
    "items_in_one_place": ANY,
    "leaves_out_items": WRONG,
    "mla_producer_keeps_registers": "deadlock",
    # Scores and softmax.
    "no_wait_for_piece_0": ANY,
    "no_wait_for_piece_1": ANY,
    "no_wait_for_scores": ANY,
    "limit_above_absent": WRONG,
    "largest_score_of_negative_scale": WRONG,
    "row_sum_not_rescaled": WRONG,
    "output_rescaled_by_row_0": WRONG,
    # Exchange between the consumer warpgroups.
    "phase_not_advanced": ANY,
    "no_wait_for_p": ANY,
    "p_of_other_tokens": WRONG,
    "ignores_received_row_max": WRONG,
    "reads_own_row_max": ANY,
    "no_warp_sync_before_own_maxima": ANY,
    "rescales_before_wgmma_wait": ANY,
    "last_even_tile_not_finished": ANY,
    # P·V and the release of tiles.
    "wrong_distance_of_columns": WRONG,
    "values_of_first_tokens": WRONG,
    "releases_values_before_wgmma_wait": ANY,
    "releases_other_piece": ANY,
    "three_warps_release_a_piece": ANY,
    # Epilogue and splits.
    "no_wait_for_row_sums": ANY,
    "columns_not_exchanged": WRONG,
    "stores_rows_past_the_last": ANY,
    "all_blocks_take_row_tile_0": ANY,
    "all_splits_in_one_place": "the accesses are not synchronized",
    "no_grid_dependency_wait": "grid_dependency_wait",
    "lse_from_stale_cache": "load_global needs memory that no block writes",
    "last_split_left_out": WRONG,
    "splits_not_weighted": WRONG,
}
# The same with an FP8 cache.
FP8_BUGS = {
    # Producer.
    "no_wait_for_empty_tile": ANY,
    "no_fence_after_unpacking": "no fence_async_proxy followed",
    "announces_half_filled_tile": ANY,
    "place_of_previous_tokens": WRONG,
    "absent_fp8_tokens_not_marked": WRONG,
    "rope_one_chunk_early": WRONG,
    "columns_in_wrong_order": WRONG,
    "codes_not_swizzled": WRONG,
    # Scales and units.
    "scale_of_block_0": WRONG,
    "divides_by_scale_0": WRONG,
    "no_least_quotient": WRONG,
    "nan_scales_ignored": WRONG,
    "quotient_of_other_token": WRONG,
    "scores_with_last_ratio": WRONG,
    "values_with_other_ratio": WRONG,
    "output_in_old_units": WRONG,
    "scores_in_units": WRONG,
    "rope_of_queries_in_fp16": WRONG,
    "weights_without_range": WRONG,
    "no_fence_after_conversion": "no fence_async_proxy followed",
    "no_wait_for_conversion": ANY,
    # Scores.
    "no_wait_for_fp8_tile": ANY,
    "scores_of_last_block_only": WRONG,
    "no_wait_for_block_scores": ANY,
    "no_rope_in_scores": WRONG,
}


def bf16_cases(generator) -> list[tuple]:
    """A full row tile; few rows; two splits; two row tiles; a negative scale."""
    cases = []
    for size in ({"lengths": (330, 700), "H": 32, "page": 128},
                 {"lengths": (200, 65, 1), "H": 5, "page": 16},
                 {"lengths": (1100, 70), "H": 3, "page": 64},
                 {"lengths": (130, 10), "H": 40, "page": 64}):  # fmt: skip
        q, cache, table, *rest = operands(generator, Sq=2, **size)
        q[:, :, 0] *= 30  # the row maximum changes from tile to tile
        table[:2, 1] = -1
        cases.append((q, cache, table, *rest))
    q, cache, table, lengths, scale, *rest = cases[1]
    return [*cases, (q, cache, table, lengths, -scale, *rest)]


def fp8_cases(generator) -> list[tuple]:
    """Two of these; one with scales from 2**-8 to 2**8, 0 or 1e-40; a NaN scale, of a token that
    one of the queries masks; a small weight."""
    cases = []
    for size in ({"lengths": (330, 700), "H": 32, "page": 128},
                 {"lengths": (200, 65, 1), "H": 5, "page": 16}):  # fmt: skip
        q, cache, table, *rest = operands(generator, Sq=2, **FP8, **size)
        q[:, :, 0] *= 30
        table[:2, 1] = -1
        if size["page"] == 128:
            scale = scales_of(cache)
            scale *= torch.exp2(3 * torch.randn(scale.shape, generator=generator).clamp(-2.6, 2.6))
            scale[:, ::9, :, 1] = 0
            scale[:, ::11] = 0
            scale[:, ::7, :, 2] = 1e-40
        cases.append((q, cache, table, *rest))
    q, cache, table, *rest = operands(generator, lengths=(130,), Sq=2, H=3, **FP8)
    page = cache.shape[1]
    scales_of(cache)[table[0, 129 // page], 129 % page, 0, 3] = torch.nan
    return [*cases, (q, cache, table, *rest), small_weights(generator)]


OP = "mla_decode"


@pytest.mark.proof
@pytest.mark.parametrize("bug", BUGS)
def test_bug_is_caught(bug, generator):
    check_is_caught(bug, "mla_decode", BUGS[bug], mla_of, OP, bf16_cases(generator))


@pytest.mark.proof
@pytest.mark.parametrize("bug", FP8_BUGS)
def test_fp8_cache_bug_is_caught(bug, generator):
    check_is_caught(bug, "mla_decode", FP8_BUGS[bug], mla_of, OP, fp8_cases(generator))


@pytest.mark.proof
@pytest.mark.parametrize("cases", [bf16_cases, fp8_cases])
def test_correct_kernel_passes_the_search(emulated_mla, cases, generator):
    assert find_error(emulated_mla, OP, cases(generator)) == ""


def test_every_hook_has_a_test():
    """The hooks in csrc/sm90 are those of the tables, and each name has one meaning."""
    kernels = "".join(text for path, text in sources().items() if path.startswith("sm90/"))
    kernels = re.sub(r"(?m)^ *(//|#define).*$", "", kernels)
    hooks = set(re.findall(r"\b(?:UNLESS_PLANTED|WHEN_PLANTED|PLANT)\(\s*(\w+)", kernels))
    assert hooks == {
        *gemm.BUGS,
        *gemm.PAIR_BUGS,
        *gemm.SPLIT_BUGS,
        *BUGS,
        *FP8_BUGS,
        *prefill.BUGS,
        *prefill.BACKWARD_BUGS,
        *sparse.BUGS,
        *sparse.FP8_BUGS,
    }
