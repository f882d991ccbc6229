"""The emulated sums of a tensor core: which bits are lost, and the figures of docs/matmul.md."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

import deepkern
from bench.studies import accumulation
from bench.studies.accumulation import errors, product, run, wgmma
from deepkern.runtime import ptx_library
from deepkern.runtime.contract import FP8
from deepkern.testing import compare
from deepkern.testing.random_inputs import values


@pytest.fixture(scope="module", autouse=True)
def needs_the_machine():
    try:
        ptx_library.library()
    except ImportError as reason:
        pytest.skip(str(reason))


def sum_of(terms, sum=0.0) -> float:
    """The sum of one instruction; `terms` are pairs of factors."""
    x, y = torch.zeros(2, 1, 32)
    for i, (a, b) in enumerate(terms):
        x[0, i], y[0, i] = a, b
    return wgmma(x.to(FP8), y.to(FP8), torch.tensor([[sum]]).expand(1, 8)).tolist()[0][0]


def test_thirteen_bits_are_kept():
    assert sum_of([(1.5, 2.0), (-0.25, 4.0)], 8.0) == 10.0
    # 2^8 to 2^-5: 13 bits
    assert sum_of([(448.0, 1.0), (2**-5, 1.0)]) == 448.0 + 2**-5
    assert sum_of([], 0.0) == 0.0


def test_lower_bits_are_lost():
    assert sum_of([(448.0, 1.0), (2**-6, 1.0)]) == 448.0
    assert sum_of([(448.0, 1.0), (-(2**-6), 1.0)]) == 448.0
    # Each term is truncated alone: 31 lost halves do not add up.
    assert sum_of([(448.0, 1.0)] + [(2**-6, 1.0)] * 31) == 448.0


def test_subnormal_factors_have_the_least_exponent():
    """2^-9 · 8 is aligned as 2^(-6 + 3): the last bit kept is 2^-16, not 2^-19."""
    assert sum_of([(2.0**-9, 8.0)], 2.0**-17) == 2.0**-6
    assert sum_of([(2.0**-6, 1.0)], 2.0**-17) == 2.0**-6 + 2.0**-17


@pytest.mark.parametrize(("bits", "kept"), [(13, True), (14, False)], ids=["13", "14"])
def test_bits_of_the_sum_so_far(bits, kept):
    """SageAttention2's experiment: nothing is added to a sum of 1 + 2^-bits."""
    assert sum_of([], 1 + 2.0**-bits) == (1 + 2.0**-bits if kept else 1.0)


def test_exact_sums_equal_the_reference(generator):
    q = [deepkern.reference.cast_per_token(values(generator, 24, 512)) for _ in range(2)]
    args = [x.cpu() for pair in q for x in pair]
    want = deepkern.reference.fp8_gemm_nt(*args, torch.float32)
    compare.assert_close(product(*args, 128, exact=True), want)
    assert 1e-9 < compare.diff(product(*args, 128), want) < 1e-7


def test_figures_of_the_docs():
    by_way = {(e.scales, e.way): e for e in errors("normal", 1024)}
    intervals = ("every 32", "every 128", "every 256", "never")
    every = [by_way["1", f"promoted {interval}"].diff for interval in intervals]
    assert every == sorted(every) and every[3] > 10 * every[1]
    for scales in ("1", "fp32", "ue8m0"):
        e = by_way[scales, "promoted every 128"]
        assert compare.TOLERANCE[torch.float32] < e.diff < compare.FP8_SUM_TOLERANCE
        assert e.diff_bf16 < compare.TOLERANCE[torch.bfloat16]
    assert by_way["fp32", "float32"].diff < 1e-12
    assert by_way["fp32", "the cast to FP8"].diff > 1e-4


@pytest.mark.parametrize("values", accumulation.VALUES)
def test_bound_of_fp32_outputs_covers_every_length(values):
    for K in (512, 4096):
        worst = max(e.diff for e in errors(values, K) if e.way == "promoted every 128")
        assert worst < compare.FP8_SUM_TOLERANCE


def test_an_error_just_above_the_bound_is_found(generator):
    want = torch.rand(1000, generator=generator, device=generator.device).cpu() + 1
    cases = {("fp8_gemm_nt", "sm_90"): 3e-7, ("mqa_logits", "sm_120"): 3e-7,
             ("fp8_gemm_nt", None): 1e-9, ("fp8_gemm_nt", "sm_100"): 1e-9,
             ("gemm_nt", "sm_90"): 1e-9}  # fmt: skip
    for (op, target), bound in cases.items():
        for factor in (0.98, 1.02):
            got = (want.double() * (1 + (2 * factor * bound) ** 0.5)).float()
            if factor < 1:
                compare.assert_matches(op, got, want, target)
            else:
                with pytest.raises(compare.Mismatch, match="diff"):
                    compare.assert_matches(op, got, want, target)


def test_run_writes_figures_and_a_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(accumulation, "LENGTHS", (256,))
    monkeypatch.setattr(accumulation, "ROWS", 8)
    output = io.StringIO()
    assert run(True, (256,), tmp_path, Console(file=output, width=200)) == 0
    (figures,), (picture,) = tmp_path.glob("*-accumulation.jsonl"), tmp_path.glob("*.png")
    facts, *records = (json.loads(line) for line in figures.read_text().splitlines())
    assert facts["kind"] == "machine" and facts["torch"] == torch.__version__
    measured = 2 * torch.cuda.is_available()
    assert {r["K"] for r in records} == {256} and len(records) == 2 * (11 + measured)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "promoted never" in output.getvalue()
