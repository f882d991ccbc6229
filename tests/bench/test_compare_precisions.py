"""`python -m bench.studies.compare_precisions` on a model of two layers."""

from __future__ import annotations

import json

import pytest
import torch

from bench.studies import compare_precisions
from model import Config
from model.training.data import Corpus

DATA = b"for i in range(10):\n    print(i)\n" * 300
CONFIG = Config.preset(
    "tiny", hidden_size=72, num_hidden_layers=2, num_attention_heads=3, n_routed_experts=8
)


@pytest.mark.slow
def test_trains_keeps_and_compares(monkeypatch, tmp_path, capsys):
    """The command on a small model: finished runs are kept, then compared and written."""
    tokens = torch.frombuffer(bytearray(DATA), dtype=torch.uint8)
    corpus = Corpus(tokens, {"a.py": DATA[:3000]})
    monkeypatch.setattr(compare_precisions.Config, "preset", lambda *_, **__: CONFIG)
    monkeypatch.setattr(compare_precisions, "read_corpus", lambda: corpus)
    paths = {"state": tmp_path / "state", "out": tmp_path / "out"}
    options = {"batch": 1, "window": 32, "seeds": 2, **paths}
    compare_precisions.main(12, only="bf16", **options)
    assert len([*paths["state"].iterdir()]) == 2 and not paths["out"].exists()
    kept = {file: file.stat().st_mtime_ns for file in paths["state"].iterdir()}
    compare_precisions.main(12, only=None, **options)
    assert all(file.stat().st_mtime_ns == when for file, when in kept.items())
    assert sorted(file.suffix for file in paths["out"].iterdir()) == [".json", ".png"]
    record = json.loads(next(paths["out"].glob("*.json")).read_text())
    assert record["recipe"]["steps"] == 12 and record["seeds"] == [1, 2]
    bf16, fp8 = record["runs"]["bf16"], record["runs"]["fp8"]
    assert [len(run["losses"]) for run in fp8] == [12, 12]
    for key in ("last_tenth", "held_out"):
        by_seed = [b[key] / a[key] - 1 for a, b in zip(bf16, fp8, strict=True)]
        assert record["fp8_above_bf16"][key]["by_seed"] == pytest.approx(by_seed)
        assert record["fp8_above_bf16"][key]["mean"] == pytest.approx(sum(by_seed) / 2)
        assert all(0 < abs(distance) < 0.05 for distance in by_seed)
    assert "fp8, seed 2: last_tenth" in capsys.readouterr().out
