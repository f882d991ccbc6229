"""The comparison with EPLB: it counts worse placements and writes whole files."""

from __future__ import annotations

import io
import json

from rich.console import Console

import deepkern
from bench.studies import placement

SMALL = {"loads": 5, "cases": [(24, 4, 2, 8)], "layers": 2, "experts": 16, "repeats": 1}


def run(folder) -> tuple[int, dict, str]:
    output = io.StringIO()
    code = placement.run(folder, console=Console(file=output, width=200), **SMALL)
    (file,) = folder.glob("*.json")
    assert file.with_suffix(".png").stat().st_size > 1000
    assert len(list(folder.iterdir())) == 2
    return code, json.loads(file.read_text()), output.getvalue()


def test_files_and_table(tmp_path):
    code, record, output = run(tmp_path)
    assert code == 0 and "24 / 8 / 2" in output
    (case,), (random,) = record["cases"], record["random_loads"]
    assert case["bound"] <= case["deepkern"]["fullest_over_mean"] * (1 + 1e-12)
    assert case["deepkern"]["fullest_over_mean"] <= case["eplb"]["fullest_over_mean"]
    assert case["moves"]["planned"] <= case["moves"]["unplanned"] <= 48
    assert random["better"] + random["equal"] == 5 == len(random["ratio"])
    assert record["machine"]["torch"]


def test_a_worse_placement_is_counted(tmp_path, monkeypatch):
    """Sorting the slots puts a layer's busiest experts on one GPU."""
    good = deepkern.rebalance_experts

    def sorted_slots(load, *cluster):
        phy2log, *rest = good(load, *cluster)
        return phy2log.sort(1).values, *rest

    monkeypatch.setattr(deepkern, "rebalance_experts", sorted_slots)
    code, record, _ = run(tmp_path)
    assert code == 1 and record["random_loads"][0]["worse"] == 5
