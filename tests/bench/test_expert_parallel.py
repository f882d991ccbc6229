"""The study of expert parallelism: its bytes equal those counted by hand."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

import deepkern
from bench.studies import expert_parallel as study


@pytest.mark.slow
def test_bytes_of_a_small_run(tmp_path):
    console = Console(file=io.StringIO(), width=170)
    code = study.run(worlds=(2,), tokens=(6,), repeat=2, folder=tmp_path, console=console)
    (file,) = tmp_path.glob("*-expert-parallel.jsonl")
    first, *records = [json.loads(line) for line in file.read_text().splitlines()]
    assert code == 0 and first["kind"] == "machine" and first["load"] >= 0
    ways = {r["way"]: r for r in records}
    assert list(ways) == list(study.WAYS)

    # Bytes of rank 0 and 1, counted by hand: rank 0 has the experts below 128.
    pairs, once = [], []
    for rank in range(2):
        generator = torch.Generator().manual_seed(rank)
        logits = torch.randn(6, study.E, generator=generator)
        _, idx = deepkern.route_topk(logits, None, 8, 8, 4)
        away = idx // 128 != rank
        pairs.append(away.sum().item())
        once.append(away.any(1).sum().item())
    row = 7168 + 56 * 4
    naive, ours = ways["a row per expert"], ways["a row per rank"]
    assert naive["dispatch_bytes"] == max(pairs) * (row + 8)
    assert ours["dispatch_bytes"] == max(once) * (row + 64)
    assert naive["combine_bytes"] == max(pairs) * 2 * 7168
    assert ours["combine_bytes"] == max(once) * 2 * 7168
    assert ways["two nodes"]["across_bytes"] == ours["across_bytes"]  # a rank is a node here
    assert all(r["dispatch_ms"] > 0 and r["combine_ms"] > 0 for r in records)
    assert "a row per rank" in console.file.getvalue()
