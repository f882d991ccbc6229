"""The providers that the FP8 GEMMs are timed against, and providers that cannot run."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

import deepkern
from bench import report, timings
from deepkern.compat import deep_gemm
from deepkern.testing import compare, gemms, ops
from deepkern.testing.providers import prepared

F32, CPU = torch.float32, torch.device("cpu")
CONTIGUOUS, MASKED = "m_grouped_fp8_gemm_nt_contiguous", "m_grouped_fp8_gemm_nt_masked"
K_GROUPED = "k_grouped_fp8_gemm_nt"


def cpu_inputs(op, **size) -> tuple:
    given = ops.inputs(op, torch.Generator().manual_seed(3), **size)
    return deepkern.OPS[op].positional(given)


@pytest.mark.parametrize("b_rows", [128, 1], ids=["128x128", "1x128"])
def test_dense_providers_agree(b_rows):
    args = cpu_inputs("fp8_gemm_nt", M=33, N=140, K=300, b_rows=b_rows, out_dtype=F32)
    want = deepkern.reference.fp8_gemm_nt(*args)
    for description, call in timings.providers("fp8_gemm_nt", args).items():
        assert compare.diff(call(), want) < 1e-4, description


def test_contiguous_providers_agree():
    args = cpu_inputs(CONTIGUOUS, M=90, N=144, K=256, G=5)
    want = deepkern.reference.m_grouped_fp8_gemm_nt_contiguous(*args)
    row, _ = gemms.sorted_rows(args[4], 5)
    assert len(row) < 90, "some rows have no group"
    got = timings.providers(CONTIGUOUS, args)[gemms.GROUPED_MM]()
    assert compare.diff(got[: len(row)], want[row]) < 1e-4


def test_masked_providers_agree():
    args = cpu_inputs(MASKED, G=3, M=40, N=144, K=256)
    want = deepkern.reference.m_grouped_fp8_gemm_nt_masked(*args)
    row_mask = torch.arange(40) < args[4][:, None]
    calls = timings.providers(MASKED, args)
    got = calls[gemms.GROUPED_MM]()
    assert compare.diff(got[: int(row_mask.sum())], want[row_mask]) < 1e-4
    whole = calls[ops.facts(MASKED).BMM]()
    assert compare.diff(whole[row_mask], want[row_mask]) < 1e-4


@pytest.mark.parametrize("equal", [True, False], ids=["equal", "random"])
def test_k_grouped_providers_agree(equal):
    args = cpu_inputs(K_GROUPED, M=40, N=48, K=512, G=4, equal=equal)
    want = deepkern.reference.k_grouped_fp8_gemm_nt(*args)
    got = timings.providers(K_GROUPED, args)[f"{gemms.GROUPED_MM}, bf16 out"]()
    assert compare.diff(got, want) < 1e-4


def test_calls_of_deep_gemm():
    """Made to deepkern.compat.deep_gemm, which has DeepGEMM's signatures."""
    args = cpu_inputs("fp8_gemm_nt", M=33, N=140, K=300, c=F32)
    got = ops.facts("fp8_gemm_nt").deep_gemm(deep_gemm, *args)()
    compare.assert_bitwise(got, deepkern.fp8_gemm_nt(*args))
    args = cpu_inputs(CONTIGUOUS, M=300, N=144, K=256, G=4)
    row, _ = gemms.sorted_rows(args[4], 4)
    padded = ops.facts(CONTIGUOUS).deep_gemm(deep_gemm, *args)()
    rows = padded[padded.any(1)]
    compare.assert_bitwise(rows, deepkern.m_grouped_fp8_gemm_nt_contiguous(*args)[row])
    args = cpu_inputs(MASKED, G=3, M=40, N=144, K=256)
    got = ops.facts(MASKED).deep_gemm(deep_gemm, *args)()
    compare.assert_bitwise(got, deepkern.m_grouped_fp8_gemm_nt_masked(*args))
    args = cpu_inputs(K_GROUPED, M=40, N=48, K=512, G=4, c=True)
    got = ops.facts(K_GROUPED).deep_gemm(deep_gemm, *args)()
    compare.assert_bitwise(got, deepkern.k_grouped_fp8_gemm_nt(*args))


@pytest.mark.parametrize("b_rows", [128, 1], ids=["128x128", "1x128"])
@pytest.mark.parametrize("K", [128, 640, 7168], ids="K={}".format)
def test_layout_of_scales_for_scaled_mm(monkeypatch, b_rows, K):
    """Sizes and strides that torch's ScaledBlas.cpp checks; no CPU serves the call."""
    got = []
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", lambda *args, **_: got.extend(args))
    a, a_scale, b, b_scale, out_dtype, _ = cpu_inputs(
        "fp8_gemm_nt", M=40, N=256, K=K, b_rows=b_rows
    )
    ops.facts("fp8_gemm_nt").scaled_mm(a, a_scale, b, b_scale, out_dtype)()
    blocks, padded = K // 128, -(-K // 512) * 4
    shape, strides = ((padded, 2), (1, padded)) if b_rows == 128 else ((256, blocks), (1, 256))
    assert got[1].shape == (K, 256) and got[1].stride() == (1, K)
    assert got[2].shape == (40, blocks) and got[2].stride(0) == 1
    assert blocks == 1 or got[2].stride(1) == 40
    assert got[4].shape == shape and got[4].stride(0) == 1
    assert got[4].shape[1] == 1 or got[4].stride() == strides


@pytest.mark.gpu
def test_scaled_mm_agrees(device):
    args = ops.inputs("fp8_gemm_nt", torch.Generator(device).manual_seed(3), M=64, N=256, K=1024)
    call = ops.facts("fp8_gemm_nt").scaled_mm(*args[:5])
    compare.assert_close(call(), deepkern.reference.fp8_gemm_nt(*args))


def one_that_fails(**arguments):
    def fail():
        raise NotImplementedError("not on this device\nand more")

    return {"one that runs": lambda: None, "one that fails": prepared(fail)}


def test_a_provider_that_fails_is_reported(monkeypatch):
    monkeypatch.setattr(ops.facts("cast_per_token"), "others", one_that_fails, raising=False)
    speeds = timings.time_op("cast_per_token", {"M": 4, "K": 128}, "torch", CPU, 10.0, 0.001)
    notes = {speed.baseline: speed.note for speed in speeds}
    assert notes["one that runs"] == "" and len(speeds) == 3
    assert notes["one that fails"] == "NotImplementedError: not on this device"
    assert all(speed.ok and speed.microseconds > 0 for speed in speeds)
    output = io.StringIO()
    Console(file=output, width=250).print(report.timed(speeds))
    assert "one that fails: NotImplementedError: not on this device" in output.getvalue()


def test_a_missing_library_is_reported(monkeypatch):
    def fail(**arguments):
        raise ImportError("no such library")

    monkeypatch.setattr(ops.facts("cast_per_token"), "others", fail, raising=False)
    speeds = timings.time_op("cast_per_token", {"M": 4, "K": 128}, "torch", CPU, 10.0, 0.001)
    assert [speed.note for speed in speeds] == ["", "ImportError: no such library"]
    assert speeds[0].ratio > 0
