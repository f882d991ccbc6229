"""`auto` uses a Hopper kernel only if these sources passed their GPU tests."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

import deepkern
from bench import machine, verify
from deepkern.runtime import backends, verified
from deepkern.testing import ops

OP, CUDA = "fp8_gemm_nt", torch.device("cuda", 0)


@pytest.fixture
def record(tmp_path, monkeypatch):
    """Writes a record; clears the cache before and after."""
    file = tmp_path / "verified_kernels.json"
    monkeypatch.setattr(verified, "FILE", file)
    monkeypatch.setattr(verified, "compiled_sources", lambda: "abc")
    verified.read_record.cache_clear()
    yield lambda **found: (file.write_text(json.dumps(found)), verified.read_record.cache_clear())
    verified.read_record.cache_clear()


@pytest.fixture
def hopper(monkeypatch):
    """As on a Hopper GPU whose `cuda` and `triton` backends both serve."""
    served = {"cuda", "triton", "torch"}
    monkeypatch.setattr(
        backends,
        "unsupported_on_device",
        lambda op, name, device: None if name in served else "absent",
    )


def test_auto_skips_an_unverified_kernel(record, hopper):
    assert backends.choose(deepkern.OPS[OP], CUDA) == "triton"
    assert "not verified on a GPU" in verified.unverified_reason(OP)
    with deepkern.backend("cuda"):
        assert backends.choose(deepkern.OPS[OP], CUDA) == "cuda"


def test_auto_uses_verified_sources_only(record, hopper, monkeypatch):
    record(ops=[OP], gpu="NVIDIA H200", sources="abc", result="x.jsonl")
    assert backends.choose(deepkern.OPS[OP], CUDA) == "cuda"
    assert backends.choose(deepkern.OPS["mla_decode"], CUDA) == "triton"
    monkeypatch.setattr(verified, "compiled_sources", lambda: "other")
    assert backends.choose(deepkern.OPS[OP], CUDA) == "triton"
    assert verified.unverified_reason(OP).endswith("changed since it was verified on NVIDIA H200")


def test_auto_falls_back_for_unsupported_arguments(record, hopper):
    described = deepkern.OPS["mla_decode"]
    record(ops=["mla_decode"], gpu="NVIDIA H200", sources="abc", result="x.jsonl")

    def chosen(**size) -> str:
        args = ops.inputs("mla_decode", torch.Generator().manual_seed(0), lengths=(3,), **size)
        return backends.choose(described, CUDA, described.positional(args))

    assert chosen() == chosen(cache_dtype=torch.uint8) == "cuda"
    for size in ({"dtype": torch.float16}, {"D": 32}, {"R": 128}):
        assert chosen(**size) == "triton", size
        with (
            deepkern.backend("cuda"),
            pytest.raises(deepkern.BackendError, match="mla_decode: .* it supports"),
        ):
            chosen(**size)


def test_damaged_record_is_named(record):
    record(ops=[OP])
    with pytest.raises(
        ValueError, match="verified_kernels.json: expected ops, gpu, sources and result"
    ):
        verified.unverified_reason(OP)


def run(tmp_path, **counts) -> tuple[int, str]:
    said = io.StringIO()
    counts = dict.fromkeys(verify.COUNTS, 0) | counts
    file = tmp_path / "verified_kernels.json"
    code = verify.run(lambda: counts, tmp_path, file, Console(file=said, width=200))
    return code, said.getvalue()


def test_prove_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_gpu", lambda: None)
    code, said = run(tmp_path)
    assert code == 2 and "nothing was run" in said and not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [{}, {"tests": 9, "skipped": 1}, {"tests": 9, "failures": 1},
                                 {"tests": 9, "errors": 1}])  # fmt: skip
def test_prove_records_a_clean_run_only(tmp_path, monkeypatch, bad):
    gpu = {"name": "NVIDIA H200", "target": "sm_90"}
    monkeypatch.setattr(machine, "_gpu", lambda: gpu)
    monkeypatch.setattr(verified, "compiled_sources", lambda: "abc")
    monkeypatch.setattr(verify.native, "native_op", lambda op, device: op == OP)
    assert run(tmp_path, **bad)[0] == 1 and not list(tmp_path.iterdir())
    assert run(tmp_path, tests=9)[0] == 0
    found = json.loads((tmp_path / "verified_kernels.json").read_text())
    assert found["ops"] == [OP] and found["sources"] == "abc" and found["gpu"] == "NVIDIA H200"
    lines = (tmp_path / found["result"]).read_text().splitlines()
    assert json.loads(lines[1])["tests"] == 9
