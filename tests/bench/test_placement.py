"""The comparison with EPLB: it counts what is worse, and leaves whole files behind."""

from __future__ import annotations

import io
import json

from rich.console import Console

import deepkern
from bench import placement

SMALL = {"loads": 5, "cases": [(24, 4, 2, 8)], "layers": 2, "experts": 16, "repeats": 1}


def run(folder) -> tuple[int, dict, str]:
    said = io.StringIO()
    code = placement.run(folder, console=Console(file=said, width=200), **SMALL)
    (file,) = folder.glob("*.json")
    assert file.with_suffix(".png").stat().st_size > 1000
    assert len(list(folder.iterdir())) == 2
    return code, json.loads(file.read_text()), said.getvalue()


def test_files_and_table(tmp_path):
    code, record, said = run(tmp_path)
    assert code == 0 and "24 / 8 / 2" in said
    (case,), (random,) = record["cases"], record["random_loads"]
    assert case["bound"] <= case["deepkern"]["fullest_over_mean"] * (1 + 1e-12)
    assert case["deepkern"]["fullest_over_mean"] <= case["eplb"]["fullest_over_mean"]
    assert case["moves"]["planned"] <= case["moves"]["unplanned"] <= 48
    assert random["better"] + random["equal"] == 5 == len(random["ratio"])
    assert record["machine"]["torch"]


def test_a_worse_placement_is_noticed(tmp_path, monkeypatch):
    """A placement that stacks what EPLB spreads."""
    good = deepkern.rebalance_experts

    def stacked(load, *cluster):
        phy2log, *rest = good(load, *cluster)
        return phy2log.sort(1).values, *rest

    monkeypatch.setattr(deepkern, "rebalance_experts", stacked)
    code, record, _ = run(tmp_path)
    assert code == 1 and record["random_loads"][0]["worse"] == 5
