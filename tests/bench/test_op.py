"""`python -m bench op`: tables, records, shapes, ceilings, and what is wrong."""

from __future__ import annotations

import functools
import io
import json
import math
from dataclasses import replace

import pytest
import torch
import typer
from rich.console import Console

import deepkern
from bench import ceilings, checks, machine, op, report, rotation, shapes, timings
from bench.ceilings import Ceilings
from bench.studies import cpu_ops
from bench.timings import Request
from deepkern.testing import ops
from deepkern.testing.costs import Cost, tensor_bytes
from deepkern.testing.providers import Provider
from deepkern.testing.timing import Timing

OP, SIZE, CPU = "cast_per_token", "M=4,K=256", torch.device("cpu")
RATES = Ceilings(10.0, {"fp32": 0.1, "bf16": 0.05})


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Fixed ceilings and few checks: these tests are not about speed."""
    monkeypatch.setattr(ceilings, "measure", lambda device: RATES)
    sizes = ops.sizes(OP)
    tiny = ops.Sizes(small=sizes.small[:1], cpu=[{"M": 8, "K": 128}], gpu=[{"M": 8, "K": 128}])
    monkeypatch.setattr(ops.facts(OP), "SIZES", tiny)


def run(folder, *wanted: str, **options) -> tuple[int, list[dict], str]:
    """Exit code, records and printed text."""
    output = io.StringIO()
    console = Console(file=output, width=200)
    options = {"against": ["eager"], "seconds": 0.001, **options}
    code = op.run([OP], wanted or ("default",), folder=folder, console=console, **options)
    (file,) = folder.glob("*.jsonl")
    return code, [json.loads(line) for line in file.read_text().splitlines()], output.getvalue()


def speeds(records: list[dict]) -> dict[str, dict]:
    return {r["provider"]: r for r in records if r["kind"] == "speed"}


def test_records_and_table(tmp_path):
    code, records, text = run(tmp_path, SIZE, "default")
    assert code == 0 and "Everything that was checked agrees" in text
    about, verdict = records[0], records[-1]
    assert about["schema"] == 2 and about["command"] and about["driver"] is about["clocks"] is None
    assert about["ceilings"] == {"copy_gb_per_s": 10.0, "matmul_tflops": RATES.matmul_tflops}
    assert verdict["kind"] == "verdict" and verdict["disagreements"] == 0
    timed = [r for r in records if r["kind"] == "speed"]
    assert {(r["size"], r["shapes"]) for r in timed} == {
        ("M=4 K=256", "given"), ("M=8 K=128", "default"),
    }  # fmt: skip
    ours = next(r for r in timed if r["provider"].startswith("deepkern"))
    assert ours["ok"] and ours["error"] == 0 == ours["tolerance"] and ours["note"] == ""
    assert ours["least"] == min(ours["samples"]) <= ours["median"] and len(ours["samples"]) <= 31
    moved = 4 * 256 * 2 + 4 * 256 + 4 * 2 * 4
    assert (ours["bytes"], ours["flops"], ours["fp8"]) == (moved, 0, False)
    assert ours["gb_per_s"] == pytest.approx(moved / ours["least"] / 1e3)
    assert ours["roof_us"] == pytest.approx(moved / 10.0 / 1e3) and ours["limit"] == "memory"
    assert ours["roof_share"] == pytest.approx(ours["roof_us"] / ours["least"])
    assert ours["tflops"] is ours["host"] is ours["graph"] is None
    assert f"{OP} (ratio above 1: faster than eager)" in text
    assert "M=4 K=256" in text and "amax, divide and cast, op by op" in text


def test_a_wrong_kernel_has_no_time_and_fails(plant_wrong_scales, tmp_path):
    """It differs at the timed size only, so that the checks of small sizes pass."""
    (backend,) = timings.timed_backends(OP, machine.device())[:1]
    plant_wrong_scales(backend, lambda x: x.shape == (4, 256))
    code, records, text = run(tmp_path, SIZE)
    ours = speeds(records)[f"deepkern {backend}"]
    assert code == 1 and records[-1]["disagreements"] == 1
    assert ours["ok"] is False and ours["samples"] == [] and ours["least"] is None
    assert "not timed" in ours["note"] and "1 disagreements" in text
    assert speeds(records)["eager"]["samples"]


def test_one_wrong_row_of_many_is_found(monkeypatch, tmp_path):
    """Its diff over all values, 1e-5, is below the tolerance."""
    rows, want = 4096, torch.randn(4096, 64)
    got = want.clone()
    got[-1] = got[-1] * 0.7
    ok, error, _ = checks.compare_plain(OP, (), (got,), (want,))
    assert ok and error < checks.PLAIN_TOLERANCE
    assert checks.worst_row((got,), (want,)) > checks.ROW_TOLERANCE
    assert checks.worst_row((want.bfloat16().float(),), (want,)) < checks.ROW_TOLERANCE / 100
    launch = deepkern.OPS[OP].launcher("torch")

    def wrong(x, *rest):
        q, scale = launch(x, *rest)
        if len(x) == rows:
            scale[-1] *= 0.7
        return q, scale

    monkeypatch.setitem(deepkern.OPS[OP].launchers, "torch", wrong)
    monkeypatch.setattr(timings, "REFERENCE_BYTES", {"cpu": 0})
    code, records, _ = run(tmp_path, f"M={rows},K=128", backends=["torch"])
    ours = speeds(records)["deepkern torch"]
    assert code == 1 and "a row differs" in ours["note"] and ours["samples"] == []


def test_a_wrong_provider_has_no_time_and_does_not_fail(monkeypatch, tmp_path):
    def providers(x, **rest):
        return [Provider("quack", "", lambda: deepkern.reference.cast_per_token(x * 2))]

    monkeypatch.setattr(ops.facts(OP), "providers", providers, raising=False)
    code, records, text = run(tmp_path, SIZE, against=["quack", "eager"])
    wrong = speeds(records)["quack"]
    assert code == 0 and records[-1]["disagreements"] == 0
    assert wrong["ok"] is False and wrong["samples"] == [] and wrong["least"] is None
    assert "diff to reference" in wrong["note"] and wrong["note"] in text
    assert all(r["samples"] for name, r in speeds(records).items() if name != "quack")


def test_a_backend_that_failed_a_check_is_not_timed(plant_wrong_scales, tmp_path):
    small = ops.sizes(OP).small[0]["M"]
    plant_wrong_scales("torch", lambda x: len(x) == small)
    code, records, _ = run(tmp_path, SIZE, backends=["torch"])
    assert code == 1 and {r["backend"] for r in records if r["kind"] == "check"} == {"torch"}
    assert speeds(records)["deepkern torch"]["note"] == "not timed: its check failed"


@pytest.mark.parametrize("fits", [True, False])
def test_sizes_that_do_not_fit_are_skipped(fits, monkeypatch, tmp_path):
    size = "M=20000,K=20000"
    monkeypatch.setattr(shapes, "free_memory", lambda device: 1 << 30)
    code, records, text = run(tmp_path, SIZE if fits else size)
    assert code == 0 and bool(speeds(records)) is fits
    assert ("skipped: cast_per_token M=20000 K=20000: needs 6.0 GiB, 1.0 GiB" in text) is not fits


def test_calls_that_take_too_long_are_skipped(monkeypatch, tmp_path):
    monkeypatch.setattr(ceilings, "measure", lambda *args: Ceilings(1e-7, {"fp32": 1.0}))
    _, records, text = run(tmp_path, SIZE)
    assert not speeds(records) and "a call takes at least 31 s on this device" in text


def test_an_op_without_shapes_says_so(tmp_path):
    output = io.StringIO()
    console = Console(file=output, width=200)
    assert op.run([OP], ["flashmla"], folder=tmp_path, console=console) == 2
    assert "cast_per_token has no shapes 'flashmla'" in output.getvalue()
    assert not list(tmp_path.iterdir()), "no result"


@pytest.mark.parametrize("wanted", ["deepseek", "M=x", "H=3", "M=4 K"])
def test_wrong_shapes(wanted, tmp_path):
    with pytest.raises(typer.BadParameter):
        run(tmp_path, wanted)


def test_large_sizes_are_compared_with_eager(monkeypatch):
    monkeypatch.setitem(timings.REFERENCE_BYTES, "cpu", 0)
    request = Request(CPU, RATES, seconds=0.001, backends=("torch",))
    ours, eager = timings.time_op(OP, {"M": 4, "K": 256}, request)
    assert (ours.against, eager.against) == ("eager", "deepkern torch")
    assert ours.samples and eager.samples
    assert ours.tolerance == eager.tolerance == 2e-5 and ours.error == eager.error == 0.0
    launch = deepkern.OPS[OP].launcher("torch")
    wrong = {"torch": lambda *args: (launch(*args)[0], launch(*args)[1] * 2)}
    monkeypatch.setattr(deepkern.OPS[OP], "launchers", wrong)
    ours, eager = timings.time_op(OP, {"M": 4, "K": 256}, request)
    assert not ours.ok and not eager.ok and ours.samples == eager.samples == ()
    assert (
        "diff to eager" in ours.note and eager.note == "not timed: no other result agrees with it"
    )


def test_a_size_that_fails_is_an_error(tmp_path, monkeypatch):
    made = ops.facts(OP).inputs

    @functools.wraps(made)
    def inputs(generator, **size) -> tuple:
        if size["M"] == 7:
            raise RuntimeError("no inputs")
        return made(generator, **size)

    monkeypatch.setattr(ops.facts(OP), "inputs", inputs)
    code, records, text = run(tmp_path, "M=7,K=3")
    assert code == 1 and "RuntimeError" in speeds(records)["deepkern"]["note"]
    assert "1 disagreements" in text


def test_table_of_a_gpu():
    ours = timings.Speed(
        OP, "M=4 K=256", "given", "deepkern cuda", error=0.0, samples=(5.0, 7.0), least=5.0,
        median=6.0, spread=0.1, graph=4.5, host=3.25, gb_per_s=1200.0, roof_share=0.5,
        limit="memory",
    )  # fmt: skip
    eager = replace(ours, provider="eager", least=10.0, median=12.0, host=9.5, graph=None)
    failed = timings.Speed(OP, ours.size, "given", "deep_gemm", ok=False, note="ImportError: x")
    eager = replace(eager, note="no CUDA graph: RuntimeError: item()")
    output = io.StringIO()
    Console(file=output, width=200).print(report.timed([[ours, eager, failed]]))
    text = output.getvalue()
    assert "M=4 K=256 (limit: memory)\n" in text
    assert text.split("deepkern cuda")[1].splitlines()[0].split() == [
        "5", "6", "10%", "4.5", "3.25", "1,200", "50%", "2.00", "0e+00",
    ]  # fmt: skip
    assert "9.5" in text and "\n    no CUDA graph: RuntimeError: item()\n" in text
    assert "deep_gemm\n    ImportError: x\n" in text
    assert (ours.microseconds, eager.microseconds, failed.microseconds) == (6.0, 12.0, None)


def test_the_study_of_linear_layers(monkeypatch, tmp_path):
    for name, value in (("PRODUCTS", ((256, 128),)), ("ROWS", (3,)), ("WEIGHT_BYTES", 1 << 19)):
        monkeypatch.setattr(cpu_ops, name, value)
    for wrong in (False, True):
        if wrong:
            monkeypatch.setitem(cpu_ops.providers.__globals__, "F", WrongLinear)
        folder = tmp_path / str(wrong)
        assert cpu_ops.run(0.001, folder=folder, console=Console(file=io.StringIO())) == 0
        (file,) = folder.glob("*cpu-ops.jsonl")
        got = speeds([json.loads(line) for line in file.read_text().splitlines()])
        assert got["deepkern cpu"]["samples"] and got["deepkern cpu"]["size"] == "M=3 N=256 K=128"
        assert bool(got["linear_bf16"]["samples"]) is not wrong
        assert ("not timed: diff" in got["linear_bf16"]["note"]) is wrong


class WrongLinear:
    @staticmethod
    def linear(x, w):
        return 2 * torch.nn.functional.linear(x, w)


# Shapes.


@pytest.mark.parametrize("name", sorted(shapes.SETS))
def test_named_shapes_are_arguments_of_inputs(name):
    for op_name, sizes in shapes.SETS[name].items():
        assert sizes and len({str(size) for size in sizes}) == len(sizes), op_name
        for size in sizes:
            words = [f"{argument}=1" for argument in size]
            assert set(shapes.parse_size(op_name, words)) == set(size)


def test_every_op_has_shapes_of_the_model():
    assert set(shapes.SETS["deepseek-v3"]) == set(deepkern.OPS)


@pytest.mark.parametrize(("call", "made"), [(0.005, 8), (0.02, 5), (0.15, 3), (0.3, 1)])
def test_copies_that_are_not_timed_are_not_warmed_up(call, made, monkeypatch):
    """8 copies; at 0.1 s for each provider a call of 0.3 s is timed once, of the first copy."""
    now = [0.0]

    def slow() -> None:
        now[0] += call

    monkeypatch.setattr(timings.time, "perf_counter", lambda: now[0])
    entry = timings.Entry(timings.Speed(OP, SIZE, "given", "eager"), Provider("eager", "", slow))
    calls = timings.warmed_up(entry, [slow] * 8, 0.1)
    assert len(calls) == made and now[0] == pytest.approx(made * call)


def test_sizes_as_words():
    text = "lengths=8192,4096,H=16 causal=False,cache_dtype=uint8"
    assert shapes.parse_size("mla_decode", shapes.words(text)) == {
        "lengths": (8192, 4096), "H": 16, "causal": False, "cache_dtype": torch.uint8,
    }  # fmt: skip
    assert shapes.of("mla_decode", "lengths=5", CPU) == ("given", [{"lengths": (5,)}])
    assert shapes.of("mla_prefill_backward", "lengths=5,H=2", CPU)[1] == [{"lengths": (5,), "H": 2}]
    with pytest.raises(ValueError, match="expected NAME=VALUE with a NAME of M, N, K"):
        shapes.of("gemm_nt", "M=1,Q=2", CPU)


def test_text_of_sizes():
    assert checks.text({"M": 3, "dtype": torch.float32}) == "M=3 dtype=float32"
    assert checks.text({"lengths": (4096,) * 64}) == "lengths=(4096,)*64"
    assert checks.text({"lengths": (5, 6, 7, 8, 9)}) == "lengths=(5, 6, 7, 8, 9)"


def test_small_shapes_are_not_empty():
    for op_name in deepkern.OPS:
        for size in shapes.of(op_name, "small", CPU)[1]:
            assert tensor_bytes(shapes.inputs(op_name, size, CPU)) > 0
            assert not {0, ()} & {size.get(k) for k in ("M", "N", "K", "T", "lengths")}


# Ceilings and rotation.


def test_roof():
    memory, compute = Cost(10_000), Cost(10_000, 1_000_000)
    assert RATES.roof(memory, CPU) == (pytest.approx(1.0), "memory")
    assert RATES.roof(compute, CPU) == (pytest.approx(10.0), "compute"), "the faster dtype"
    gpu, rates = torch.device("cuda"), Ceilings(1.0, {"bf16": 100.0, "fp8": 200.0})
    work = Cost(1, 2 * 10**12)
    assert rates.roof(work, gpu).microseconds == pytest.approx(2e4)
    assert rates.roof(work._replace(fp8=True), gpu).microseconds == pytest.approx(1e4)


def test_ceilings_are_measured(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(ceilings, "CPU_SIZE", 64)
    got = ceilings.measure(CPU, 0.001)
    assert set(got.matmul_tflops) == {"fp32", "bf16"} and 0 < got.copy_gb_per_s < 2000
    assert all(0 < rate < 100 for rate in got.matmul_tflops.values())
    assert ceilings.time_of(Timing((3.0, 1.0, 2.0), 3), CPU) == 1.0
    assert ceilings.time_of(Timing((3.0, 1.0, 2.0), 3), torch.device("cuda")) == 2.0


def test_a_dtype_that_cannot_be_multiplied_is_absent(monkeypatch):
    def fails():
        raise RuntimeError("no such product")

    monkeypatch.undo()
    monkeypatch.setattr(ceilings, "bandwidth", lambda *args: 1.0)
    products = {"fp32": lambda: None, "fp8": fails}
    monkeypatch.setattr(ceilings, "products", lambda device, size: products)
    assert set(ceilings.measure(CPU, 0.001).matmul_tflops) == {"fp32"}


def test_variants_exceed_the_cache(monkeypatch):
    monkeypatch.setattr(rotation, "last_level_cache", lambda device: 1 << 20)
    x = torch.randn(300, 512)[:, ::2]
    got = rotation.variants((x, None, 3), CPU)
    assert sum(tensor_bytes(args) for args in got) > 1 << 20
    assert len({args[0].data_ptr() for args in got}) == len(got) == 5
    assert all(torch.equal(args[0], x) and args[0].stride() == x.stride() for args in got)
    assert all(args[1:] == (None, 3) for args in got)
    monkeypatch.setattr(rotation, "MOST_BYTES", 3 * tensor_bytes(x))
    assert len(rotation.variants((x,), CPU)) == 3
    assert len(rotation.variants((torch.ones(1),), CPU)) <= 32


def test_sizes_of_caches():
    assert [rotation.parse(text) for text in ("32K\n", "512K", "260M", "64")] == [
        32 << 10, 512 << 10, 260 << 20, 64,
    ]  # fmt: skip
    assert rotation.last_level_cache(CPU) >= 1 << 18 and not math.isinf(rotation.UNKNOWN_CACHE)


@pytest.mark.parametrize(
    ("argv", "want"),
    [
        (["bench/__main__.py", "op", "a b"], "python -m bench op 'a b'"),
        (["bench/studies/cpu_ops.py"], "python -m bench.studies.cpu_ops"),
        (["/usr/bin/pytest", "-q"], "pytest -q"),
    ],
)
def test_command_as_typed(argv, want, monkeypatch):
    first = argv[0] if argv[0].startswith("/") else str(machine.ROOT / argv[0])
    monkeypatch.setattr("sys.argv", [first, *argv[1:]])
    assert machine.command() == want
