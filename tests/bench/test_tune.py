"""The tuner, with made-up times: which tiles it times, keeps and rejects."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from bench import tune
from deepkern.runtime import tiles, tuned
from deepkern.runtime.arch import ARCHS

CPU, SIZE = torch.device("cpu"), {"M": 33, "N": 72, "K": 160}
SM_90 = ARCHS["sm_90"]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="tunes on a CPU")


class Clock:
    """Runs a call, records its tile, and returns the microseconds given for that tile."""

    def __init__(self, **microseconds):
        self.microseconds, self.tiles = microseconds, []

    def __call__(self, call) -> float:
        call()
        tile = tiles.choose_gemm_tile(SM_90, 1, 1, 1)  # the tile under test, for any shape
        self.tiles.append(tile)
        return self.microseconds.get(f"t{tile.BLOCK_M}x{tile.BLOCK_N}", 100.0)


@interpreted
def test_times_every_tile_and_finds_the_fastest():
    clock = Clock(t128x64=10.0, t64x64=20.0)
    result = tune.time_tiles("fp8_gemm_nt", SIZE, CPU, clock)
    assert clock.tiles == tiles.candidate_tiles(SM_90, 72, 160) and len(clock.tiles) == 8
    assert (result.best.BLOCK_M, result.best.BLOCK_N) == (128, 64) and not result.failed
    assert result.model == tiles.fastest_modelled_tile(SM_90, 33, 72, 160)
    assert result.gain == result.times[result.model] / 10.0 >= 2
    assert result.shape == (33, 72, 160, 128, 1, "dense")


@interpreted
@pytest.mark.parametrize(
    ("op", "size", "shape"),
    [
        ("m_grouped_fp8_gemm_nt_contiguous", {"M": 8, "G": 2}, (4, 72, 128, 128, 2, "m_grouped")),
        ("m_grouped_fp8_gemm_nt_masked", {"M": 4, "G": 2}, (4, 72, 128, 128, 2, "m_grouped")),
        ("k_grouped_fp8_gemm_nt", {"M": 8, "G": 2, "K": 256}, (8, 72, 128, 1, 2, "k_grouped")),
    ],
    ids=["contiguous", "masked", "k_grouped"],
)
def test_shapes_of_grouped_gemms(op, size, shape):
    result = tune.time_tiles(op, {**SIZE, "K": 128, **size}, CPU, Clock())
    assert result.shape == shape
    assert list(result.times) == tiles.candidate_tiles(SM_90, 72, 128, shape[3], shape[5])


@interpreted
def test_rejects_a_tile_with_other_bits(monkeypatch):
    op = tune.deepkern.OPS["fp8_gemm_nt"]
    launch = op.launcher("triton")

    def wrong(*args):
        out = launch(*args)
        return out + 1 if tiles.choose_gemm_tile(SM_90, 1, 1, 1).BLOCK_M == 128 else out

    monkeypatch.setitem(op.launchers, "triton", wrong)
    result = tune.time_tiles("fp8_gemm_nt", SIZE, CPU, Clock(t128x64=1.0, t128x128=1.0))
    assert {t.BLOCK_M for t in result.failed} == {128} and result.best.BLOCK_M != 128
    assert all("bits compared with the model's tile" in why for why in result.failed.values())


@interpreted
def test_a_tile_that_raises_is_reported():
    def clock(call):
        if tiles.choose_gemm_tile(SM_90, 1, 1, 1).BLOCK_N == 128:
            raise RuntimeError("out of registers")
        return 5.0

    result = tune.time_tiles("fp8_gemm_nt", SIZE, CPU, clock)
    assert {t.BLOCK_N for t in result.failed} == {128}
    output = io.StringIO()
    Console(file=output, width=250).print(tune.table([result]))
    assert "out of registers" in output.getvalue()


def timed(M=33, best=10.0, model=20.0):
    shape = (M, 72, 160, 128, 1, "dense")
    choice = tiles.fastest_modelled_tile(SM_90, *shape)
    other = next(t for t in tiles.candidate_tiles(SM_90, 72, 160) if t != choice)
    return tune.Timed("fp8_gemm_nt", {}, shape, choice, {choice: model, other: best}, {}), other


def test_launches_use_the_written_tile(tmp_path, monkeypatch):
    result, other = timed()
    file = tmp_path / "sm_90.json"
    assert tune.write([result], "a GPU", file) == 1
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    for cache in (tuned.load, tiles.tuned_or_modelled_tile):
        cache.cache_clear()
    try:
        tile = tiles.choose_gemm_tile(SM_90, 33, 72, 160)
    finally:
        monkeypatch.undo()
        for cache in (tuned.load, tiles.tuned_or_modelled_tile):
            cache.cache_clear()
    assert tile == other and tile.origin == "tuned at M=33"
    (line,) = tuned.read(file)
    assert (line.time, line.model, line.on) == (10.0, 20.0, "a GPU")
    assert list(tmp_path.iterdir()) == [file], "a half-written file was left"


def test_writing_replaces_only_timed_shapes(tmp_path):
    file = tmp_path / "sm_90.json"
    tune.write([timed(33)[0], timed(99)[0]], "one", file)
    tune.write([timed(33, best=5.0)[0]], "two", file)
    assert [(x.M, x.time, x.on) for x in tuned.read(file)] == [(33, 5.0, "two"), (99, 10.0, "one")]
    # The model's tile is now within the noise of the best: no line is needed.
    assert tune.write([timed(33, best=19.9)[0]], "three", file) == 1
    assert [x.M for x in tuned.read(file)] == [99]


def test_a_damaged_file_is_not_overwritten(tmp_path):
    file = tmp_path / "sm_90.json"
    file.write_text("{")
    with pytest.raises(ValueError, match="expected JSON"):
        tune.write([timed()[0]], "a GPU", file)
    assert file.read_text() == "{"


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    output = io.StringIO()
    console = Console(file=output, width=250)
    sizes = [{"M": 64, "N": 576, "K": 512}]
    code = tune.run(["fp8_gemm_nt"], sizes, 0.02, tmp_path, console)
    (file,) = tmp_path.iterdir()
    assert code == 0 and "fp8_gemm_nt" in output.getvalue()
    assert all(line.time < line.model for line in tuned.read(file))
