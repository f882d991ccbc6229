"""The main job: it reports what is wrong, does not time it, and writes whole files."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

import deepkern
from bench import checks, job, machine, results, timings
from deepkern.testing import ops

OP = "cast_per_token"


@pytest.fixture
def small_sizes(monkeypatch):
    """Small sizes to time: these tests are not about speed."""
    sizes = ops.sizes(OP)
    few = [{"M": 4, "K": 256}]
    tiny = ops.Sizes(small=sizes.small[:2], cpu=few, gpu=few)
    monkeypatch.setattr(ops.facts(OP), "SIZES", tiny)


def run(folder, **options) -> tuple[int, list[dict], str]:
    """Runs the job on one op: exit code, records, printed text."""
    output = io.StringIO()
    console = Console(file=output, width=200)
    code = job.run(
        [OP], model=False, seconds=0.01, folder=folder, page=folder / "report.html",
        console=console, **options,
    )  # fmt: skip
    (file,) = folder.glob("*.jsonl")
    return code, [json.loads(line) for line in file.read_text().splitlines()], output.getvalue()


def of_kind(records: list[dict], kind: str) -> list[dict]:
    return [record for record in records if record["kind"] == kind]


def test_everything_right(small_sizes, tmp_path):
    code, records, text = run(tmp_path)
    assert code == 0
    assert "Everything that was checked agrees" in text
    (facts,) = of_kind(records, "machine")
    assert facts["torch"] == torch.__version__ and facts["cores"] >= 1 and facts["cpu"]
    served = {name for name in deepkern.runtime.backends.BACKENDS
              if machine.served(deepkern.OPS[OP], name)}  # fmt: skip
    assert "triton" in served and "torch" in served
    checked = of_kind(records, "check")
    sizes = {checks.text(size) for size in ops.sizes(OP).small}
    for name in served:
        assert {c["size"] for c in checked if c["backend"] == name} == sizes
    for c in checked:
        assert c["ok"] is True and c["error"] <= c["tolerance"]
        assert c["against"] == ("plain PyTorch" if c["backend"] == "torch" else "oracle")
    for s in of_kind(records, "speed"):
        assert 0 < s["least"] <= s["median"] and s["gb_per_s"] > 0 and s["calls"] >= 1
        assert s["samples"] and s["error"] <= s["tolerance"] and s["against"] == "reference"
    assert records[-1]["kind"] == "verdict" and records[-1]["disagreements"] == 0


@pytest.mark.slow
def test_plot_and_report_are_written(small_sizes, tmp_path):
    run(tmp_path)
    assert (tmp_path / "report.html").stat().st_size > 10_000
    (picture,) = tmp_path.glob("*.png")
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 10_000
    assert not list(tmp_path.glob(".*")), "a half-written file was left"


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["triton", "torch", "cpu"])
def test_a_wrong_backend_is_reported(backend, small_sizes, plant_wrong_scales, tmp_path):
    if not machine.served(deepkern.OPS[OP], backend):
        pytest.skip(f"{backend} cannot serve here")
    plant_wrong_scales(backend)
    code, records, text = run(tmp_path)
    assert code == 1
    assert "disagreements" in text and f"{OP} {backend}" in text
    for c in of_kind(records, "check"):
        assert c["ok"] is (c["backend"] != backend)
    timed = of_kind(records, "speed")
    assert timed
    for s in timed:
        if s["provider"] == f"deepkern {backend}":
            assert s["ok"] is False and s["samples"] == [] and s["least"] is None
        else:
            assert s["ok"] and s["least"] > 0


@pytest.mark.slow
def test_a_launcher_that_raises_is_reported(small_sizes, monkeypatch, tmp_path):
    def broken(*args):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(deepkern.OPS[OP].launchers, "triton", broken)
    code, records, _ = run(tmp_path)
    failed = [c for c in of_kind(records, "check") if c["ok"] is False]
    assert code == 1 and failed
    assert all(c["backend"] == "triton" and "no such kernel" in c["note"] for c in failed)


@pytest.mark.slow
def test_an_error_at_a_timed_size_only(small_sizes, plant_wrong_scales, tmp_path):
    (backend,) = timings.timed_backends(OP, machine.device())[:1]
    plant_wrong_scales(backend, lambda x: x.shape == (4, 256))
    code, records, _ = run(tmp_path)
    assert code == 1
    assert all(c["ok"] for c in of_kind(records, "check"))
    skipped = [s for s in of_kind(records, "speed") if s["provider"] == f"deepkern {backend}"]
    assert skipped
    assert all(s["samples"] == [] and "not timed" in s["note"] for s in skipped)


def test_a_baseline_without_outputs():
    ok, error, why = checks.compare_plain(OP, (), (torch.ones(2),), (None,))
    assert ok is None and error is None and why


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1])),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, float("nan")])),
        (torch.tensor([1.0, float("inf")]), torch.tensor([1.0, 2.0])),
        (torch.tensor([1, 2]), torch.tensor([1, 3])),
        (torch.zeros(2), torch.zeros(3)),
    ],
    ids=["value", "nan", "inf", "integer", "shape"],
)
def test_compare_plain_finds_differences(got, want):
    assert checks.compare_plain(OP, (), (got,), (want,))[0] is False
    assert checks.compare_plain(OP, (), (want,), (want.clone(),))[0] is True


def test_results_are_written_whole(tmp_path):
    file = tmp_path / "run.jsonl"
    results.write([{"kind": "machine", "value": float("nan")}], file)
    assert json.loads(file.read_text()) == {"kind": "machine", "value": "nan"}
    with pytest.raises(TypeError):
        results.write([{"kind": "machine"}, {"bad": object()}], file)
    assert json.loads(file.read_text())["value"] == "nan", "the old file stays"
    assert list(tmp_path.iterdir()) == [file]


def test_names_of_result_files(tmp_path):
    facts = {"time": "2026-11-23T12:52:39+00:00", "gpu": None}
    assert results.path(facts, False, tmp_path).name == "2026-11-23T12-52-39-cpu.jsonl"
    assert results.path(facts, True, tmp_path).name == "2026-11-23T12-52-39-cpu-kept.jsonl"
    (tmp_path / "2026-11-23T12-52-39-cpu.jsonl").touch()
    assert results.path(facts, False, tmp_path).name == "2026-11-23T12-52-39.2-cpu.jsonl"
    facts["gpu"] = {"name": "NVIDIA H200"}
    assert results.path(facts, False, tmp_path).name == "2026-11-23T12-52-39-nvidia-h200.jsonl"
