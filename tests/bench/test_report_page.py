"""The report of results as an HTML page: which records it shows, and the numbers in its parts."""

from __future__ import annotations

import copy

import pytest
from rich.console import Console

from bench import budgets, figures, predictions, results
from bench.pages import devices, plots, report, speeds, tables
from tests.bench.synthetic_results import CPU, GPU, OPS, records, run, speeds_of

# Which records are shown.


def test_the_newest_record_of_each_subject_is_shown():
    old, new = run(day=1), run(day=2, ops=["route_topk"])
    (device,) = devices.of([new, old])
    shown = {(r["op"], run.file.name) for run, r in device.records("speed")}
    assert shown == {(op, "2.jsonl" if op == "route_topk" else "1.jsonl") for op in OPS}
    assert [run for run, _ in device.records("model")] == [new] * len(new.of("model"))
    assert device.shown() == [new, old]
    everything = run(day=3)
    assert devices.of([old, everything])[0].shown() == [everything]


def test_gpus_come_before_cpus_and_the_newest_first():
    other = copy.deepcopy(run(day=5))
    other.machine["gpu"]["name"] = "NVIDIA A100"
    found = devices.of([run(CPU, day=9), run(day=1), other])
    assert [d.name for d in found] == ["NVIDIA A100", "NVIDIA H200", "AMD EPYC, 2 cores"]


def test_results_of_another_schema_are_skipped(tmp_path):
    good, old = tmp_path / "good.jsonl", tmp_path / "old.jsonl"
    results.write(records(CPU, ops=["route_topk"]), good)
    head = {k: v for k, v in records(CPU, ops=[])[0].items() if k != "schema"}
    results.write([head], old)
    out, console = tmp_path / "made" / "report.html", Console(record=True, width=200)
    assert report.run([good, old], out, console) == 0
    lines = console.export_text().splitlines()
    assert "old.jsonl" in lines[0] and lines[-1] == str(out), "the path comes last"
    assert "old.jsonl" in out.read_text()
    assert [file.name for file in out.parent.iterdir()] == ["report.html"]


def test_committed_results_are_the_default(monkeypatch):
    committed = results.Runs([run(CPU)])
    committed.skipped = ["older.jsonl"]
    monkeypatch.setattr(results, "committed", lambda: committed)
    assert report.load([]) == ([committed[0]], ["older.jsonl"])


def test_a_page_without_results():
    page = report.page([])
    assert "No result of a device." in page and "0 checks agree" in page


# Ratios, sizes and predictions.


@pytest.mark.parametrize(("device", "key"), [(GPU, "median"), (CPU, "least")])
def test_a_ratio_is_of_medians_on_a_gpu_and_of_least_times_on_a_cpu(device, key):
    for row in speeds.rows(devices.of([run(device)])[0]):
        eager = next(r for r in row.records if r["provider"] == "eager")
        ours = row.ours()
        assert ours[0][key] == min(r[key] for r in ours)
        assert row.best_ratio() == eager[key] / ours[0][key]
        assert row.ratio(eager) == 1


def test_an_untimed_provider_has_no_ratio():
    def untimed_eager(found):
        for r in speeds_of(found, "route_topk"):
            if r["provider"] == "eager":
                r.update(least=None, median=None, samples=[], note="RuntimeError: no memory")

    (device,) = devices.of([run(change=untimed_eager)])
    rows = [row for row in speeds.rows(device) if row.op == "route_topk"]
    assert {row.best_ratio() for row in rows} == {None}
    styles = plots.styles(speeds.providers(rows))
    (strip,) = report.drawn.summaries(rows, styles)
    (bar,) = strip.bars
    assert bar.note == "eager: RuntimeError: no memory" and not bar.marks


def test_sizes():
    assert speeds.series("N=7168 M=64 lengths=(8, 8)") == ("M", "N=7168 lengths=(8, 8)", 64)
    assert speeds.series("lengths=(8192,) batch=32 H=16") == ("batch", "lengths=(8192,) H=16", 32)
    assert speeds.series("E=256") is None
    assert speeds.short("lengths=(64, 64, 64) H=16") == "lengths=(64 x 3) H=16"
    assert speeds.short("lengths=(1024, 16384) batch=(8,)") == "lengths=(1024, 16384) batch=(8,)"


@pytest.mark.parametrize(
    ("low", "high"), [(0.9, 1.1), (0.3, 12), (1, 8192), (2e-4, 0.1), (0.01, 2e4), (5, 5)]
)
def test_ticks_are_few_and_inside(low, high):
    axis = plots.axis([low, high])
    ticks = axis.ticks(6)
    assert 1 <= len(ticks) <= 6
    assert all(0 <= tick.at <= 100.01 for tick in ticks)
    assert len({tick.text for tick in ticks}) == len(ticks)
    assert 0 <= axis(low) <= axis(high) <= 100
    assert axis.up(high) == pytest.approx(100 - axis(high))


def test_styles_of_many_providers_differ():
    names = ["deepkern cuda", "deepkern triton", "eager", "compile", *"abcdefghijkl"]
    styles = plots.styles(names)
    assert len(set(styles.values())) == len(names)
    assert {styles[n].shape for n in names if n.startswith("deepkern")} == {"circle"}


def test_predictions_next_to_measurements_of_the_same_size():
    (device,) = devices.of([run()])
    seen = tables.measured([device], {device.name: speeds.rows(device)})
    timed = {
        line.cells[3].text: line.cells[6].text
        for line in tables.predicted(predictions.load(), seen).lines
        if line.cells[0].text == "fp8_gemm_nt"
        and (line.filters["target"], line.filters["backend"]) == ("sm_90", "triton")
    }
    row = next(row for _, row in seen if row.size == "M=4096 N=7168 K=16384")
    (triton,) = [r for r in row.ours() if r["provider"] == "deepkern triton"]
    assert timed["4096 x 7168 x 16384"] == f"{triton['median']:,.0f}"
    assert timed["1 x 4096 x 4096"] == "not measured", "no such size was timed"
    bounds = tables.bounds(figures.load(), seen).lines
    assert len(bounds) == len(figures.load())
    reached = {line.cells[0].text for line in bounds if line.cells[6].value is not None}
    assert reached == set(OPS), "of sm_90 alone"
    nothing = tables.bounds(figures.load(), []).lines
    assert {line.cells[6].text for line in nothing} == {"not measured"}


def test_every_compiled_kernel_is_listed():
    lines = tables.inspected(budgets.load()).lines
    assert sum(line.cells[3].value for line in lines) == len(budgets.load())


def test_only_checks_of_deepkern_disagree():
    def refuse(found):
        for r in speeds_of(found, "fp8_gemm_nt"):
            if r["provider"] == "deep_gemm":
                r["ok"] = False

    (device,) = devices.of([run(change=refuse)])
    assert tables.failures(device) == []

    def differ(found):
        refuse(found)
        r = next(r for r in speeds_of(found, "fp8_gemm_nt") if r["provider"] == "deepkern triton")
        r.update(ok=False, error=0.1, samples=[], least=None, median=None, note="diff 0.1 > 2e-05")

    (device,) = devices.of([run(change=differ)])
    assert [note for _, note in tables.failures(device)] == ["diff 0.1 > 2e-05"]
