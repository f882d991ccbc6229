"""`python -m bench.studies.compare_precisions` on a model of two layers."""

from __future__ import annotations

import json

import pytest

from bench.studies import compare_precisions
from model import Config

DATA = b"for i in range(10):\n    print(i)\n" * 300
CONFIG = Config.preset(
    "tiny", hidden_size=72, num_hidden_layers=2, num_attention_heads=3, n_routed_experts=8
)


@pytest.mark.slow
def test_trains_continues_and_compares(monkeypatch, tmp_path, capsys):
    """The command on a small model: it trains, saves, continues, compares and writes."""
    monkeypatch.setattr(compare_precisions.Config, "preset", lambda *_, **__: CONFIG)
    monkeypatch.setattr(compare_precisions, "corpus", lambda: (DATA, {"a.py": DATA[:3000]}))
    options = {"batch": 1, "window": 32, "state": tmp_path / "state", "out": tmp_path}
    compare_precisions.main(12, precision=["fp8"], only="bf16", **options)
    assert not list(tmp_path.glob("*.json")) and "from step 0 of 12\n" in capsys.readouterr().out
    compare_precisions.main(12, precision=["fp8"], only=None, **options)
    assert "bf16: from step 12 of 12\n" in capsys.readouterr().out
    assert sorted(file.suffix for file in tmp_path.iterdir() if file.is_file()) == [".json", ".png"]
    record = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert record["recipe"]["steps"] == 12 and list(record["runs"]) == ["bf16", "fp8"]
    bf16, fp8 = record["runs"].values()
    assert len(fp8["mean_of_every_10_steps"]) == 2
    for key in ("mean_of_last_tenth", "held_out"):
        assert record["above_bf16"]["fp8"][key] == pytest.approx(fp8[key] / bf16[key] - 1)
