"""The baselines of the FP8 products beside the ops, and baselines that cannot run."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

import deepkern
from bench import baselines, report, timings
from bench.baselines import matmul, registry
from deepkern.compat import deep_gemm
from deepkern.testing import compare, inputs

F32, CPU = torch.float32, torch.device("cpu")
CONTIGUOUS, MASKED = "m_grouped_fp8_gemm_nt_contiguous", "m_grouped_fp8_gemm_nt_masked"
K_GROUPED = "k_grouped_fp8_gemm_nt"


def make(op, **size) -> tuple:
    made = inputs.make(op, torch.Generator().manual_seed(3), **size)
    return deepkern.OPS[op].positional(made)


@pytest.mark.parametrize("b_rows", [128, 1])
def test_products_of_matrices(b_rows):
    args = make("fp8_gemm_nt", M=33, N=140, K=300, b_rows=b_rows, out_dtype=F32)
    want = deepkern.reference.fp8_gemm_nt(*args)
    for words, call in baselines.calls("fp8_gemm_nt", args).items():
        assert compare.diff(call(), want) < 1e-4, words


def test_products_of_groups_of_rows():
    args = make(CONTIGUOUS, M=90, N=144, K=256, G=5)
    want = deepkern.reference.m_grouped_fp8_gemm_nt_contiguous(*args)
    row, _ = matmul.sorted_rows(args[4], 5)
    assert len(row) < 90, "some rows have no group"
    got = baselines.calls(CONTIGUOUS, args)[matmul.GROUPED_MM]()
    assert compare.diff(got[: len(row)], want[row]) < 1e-4


def test_products_of_the_first_rows_of_groups():
    args = make(MASKED, G=3, M=40, N=144, K=256)
    want = deepkern.reference.m_grouped_fp8_gemm_nt_masked(*args)
    used = torch.arange(40) < args[4][:, None]
    calls = baselines.calls(MASKED, args)
    got = calls[matmul.GROUPED_MM]()
    assert compare.diff(got[: int(used.sum())], want[used]) < 1e-4
    whole = calls["bf16 torch.bmm, all rows, dequantised before"]()
    assert compare.diff(whole[used], want[used]) < 1e-4


@pytest.mark.parametrize("equal", [True, False])
def test_products_of_groups_of_columns(equal):
    args = make(K_GROUPED, M=40, N=48, K=512, G=4, equal=equal)
    want = deepkern.reference.k_grouped_fp8_gemm_nt(*args)
    got = baselines.calls(K_GROUPED, args)[f"{matmul.GROUPED_MM}, bf16 out"]()
    assert compare.diff(got, want) < 1e-4


def test_deep_gemm_is_called_as_its_signatures_are():
    """deepkern's own module of those names stands in for it."""
    args = make("fp8_gemm_nt", M=33, N=140, K=300, c=F32)
    got = matmul.deep_gemm_dense(deep_gemm, *args)()
    compare.assert_bitwise(got, deepkern.fp8_gemm_nt(*args))
    args = make(CONTIGUOUS, M=300, N=144, K=256, G=4)
    row, _ = matmul.sorted_rows(args[4], 4)
    padded = matmul.deep_gemm_contiguous(deep_gemm, *args)()
    found = padded[padded.any(1)]
    compare.assert_bitwise(found, deepkern.m_grouped_fp8_gemm_nt_contiguous(*args)[row])
    args = make(MASKED, G=3, M=40, N=144, K=256)
    got = matmul.deep_gemm_masked(deep_gemm, *args)()
    compare.assert_bitwise(got, deepkern.m_grouped_fp8_gemm_nt_masked(*args))
    args = make(K_GROUPED, M=40, N=48, K=512, G=4, c=True)
    got = matmul.deep_gemm_k_grouped(deep_gemm, *args)()
    compare.assert_bitwise(got, deepkern.k_grouped_fp8_gemm_nt(*args))


@pytest.mark.parametrize("b_rows", [128, 1])
@pytest.mark.parametrize("K", [128, 640, 7168])
def test_scaled_mm_gets_scales_as_cublas_lays_them_out(monkeypatch, b_rows, K):
    """Sizes and strides as torch's ScaledBlas.cpp checks them; no CPU serves the call."""
    got = []
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", lambda *args, **_: got.extend(args))
    a, a_scale, b, b_scale, out_dtype, _ = make("fp8_gemm_nt", M=40, N=256, K=K, b_rows=b_rows)
    matmul.scaled_mm(a, a_scale, b, b_scale, out_dtype)()
    blocks, padded = K // 128, -(-K // 512) * 4
    shape, strides = ((padded, 2), (1, padded)) if b_rows == 128 else ((256, blocks), (1, 256))
    assert got[1].shape == (K, 256) and got[1].stride() == (1, K)
    assert got[2].shape == (40, blocks) and got[2].stride(0) == 1
    assert blocks == 1 or got[2].stride(1) == 40
    assert got[4].shape == shape and got[4].stride(0) == 1
    assert got[4].shape[1] == 1 or got[4].stride() == strides


@pytest.mark.gpu
def test_scaled_mm_agrees(device):
    made = inputs.make("fp8_gemm_nt", torch.Generator(device).manual_seed(3), M=64, N=256, K=1024)
    call = matmul.scaled_mm(*made[:5])
    compare.assert_close(call(), deepkern.reference.fp8_gemm_nt(*made))


def broken(args):
    def not_here():
        raise NotImplementedError("not on this device\nand more")

    return {"one that runs": lambda: None, "one that cannot": registry.prepared(not_here)}


def test_a_baseline_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setitem(registry.OTHERS, "cast_per_token", broken)
    found = timings.time_op("cast_per_token", {"M": 4, "K": 128}, "torch", CPU, 10.0, 0.001)
    notes = {speed.baseline: speed.note for speed in found}
    assert notes["one that runs"] == "" and len(found) == 3
    assert notes["one that cannot"] == "NotImplementedError: not on this device"
    assert all(speed.ok and speed.microseconds > 0 for speed in found)
    said = io.StringIO()
    Console(file=said, width=250).print(report.timed(found))
    assert "one that cannot: NotImplementedError: not on this device" in said.getvalue()


def test_baselines_that_cannot_be_prepared_say_why(monkeypatch):
    def nothing(args):
        raise ImportError("no such library")

    monkeypatch.setitem(registry.OTHERS, "cast_per_token", nothing)
    found = timings.time_op("cast_per_token", {"M": 4, "K": 128}, "torch", CPU, 10.0, 0.001)
    assert [speed.note for speed in found] == ["", "ImportError: no such library"]
    assert found[0].ratio > 0
