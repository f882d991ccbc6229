"""The emulated sums of a tensor core: which bits are lost, and the figures of docs/matmul.md."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

import deepkern
from bench.studies import accumulation
from bench.studies.accumulation import ROUNDING, add, errors, product, run
from deepkern.testing import compare
from deepkern.testing.random_inputs import values

F64 = torch.float64


def emulated_sum(terms, sum=0.0, rounding="to zero") -> float:
    """The sum of one instruction; `terms` are pairs of factors."""
    x, y = torch.zeros(2, 1, 32, dtype=F64)
    for i, (a, b) in enumerate(terms):
        x[0, i], y[0, i] = a, b
    return add(torch.tensor([[sum]], dtype=F64), x, y, ROUNDING[rounding]).item()


@pytest.mark.parametrize("rounding", list(ROUNDING))
def test_thirteen_bits_are_kept(rounding):
    assert emulated_sum([(1.5, 2.0), (-0.25, 4.0)], 8.0, rounding) == 10.0
    # 2^8 to 2^-5: 13 bits
    assert emulated_sum([(448.0, 1.0), (2**-5, 1.0)], rounding=rounding) == 448.0 + 2**-5
    assert emulated_sum([], 0.0, rounding) == 0.0


def test_lower_bits_are_lost():
    assert emulated_sum([(448.0, 1.0), (2**-6, 1.0)]) == 448.0
    assert emulated_sum([(448.0, 1.0), (-(2**-6), 1.0)]) == 448.0
    assert emulated_sum([(448.0, 1.0), (-(2**-6), 1.0)], rounding="down") == 448.0 - 2**-5
    # Each term is rounded alone: 31 lost halves do not add up.
    assert emulated_sum([(448.0, 1.0)] + [(2**-6, 1.0)] * 31) == 448.0


@pytest.mark.parametrize(("bits", "kept"), [(13, True), (14, False)], ids=["13", "14"])
def test_bits_of_the_sum_so_far(bits, kept):
    """SageAttention2's experiment: nothing is added to a sum of 1 + 2^-bits."""
    assert emulated_sum([], 1 + 2.0**-bits) == (1 + 2.0**-bits if kept else 1.0)


def test_exact_sums_equal_the_reference(generator):
    q = [deepkern.reference.cast_per_token(values(generator, 20, 512)) for _ in range(2)]
    args = [x.cpu() for pair in q for x in pair]
    want = deepkern.reference.fp8_gemm_nt(*args, torch.float32)
    compare.assert_close(product(*args, 128, None), want)
    near = product(*args, 128, ROUNDING["to zero"])
    assert 1e-10 < compare.diff(near, want) < 1e-7


def test_figures_of_the_docs():
    by_way = {(e.scales, e.way): e for e in errors("normal", 1024)}
    for rounding in ROUNDING:
        every = [by_way["1", f"promoted {o}, cut {rounding}"].diff
                 for o in ("every 32", "every 128", "every 256", "never")]  # fmt: skip
        assert every == sorted(every) and every[3] > 10 * every[1]
        for scales in ("1", "fp32", "ue8m0"):
            e = by_way[scales, f"promoted every 128, cut {rounding}"]
            assert 1e-9 < e.diff < 1e-6, "more than an fp32 result may be off"
            assert e.diff_bf16 < compare.TOLERANCE[torch.bfloat16]
    assert by_way["fp32", "float32"].diff < 1e-12
    assert by_way["fp32", "the cast to FP8"].diff > 1e-4


def test_run_writes_figures_and_a_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(accumulation, "LENGTHS", (256,))
    monkeypatch.setattr(accumulation, "ROWS", 8)
    output = io.StringIO()
    assert run(True, (256,), tmp_path, Console(file=output, width=200)) == 0
    (figures,), (picture,) = tmp_path.glob("*-accumulation.jsonl"), tmp_path.glob("*.png")
    facts, *records = (json.loads(line) for line in figures.read_text().splitlines())
    assert facts["kind"] == "machine" and facts["torch"] == torch.__version__
    measured = 2 * torch.cuda.is_available()
    assert {r["K"] for r in records} == {256} and len(records) == 2 * (17 + measured)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "promoted never, cut to zero" in output.getvalue()
