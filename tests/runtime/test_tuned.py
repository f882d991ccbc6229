"""Tuned tiles: which calls use one, errors of damaged files, and that all are candidates."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import deepkern
from deepkern.runtime import tiles, tuned
from deepkern.runtime.arch import ARCHS
from deepkern.testing import ops

SM_90 = ARCHS["sm_90"]
LINE = {"variant": "dense", "b_rows": 128, "groups": 1, "M": 64, "N": 7168, "K": 2048,
        "tile": [128, 64, False], "time": 8.5, "model": 9.5, "on": "no GPU: made up"}  # fmt: skip


@pytest.fixture
def configs(monkeypatch, tmp_path):
    """A function that replaces the committed file of sm_90 by lines or by any content."""

    def clear():
        tuned.load.cache_clear()
        tiles.tuned_or_modelled_tile.cache_clear()

    def put(*lines, content=None):
        text = json.dumps({"target": "sm_90", "tiles": lines}) if content is None else content
        (tmp_path / "sm_90.json").write_text(text)
        clear()

    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    clear()
    yield put
    clear()


def test_committed_tile_is_used(configs):
    before = tiles.choose_gemm_tile(SM_90, 64, 7168, 2048)
    configs(LINE)
    tile = tiles.choose_gemm_tile(SM_90, 64, 7168, 2048)
    assert tile != before and (tile.BLOCK_M, tile.BLOCK_N, tile.num_warps) == (128, 64, 8)
    assert str(tile) == "128x64x128, 8 warps, 8 stages (tuned at M=64)"
    assert str(before).endswith("(cost model)")


@pytest.mark.parametrize("M", [32, 50, 64, 128])
def test_within_a_factor_of_two(configs, M):
    configs(LINE)
    assert tiles.choose_gemm_tile(SM_90, M, 7168, 2048).origin == "tuned at M=64"


@pytest.mark.parametrize(
    "changed",
    [{"M": 31}, {"M": 129}, {"M": 0}, {"N": 7167}, {"K": 2047}, {"b_rows": 1}, {"groups": 2}],
)
def test_other_shapes_use_the_cost_model(configs, changed):
    shape = {"M": 64, "N": 7168, "K": 2048, "b_rows": 128, "groups": 1, **changed}
    want = tiles.fastest_modelled_tile(SM_90, **shape)
    configs(LINE)
    got = tiles.choose_gemm_tile(SM_90, **shape)
    assert got == want and got.origin == "cost model"
    elsewhere = tiles.choose_gemm_tile(ARCHS["sm_89"], 64, 7168, 2048)
    assert elsewhere.origin == "cost model"


def test_nearest_size_is_used(configs):
    configs(LINE, {**LINE, "M": 128, "tile": [64, 32, False]})
    found = {M: tiles.choose_gemm_tile(SM_90, M, 7168, 2048).BLOCK_M for M in (64, 90, 91, 128)}
    assert found == {64: 128, 90: 128, 91: 64, 128: 64}


def test_groups_of_columns_vary_in_k(configs):
    configs({**LINE, "variant": "k_grouped", "b_rows": 1, "groups": 4, "tile": [64, 32, False]})

    def origin(M, N, K):
        return tiles.choose_gemm_tile(SM_90, M, N, K, 1, 4, "k_grouped").origin

    assert origin(64, 7168, 4000) == "tuned at K=2048"
    assert origin(65, 7168, 2048) == origin(64, 7168, 4097) == "cost model"


def test_number_of_splits_is_not_tuned(configs):
    """N and K decide it, so that a row's bits do not depend on what was tuned."""
    shape = {"M": 8, "N": 576, "K": 7168}
    model = tiles.fastest_modelled_tile(SM_90, **shape)
    configs({**LINE, **shape, "tile": [64, 64, True]})
    tile = tiles.choose_gemm_tile(SM_90, **shape)
    assert (
        model.num_splits == tile.num_splits > 1
        and tile.parallel_splits
        and tile.origin != model.origin
    )


