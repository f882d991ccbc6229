"""The facts of every op (testing/ops/), and their costs."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

import deepkern
from bench import timings
from deepkern.runtime import arch
from deepkern.testing import ops
from deepkern.testing.costs import tensor_bytes

OPS = sorted(deepkern.OPS)
BF16, FP8_CACHE = torch.bfloat16, torch.uint8


def cpu_inputs(op: str, **size) -> tuple:
    args = ops.inputs(op, torch.Generator().manual_seed(0), **size)
    return deepkern.OPS[op].positional(args)


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_all_its_facts(op):
    module = ops.facts(op)
    absent = [name for name in ops.REQUIRED if not hasattr(module, name)]
    assert not absent, f"{module.__name__} lacks {absent}"
    assert isinstance(module.SIZES, ops.Sizes) and isinstance(module.EXACT, bool)
    assert all((module.SIZES.small, module.SIZES.cpu, module.SIZES.gpu, module.SIZES.inspect))


@pytest.mark.parametrize("op", OPS)
def test_facts_use_the_schemas_names(op):
    names, module = deepkern.OPS[op].names, ops.facts(op)
    assert list(inspect.signature(module.baseline).parameters) == list(names)
    assert module.baseline.__doc__, "the report shows its first line"
    for name in ("cost", "others", "readable"):
        function = getattr(module, name, None)
        if function is not None:
            allowed = {*names, "result", "output"}
            assert keyword_names(function) <= allowed, f"{name} takes {keyword_names(function)}"


def keyword_names(function) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    assert parameters and list(parameters)[-1].kind == inspect.Parameter.VAR_KEYWORD
    return {p.name for p in parameters if p.kind != inspect.Parameter.VAR_KEYWORD}


def test_no_facts_without_an_op():
    files = {path.stem for path in Path(ops.__file__).parent.glob("*.py")}
    assert files - {"__init__"} == set(OPS)
    with pytest.raises(LookupError, match="no_such_op: no module"):
        ops.facts("no_such_op")


@pytest.mark.parametrize("op", OPS)
def test_cost_is_positive(op):
    args = cpu_inputs(op, **ops.sizes(op).small[0])
    work = ops.cost(op, args, ())
    assert work.bytes > 0 and work.flops >= 0
    assert work.flops > 0 or not work.fp8


def test_cost_of_a_product():
    args = cpu_inputs("fp8_gemm_nt", M=3, N=256, K=128)
    work = ops.cost("fp8_gemm_nt", args, torch.empty(3, 256, dtype=BF16))
    assert work.flops == 2 * 3 * 256 * 128 and work.fp8
    assert work.bytes == 3 * 128 + 3 * 4 + 256 * 128 + 2 * 4 + 2 * 3 * 256


def test_cost_of_decode_counts_cached_tokens():
    args = cpu_inputs("mla_decode", lengths=(5, 0, 3), H=2, R=64, D=16, page=4)
    work = ops.cost("mla_decode", args, ())
    q, _, table, lengths = args[:4]
    assert work.flops == 8 * 2 * 2 * (64 + 16 + 64)
    assert work.bytes == 8 * (64 + 16) * 2 + tensor_bytes(q, table, lengths)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_cost_of_prefill_counts_visible_pairs(causal):
    lengths, lengths_k = (5, 0, 3, 2), (5, 4, 7, 1)
    size = {"lengths": lengths, "lengths_k": lengths_k, "H": 2, "Dqk": 6, "Dv": 4}
    args = cpu_inputs("mla_prefill", **size, causal=causal)
    pairs = sum(
        j <= i + Lk - Lq or not causal
        for Lq, Lk in zip(lengths, lengths_k, strict=True)
        for i in range(Lq)
        for j in range(Lk)
    )
    assert ops.cost("mla_prefill", args, ()).flops == pairs * 2 * 2 * (6 + 4)


@pytest.mark.parametrize(
    ("cache_dtype", "rows"), [(BF16, 109), (FP8_CACHE, 62)], ids=["bf16", "fp8"]
)
def test_rows_at_which_decode_is_compute_bound(cache_dtype, rows):
    """On an H200, this many rows of queries multiply a token for as long as it takes to read it."""
    args = cpu_inputs("mla_decode", lengths=(4096,), H=1, cache_dtype=cache_dtype)
    work = ops.cost("mla_decode", args, ())
    cache_bytes = work.bytes - tensor_bytes(*(args[i] for i in (0, 2, 3)))
    h200 = arch.ARCHS["sm_90"]
    seconds = work.flops / (h200.bf16_tflops * 1e12)
    assert round(cache_bytes / (h200.bandwidth * 1e9) / seconds) == rows


def test_interpreted_triton_is_never_timed(monkeypatch):
    monkeypatch.setattr("deepkern.runtime.backends.interpreting", lambda: True)
    for op in OPS:
        assert "triton" not in timings.timed_backends(op, torch.device("cpu"))
