"""The times that follow from counts, the check of committed figures, and sizes as words."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import deepkern
from bench import figures, limits
from bench.__main__ import app
from deepkern.runtime.arch import ARCHS
from deepkern.runtime.profile import Launch, Statement
from deepkern.testing.costs import Cost

H200 = ARCHS["sm_90"]
FIGURES = {"instructions": 1000, "sectors": 500, "conflicts": 0, "flops": 4096}


def statement(kind: str, opcode: str = "add.f32", **counts: int) -> Statement:
    zero = dict.fromkeys(Statement._fields[6:], 0)
    return Statement(1, "kernel.py:1:0", "kernel.py", 1, kind, opcode, **zero | counts)


def launch(*statements: Statement, blocks: int = 132, most: int = 100) -> Launch:
    return Launch("kernel", (blocks, 1, 1), (128, 1, 1), (1, 1, 1), 0, 0, 0, blocks, blocks, 100,
                  most, statements)  # fmt: skip


def test_the_clock_is_that_of_the_published_peak():
    assert limits.clock(H200) == pytest.approx(1.83e9, rel=0.01)
    assert limits.clock(ARCHS["sm_80"]) == pytest.approx(1.41e9, rel=0.01)
    assert limits.clock(ARCHS["sm_120"]) == pytest.approx(2.407e9, rel=0.01)


@pytest.mark.parametrize(
    ("opcode", "tflops"),
    [
        ("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16", 989),
        ("wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3", 1979),
        ("wgmma.mma_async.sync.aligned.m64n128k8.f32.tf32.tf32", 989 / 2),
        ("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32", 989),
    ],
    ids=["bf16", "FP8", "tf32", "mma.sync of FP8"],
)
def test_tensor_time(opcode, tflops):
    times = limits.times(launch(statement("tensor_core", opcode, flops=10**12)), H200)
    assert times["tensor"] == pytest.approx(1 / tflops, rel=1e-6)


def test_uneven_work_of_sms():
    assert limits.imbalance(launch(blocks=132), H200) == 1
    assert limits.imbalance(launch(blocks=133), H200) == pytest.approx(264 / 133)
    assert limits.imbalance(launch(blocks=1), H200) == 132
    uneven = launch(statement("float", issued=264 * 100), blocks=264, most=400)
    assert limits.imbalance(uneven, H200) == pytest.approx(400 * 132 / 26400)


def test_conversions_to_narrow_floats_are_slow():
    for opcode, rate in (("cvt.rn.bf16x2.f32", 16), ("cvt.f32.bf16", 64), ("cvt.s64.s32", 64)):
        cycles = limits.cycles(launch(statement("convert", opcode, lanes=6400)), H200)
        assert cycles["convert"] == 6400 / rate, opcode


def test_roof():
    assert limits.roof(Cost(4800 * 10**9), H200) == pytest.approx(1)
    assert limits.roof(Cost(0, 1979 * 10**12, fp8=True), H200) == pytest.approx(1)
    assert limits.roof(Cost(0, 312 * 10**12, fp8=True), ARCHS["sm_80"]) == pytest.approx(1)


@pytest.mark.parametrize("name", figures.COUNTS)
def test_problems(name):
    now = {**FIGURES, name: round(FIGURES[name] * 1.05) + 1}
    (text,) = figures.problems(now, FIGURES)
    assert text.startswith(f"{name}: {now[name]:,}, committed {FIGURES[name]:,}")
    (text,) = figures.problems(FIGURES, now)
    assert "stale" in text


def test_no_problems():
    assert figures.problems(FIGURES, FIGURES) == []
    assert figures.problems({**FIGURES, "instructions": 1019}, FIGURES) == [], "within the slack"
    assert "has no figures" in figures.problems(FIGURES, None)[0]


def test_figures_are_kept_in_a_file(tmp_path):
    file = tmp_path / "figures.json"
    kept = {("b", "sm_90"): FIGURES, ("a", "sm_90"): FIGURES, ("a", "sm_80"): FIGURES}
    figures.write(kept, file)
    assert figures.load(file) == kept
    assert list(json.loads(file.read_text())) == ["a", "b"]


def test_every_op_has_a_size_and_committed_figures():
    assert sorted(figures.SIZES) == sorted(deepkern.OPS)
    expected = {(op, target) for op in deepkern.OPS for target in figures.TARGETS}
    assert set(figures.load()) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["profile", "no_op"], "no op 'no_op'"),
        (["profile", "mla_decode", "--target", "sm_70"], "no target 'sm_70'"),
        (["profile", "mla_decode", "--size", "X=1"], "expected NAME=VALUE with a NAME of"),
        (["profile"], "expected an op"),
    ],
    ids=["op", "target", "size", "no op"],
)
def test_errors_of_the_command_line(words, message):
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert message in result.output
