"""The tuner, with a clock that is made up: what it times, what it keeps, what it refuses."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from bench import tune
from bench.__main__ import app
from deepkern.runtime import tiles, tuned
from deepkern.runtime.arch import ARCHS

CPU, SIZE = torch.device("cpu"), {"M": 33, "N": 72, "K": 160}
SM_90 = ARCHS["sm_90"]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="tunes on a CPU")


class Clock:
    """Runs a call, notes which tile it launched, and says the microseconds made up for it."""

    def __init__(self, **microseconds):
        self.microseconds, self.asked = microseconds, []

    def __call__(self, call) -> float:
        call()
        tile = tiles.choose_gemm_tile(SM_90, 1, 1, 1)  # what is being tried, whatever the shape
        self.asked.append(tile)
        return self.microseconds.get(f"t{tile.BLOCK_M}x{tile.BLOCK_N}", 100.0)


@interpreted
def test_every_tile_is_run_and_the_fastest_found():
    clock = Clock(t128x64=10.0, t64x64=20.0)
    found = tune.time_tiles("fp8_gemm_nt", SIZE, CPU, clock)
    assert clock.asked == tiles.candidate_tiles(SM_90, 72, 160) and len(clock.asked) == 8
    assert (found.best.BLOCK_M, found.best.BLOCK_N) == (128, 64) and not found.failed
    assert found.model == tiles.fastest_modelled_tile(SM_90, 33, 72, 160)
    assert found.gain == found.times[found.model] / 10.0 >= 2
    assert found.shape == (33, 72, 160, 128, 1, "dense")


@interpreted
@pytest.mark.parametrize(
    ("op", "size", "shape"),
    [
        ("m_grouped_fp8_gemm_nt_contiguous", {"M": 8, "G": 2}, (4, 72, 128, 128, 2, "m_grouped")),
        ("m_grouped_fp8_gemm_nt_masked", {"M": 4, "G": 2}, (4, 72, 128, 128, 2, "m_grouped")),
        ("k_grouped_fp8_gemm_nt", {"M": 8, "G": 2, "K": 256}, (8, 72, 128, 1, 2, "k_grouped")),
    ],
)
def test_groups(op, size, shape):
    found = tune.time_tiles(op, {**SIZE, "K": 128, **size}, CPU, Clock())
    assert found.shape == shape
    assert list(found.times) == tiles.candidate_tiles(SM_90, 72, 128, shape[3], shape[5])


@interpreted
def test_a_tile_that_gives_other_bits_is_not_chosen(monkeypatch):
    module = tune.deepkern.fp8_gemm_nt.__wrapped__.__globals__
    kernel = module["kernel"]

    class Wrong:
        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                kernel[grid](*args, **kwargs)
                if kwargs["BLOCK_M"] == 128:
                    args[3][0].add_(1)  # the output

            return launch

    monkeypatch.setitem(module, "kernel", Wrong())
    found = tune.time_tiles("fp8_gemm_nt", SIZE, CPU, Clock(t128x64=1.0, t128x128=1.0))
    assert {t.BLOCK_M for t in found.failed} == {128} and found.best.BLOCK_M != 128
    assert all("bits beside the model's tile" in why for why in found.failed.values())


@interpreted
def test_a_tile_that_raises_is_said_and_does_not_end_the_tuning():
    def clock(call):
        if tiles.choose_gemm_tile(SM_90, 1, 1, 1).BLOCK_N == 128:
            raise RuntimeError("out of registers")
        return 5.0

    found = tune.time_tiles("fp8_gemm_nt", SIZE, CPU, clock)
    assert {t.BLOCK_N for t in found.failed} == {128}
    said = io.StringIO()
    Console(file=said, width=250).print(tune.table([found]))
    assert "out of registers" in said.getvalue()


def timed(M=33, best=10.0, model=20.0):
    shape = (M, 72, 160, 128, 1, "dense")
    choice = tiles.fastest_modelled_tile(SM_90, *shape)
    other = next(t for t in tiles.candidate_tiles(SM_90, 72, 160) if t != choice)
    return tune.Timed("fp8_gemm_nt", {}, shape, choice, {choice: model, other: best}, {}), other


def test_what_is_written_is_what_launches_take(tmp_path, monkeypatch):
    found, other = timed()
    file = tmp_path / "sm_90.json"
    assert tune.write([found], "a GPU", file) == 1
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


def test_writing_again_replaces_a_shape_and_keeps_the_others(tmp_path):
    file = tmp_path / "sm_90.json"
    tune.write([timed(33)[0], timed(99)[0]], "one", file)
    tune.write([timed(33, best=5.0)[0]], "two", file)
    assert [(x.M, x.time, x.on) for x in tuned.read(file)] == [(33, 5.0, "two"), (99, 10.0, "one")]
    # Now the model's is as good as any: no line is needed.
    assert tune.write([timed(33, best=19.9)[0]], "three", file) == 1
    assert [x.M for x in tuned.read(file)] == [99]


def test_a_damaged_file_is_not_overwritten(tmp_path):
    file = tmp_path / "sm_90.json"
    file.write_text("{")
    with pytest.raises(ValueError, match="expected JSON"):
        tune.write([timed()[0]], "a GPU", file)
    assert file.read_text() == "{"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without one")
def test_without_a_gpu():
    done = CliRunner().invoke(app, ["tune", "fp8_gemm_nt"])
    assert done.exit_code == 2 and "needs a GPU" in done.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tune", "cast_back"], "no tiles to tune"),
        (["tune", "--size", "M=x"], "expected sizes such as"),
    ],
)
def test_refusals(words, said):
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2 and said in done.output


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    said = io.StringIO()
    console = Console(file=said, width=250)
    sizes = [{"M": 64, "N": 576, "K": 512}]
    code = tune.run(["fp8_gemm_nt"], sizes, 0.02, tmp_path, console)
    (file,) = tmp_path.iterdir()
    assert code == 0 and "fp8_gemm_nt" in said.getvalue()
    assert all(line.time < line.model for line in tuned.read(file))
