"""Timing, costs and the command line."""

from __future__ import annotations

import inspect
import time

import pytest
import torch
from typer.testing import CliRunner

import deepkern
from bench import baselines, costs, timings
from bench.__main__ import app
from deepkern.runtime import arch
from deepkern.testing import inputs
from deepkern.testing.timing import time_call


def test_time_call_measures():
    timing = time_call(lambda: time.sleep(0.005), torch.device("cpu"), seconds=0.5)
    assert 5000 <= timing.median < 50_000 and timing.samples >= 2


@pytest.mark.gpu
def test_time_call_waits_for_the_gpu(device):
    x = torch.ones(1 << 28, device=device)
    timing = time_call(lambda: x.mul_(1.0), device, seconds=0.1)
    assert timing.median > 2 * x.nbytes / 8e12 * 1e6, "faster than any memory"


def test_cost_of_a_product():
    size = {"M": 3, "N": 256, "K": 128}
    args = inputs.make("fp8_gemm_nt", torch.Generator().manual_seed(0), **size)
    out = torch.empty(3, 256, dtype=torch.bfloat16)
    moved, operations = costs.cost("fp8_gemm_nt", args, out)
    assert operations == 2 * 3 * 256 * 128
    assert moved == 3 * 128 + 3 * 4 + 256 * 128 + 2 * 4 + 2 * 3 * 256


def test_cost_of_attention_counts_what_is_cached_and_no_more():
    size = {"lengths": (5, 0, 3), "H": 2, "R": 64, "D": 16, "page": 4}
    made = inputs.make("mla_decode", torch.Generator().manual_seed(0), **size)
    args = deepkern.OPS["mla_decode"].positional(made)
    moved, operations = costs.cost("mla_decode", args, ())
    q, _, table, lengths = args[:4]
    assert operations == 8 * 2 * 2 * (64 + 16 + 64)
    assert moved == 8 * (64 + 16) * 2 + costs.tensor_bytes(q, table, lengths)


@pytest.mark.parametrize("causal", [True, False])
def test_cost_of_prefill_counts_what_is_seen(causal):
    lengths, lengths_k = (5, 0, 3, 2), (5, 4, 7, 1)
    size = {"lengths": lengths, "lengths_k": lengths_k, "H": 2, "Dqk": 6, "Dv": 4}
    args = inputs.make("mla_prefill", torch.Generator().manual_seed(0), **size, causal=causal)
    _, operations = costs.cost("mla_prefill", args, ())
    pairs = sum(
        j <= i + Lk - Lq or not causal
        for Lq, Lk in zip(lengths, lengths_k, strict=True)
        for i in range(Lq)
        for j in range(Lk)
    )
    assert operations == pairs * 2 * 2 * (6 + 4)


@pytest.mark.parametrize(("cache_dtype", "crossover"), [(torch.bfloat16, 109), (torch.uint8, 62)])
def test_cost_of_attention_gives_the_crossover_of_memory_and_matrix_units(cache_dtype, crossover):
    """On an H200, so many rows of queries take as long to multiply as their tokens to read."""
    size = {"lengths": (4096,), "H": 1, "cache_dtype": cache_dtype}
    made = inputs.make("mla_decode", torch.Generator().manual_seed(0), **size)
    args = deepkern.OPS["mla_decode"].positional(made)
    moved, operations = costs.cost("mla_decode", args, ())
    moved -= costs.tensor_bytes(*(args[i] for i in (0, 2, 3)))
    h200 = arch.ARCHS["sm_90"]
    rows = (moved / (h200.bandwidth * 1e9)) / (operations / (h200.bf16_tflops * 1e12))
    assert round(rows) == crossover


def test_interpreted_triton_is_never_timed(monkeypatch):
    monkeypatch.setattr("deepkern.runtime.backends.interpreting", lambda: True)
    for op in deepkern.OPS:
        assert "triton" not in timings.timed_backends(op, torch.device("cpu"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ops", "no_such_op"], "no op 'no_such_op'"),
        (["inspect", "no_such_op"], "no op 'no_such_op'"),
        (["inspect", "cast_per_token", "--target", "sm_1"], "no target 'sm_1'"),
        (["no_such_command"], "no_such_command"),
    ],
)
def test_command_line_refuses(words, said):
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2 and said in done.output


@pytest.mark.slow
def test_inspect_checks_and_prints_a_table():
    done = CliRunner().invoke(app, ["inspect", "cast_per_token", "--target", "sm_90", "--check"])
    assert done.exit_code == 0, done.output
    for word in ("cast_per_token", "sm_90", "0 with problems"):
        assert word in done.output


@pytest.mark.parametrize("op", sorted(deepkern.OPS))
def test_a_baseline_takes_what_its_op_takes(op):
    if op in baselines.BASELINES:
        names = deepkern.OPS[op].names
        inspect.signature(baselines.BASELINES[op]).bind(*names)