@pytest.mark.parametrize("tile", [[48, 64, False], [128, 128, True], [16, 64, True]])
def test_tile_that_is_no_candidate_is_named(configs, tile, tmp_path):
    configs(LINE, {**LINE, "M": 4096, "tile": tile})
    with pytest.raises(ValueError) as caught:
        tiles.choose_gemm_tile(SM_90, 4096, 7168, 2048)
    file, got = tmp_path / "sm_90.json", tuple(tile)
    assert str(caught.value) == (
        f"{file}: tiles[1]: expected a tile that is a candidate for this shape on sm_90, got {got}"
    )


DAMAGED = [
    ("", "expected JSON"),
    ('{"target": "sm_90", "tiles": [', "expected JSON"),
    ("[]", "expected an object with a list 'tiles'"),
    ('{"target": "sm_90"}', "expected an object with a list 'tiles'"),
    ('{"target": "sm_80", "tiles": []}', "target: expected 'sm_90', got 'sm_80'"),
]
LINES = [
    ([], "tiles[0]: expected ["),
    ({k: v for k, v in LINE.items() if k != "on"}, "tiles[0]: expected ["),
    ({**LINE, "more": 1}, "tiles[0]: expected ["),
    ({**LINE, "M": 0}, "tiles[0].M: expected a number > 0, got 0"),
    ({**LINE, "N": "7168"}, "tiles[0].N: expected a number > 0, got '7168'"),
    ({**LINE, "K": True}, "tiles[0].K: expected a number > 0, got True"),
    ({**LINE, "time": -1}, "tiles[0].time: expected microseconds > 0, got -1"),
    ({**LINE, "variant": "n_grouped"}, "tiles[0].variant: expected one of "),
    (
        {**LINE, "tile": [64, 64]},
        "tiles[0].tile: expected [BLOCK_M, BLOCK_N, parallel_splits], got [64",
    ),
    (
        {**LINE, "tile": [64, 64, 1]},
        "tiles[0].tile: expected [BLOCK_M, BLOCK_N, parallel_splits], got [64",
    ),
    ({**LINE, "on": None}, "tiles[0].on: expected text, got None"),
]
DAMAGED += [(json.dumps({"target": "sm_90", "tiles": [line]}), said) for line, said in LINES]


@pytest.mark.parametrize(("content", "said"), DAMAGED)
def test_damaged_file_is_named(configs, tmp_path, content, said):
    configs(content=content)
    with pytest.raises(ValueError) as caught:
        tiles.choose_gemm_tile(SM_90, 1, 1, 1)
    assert str(caught.value).startswith(f"{tmp_path / 'sm_90.json'}: ")
    assert said in str(caught.value)


def test_explain_names_the_origin_of_the_tile(configs, generator):
    args = ops.inputs("fp8_gemm_nt", generator, M=70, N=130, K=200)
    with deepkern.backend("triton"):
        assert "(cost model)" in str(deepkern.explain(deepkern.fp8_gemm_nt, *args))
        configs({**LINE, "M": 70, "N": 130, "K": 200, "tile": [64, 64, False]})
        said = str(deepkern.explain(deepkern.fp8_gemm_nt, *args))
    assert "64x64x128, 4 warps, 6 stages (tuned at M=70)" in said


@pytest.mark.parametrize("target", ARCHS.values(), ids=list(ARCHS))
def test_committed_tiles_are_candidates_inspected(target):
    """Reads the committed file, also while other tests replace it."""

    def form(tile):
        return replace(tile, num_splits=min(tile.num_splits, 2))

    lines = tuned.read(tuned.FOLDER / f"{target.name}.json")
    op_of = {"dense": "fp8_gemm_nt", "m_grouped": "m_grouped_fp8_gemm_nt_masked",
             "k_grouped": "k_grouped_fp8_gemm_nt"}  # fmt: skip
    for line in lines:
        shape = line.M, line.N, line.K, line.b_rows, line.groups, line.variant
        tile = tiles.choose_gemm_tile(target, *shape)
        assert tile.origin == f"tuned at {line.varying}"
        inspected = set()
        for s in ops.sizes(op_of[line.variant]).inspect:
            K, b_rows, G = s["K"], s.get("b_rows", 128), s.get("G", 1)
            if line.variant == "k_grouped":
                K, b_rows = K // G, 1
            if b_rows == line.b_rows:
                chosen = tiles.choose_gemm_tile(target, s["M"], s["N"], K, b_rows, G, line.variant)
                inspected.add(form(chosen))
        assert form(tile) in inspected, f"{line.file}: {tile} is inspected at no size"
