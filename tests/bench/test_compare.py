"""`python -m bench compare`: verdicts and exit codes; false alarms and detection under noise."""

from __future__ import annotations

import io
import timeit
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import deepkern
from bench import ceilings, compare, op, results
from bench.ceilings import Ceilings
from bench.sides import Side
from deepkern.testing.ops import facts
from deepkern.testing.timing import time_calls
from tests.bench.result_files import (
    CHECK,
    EAGER,
    GPU,
    MACHINE,
    SPEED,
    failed,
    rate,
    speed,
    written,
)  # fmt: skip

STEADY = [100.0, 101, 100, 102, 101, 100, 101, 103, 100, 101]
EAGER_TIMES = [300.0, 301, 299, 300, 302, 300, 301, 300, 300, 299]


def compared(old: Path, new: Path, **options) -> tuple[int, str]:
    output = io.StringIO()
    code = compare.run(old, new, console=Console(file=output, width=220), **options)
    return code, output.getvalue()


def two_files(folder: Path, old: list[dict], new: list[dict], machine: dict = MACHINE) -> tuple:
    """The exit code and the text of comparing two files of these records."""
    files = [written(folder / f"{name}.jsonl", *records, machine=machine)
             for name, records in (("old", old), ("new", new))]  # fmt: skip
    return compared(*files)


def row(factor: float = 1.0, drift: float = 1.0, provider: str = "deepkern cpu") -> list[dict]:
    """A call that is `factor` times as slow, on a machine that is `drift` times as slow."""
    return [speed(provider, np.array(STEADY) * factor * drift),
            speed("eager", np.array(EAGER_TIMES) * drift)]  # fmt: skip


@pytest.mark.parametrize(
    ("factor", "verdict", "code"),
    [(1.3, "slower", 1), (1.0, "same", 0), (0.7, "faster", 0), (1.05, "unclear", 0)],
)
@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
def test_a_steady_machine(tmp_path, factor, verdict, code, gpu):
    provider = "deepkern cuda" if gpu else "deepkern cpu"
    old, new = row(provider=provider), row(factor, 1.0 if gpu else 1.1, provider)
    got, text = two_files(tmp_path, old, new, GPU if gpu else MACHINE)
    assert got == code and f"1 {verdict};" in text, text


def test_drift_of_a_cpu_is_not_a_change(tmp_path):
    """Nor is there a verdict on a machine that was much slower."""
    assert "1 same;" in two_files(tmp_path, row(), row(1.0, 1.15))[1]
    code, text = two_files(tmp_path, row(), row(2.0, 1.8))
    assert code == 0 and "1 unclear;" in text and "eager changed by 1.8x" in text


def test_drift_of_a_gpu_is_a_change(tmp_path):
    code, text = two_files(tmp_path, row(), row(1.0, 1.2), GPU)
    assert code == 1 and "1 slower;" in text


def test_least_and_median_have_to_agree(tmp_path):
    """One undisturbed round of ten: the call can still be as fast as before."""
    disturbed = [speed("deepkern cpu", [100.0, *[x * 1.5 for x in STEADY[1:]]]), row()[1]]
    code, text = two_files(tmp_path, row(), disturbed)
    assert code == 0 and "least and median disagree" in text


def test_the_anchor_has_enough_rounds(tmp_path):
    """A slow eager is timed once; then the provider with the most rounds is the anchor."""
    slow = speed("eager", [9e5])
    others = [speed("compile", EAGER_TIMES[:7]), speed("linear_bf16", EAGER_TIMES)]
    code, text = two_files(tmp_path, [row()[0], slow, *others], [row(1.3)[0], slow, *others])
    assert code == 1 and "linear_bf16" in text and "compile" not in text
    text = two_files(tmp_path, [*row(), *others], [*row(), *others])[1]
    assert "  eager " in text and "linear_bf16" not in text
    text = two_files(tmp_path, [*row(), *others], [row()[0], slow, others[0]])[1]
    assert "  compile " in text


def test_few_rounds_are_unclear(tmp_path):
    """The note says which option gives enough of them."""
    slow = [speed("deepkern cpu", [90e3] * 3), speed("eager", [290e3, 300e3, 310e3])]
    code, text = two_files(tmp_path, row(), slow)
    assert code == 0 and "3 rounds, 5 are needed: --seconds 6" not in text
    code, text = two_files(tmp_path, slow, slow)
    assert code == 0 and "3 rounds, 5 are needed: --seconds 6" in text
    code, text = two_files(tmp_path, row()[:1], row()[:1])
    assert code == 0 and "no other provider is timed in all runs" in text


def test_a_wrong_result_is_a_regression(tmp_path):
    """In the timed call, in a check and in the model; one that was wrong before is not."""
    broken = [failed("deepkern cpu", "diff 0.1 > 2e-05"), EAGER]
    code, text = two_files(tmp_path, row(), broken)
    assert code == 1 and "diff 0.1 > 2e-05" in text and "1 wrong;" in text
    assert two_files(tmp_path, broken, broken)[0] == 2, "nothing is timed in both"
    wrong = {**CHECK, "ok": False, "note": "NaN at [3]"}
    code, text = two_files(tmp_path, [CHECK], [wrong])
    assert code == 1 and "NaN at [3]" in text and "check on cpu" in text
    logits = rate("logits", 1.0, "")
    code, text = two_files(tmp_path, [logits], [{**logits, "ok": False}])
    assert code == 1 and "1 wrong;" in text


def test_the_models_rates(tmp_path):
    """One value per run: a CPU's drift of 2x is not a regression, a factor of 3 is."""
    old = [rate("decode, bf16", 300.0)]
    code, text = two_files(tmp_path, old, [rate("decode, bf16", 160.0)])
    assert code == 0 and "one value per run" in text
    assert two_files(tmp_path, old, [rate("decode, bf16", 100.0)])[0] == 1
    assert two_files(tmp_path, old, [rate("decode, bf16", 240.0)], GPU)[0] == 1


def test_rows_that_vanished_are_listed(tmp_path):
    other = {**SPEED, "op": "gemm_nt"}
    without_time = {**SPEED, "samples": [], "least": None, "median": None, "note": "too large"}
    code, text = two_files(tmp_path, [*row(), other, CHECK], [without_time, EAGER, CHECK])
    assert code == 2 and "nothing is timed in both" in text
    assert "not in NEW: gemm_nt M=64 deepkern cpu" in text
    assert "not in NEW: fp8_gemm_nt M=64 deepkern cpu has no time: too large" in text
    many = [{**CHECK, "size": f"M={i}"} for i in range(30)]
    text = two_files(tmp_path, [*row(), *many], row())[1]
    assert text.count("not in NEW") == compare.LISTED + 1 and "not in NEW: 20 more" in text


def test_what_does_not_compare(tmp_path):
    """Other device, threads or instruction sets; no common row; a file that is no result."""
    old = written(tmp_path / "old.jsonl", *row())
    for change, reason in (
        ({"cpu": "Xeon"}, "device AMD EPYC, 2 cores and Xeon, 2 cores"),
        ({"threads": 1}, "threads 2 and 1"),
        ({"isa": ["avx2", "avx512f"]}, "isa"),
    ):
        new = written(tmp_path / "new.jsonl", *row(), machine={**MACHINE, **change})
        code, text = compared(old, new)
        assert code == 2 and "cannot compare" in text and reason in text
        assert compared(old, new, across_devices=True)[0] == 0
    code, text = compared(old, written(tmp_path / "other.jsonl", {**SPEED, "op": "gemm_nt"}))
    assert code == 2 and "no row in common" in text
    code, text = compared(old, tmp_path / "absent.jsonl")
    assert code == 2 and "absent.jsonl" in text
    (tmp_path / "old-schema.jsonl").write_text('{"kind": "machine"}\n')
    assert compared(tmp_path / "old-schema.jsonl", old)[0] == 2


def test_facts_that_may_explain_a_change(tmp_path):
    hot = {**GPU, "clocks": {"sm_mhz": 1200, "memory_mhz": 3200, "throttled": ["power"]}}
    old = written(tmp_path / "old.jsonl", *row(), machine=GPU)
    new = written(tmp_path / "new.jsonl", *row(), machine={**hot, "torch": "2.14.0"})
    text = compared(old, new)[1]
    assert "NEW: the GPU's clocks were throttled (power)" in text and "OLD:" not in text
    assert "torch 2.13.0+cpu and 2.14.0" in text


def test_the_slowest_change_is_first(tmp_path):
    """Wrong ones before all."""

    def all_rows(**factors: float) -> list[dict]:
        return [{**r, "op": op} for op, factor in factors.items() for r in row(factor)]

    old = all_rows(a=1, b=1, c=1)
    new = all_rows(a=0.5, b=1.4, c=1.9)
    new += [{**failed("deepkern cpu", "wrong"), "op": "d"}]
    old += [{**SPEED, "op": "d"}]
    text = two_files(tmp_path, old, new)[1]
    lines = [next(i for i, line in enumerate(text.splitlines()) if line.startswith(f"{op} "))
             for op in "dcba"]  # fmt: skip
    assert lines == sorted(lines)


# Several runs a side.


def folder_of(folder: Path, *runs: list[dict], **machine) -> Path:
    """A folder with a result of each run; minutes apart."""
    folder.mkdir(exist_ok=True)
    for i, found in enumerate(runs):
        about = {**MACHINE, "time": f"2026-11-30T09:{i:02}:00+00:00", **machine}
        written(folder / f"{i}.jsonl", *found, machine=about)
    return folder


def test_a_side_of_several_runs(tmp_path):
    """Their samples count together, and the least time of all."""
    old = folder_of(tmp_path / "old", *[row(drift=d) for d in (1.0, 1.1, 1.05)])
    new = folder_of(tmp_path / "new", *[row(1.3, d) for d in (1.0, 1.1, 1.2)])
    code, text = compared(old, new)
    assert code == 1 and "1 slower; runs: 3 a side;" in text, text
    assert "3 runs, AMD EPYC, 2 cores, commit 0123456789ab\n" in text and "alternate" not in text
    (line,) = (line for line in text.splitlines() if line.startswith("slower"))
    assert line.split()[-5:] == ["100", "130", "eager", "299", "299"], line
    code, text = compared(old, tmp_path / "new" / "0.jsonl")
    assert code == 1 and "runs: 3 old, 1 new;" in text


def test_runs_that_differ_as_much_as_the_sides_do(tmp_path):
    """One run of NEW is slower: a side of one run calls that slower, three runs do not."""
    old = folder_of(tmp_path / "old", row(), row(), row())
    new = folder_of(tmp_path / "new", row(1.3), row(), row())
    assert compared(old / "0.jsonl", new / "0.jsonl")[0] == 1
    code, text = compared(old, new)
    assert code == 0 and "1 unclear;" in text and "more alternating runs" in text


def test_a_call_that_is_wrong_in_one_run_is_wrong(tmp_path):
    old = folder_of(tmp_path / "old", row(), row())
    new = folder_of(tmp_path / "new", row(), [failed("deepkern cpu", "diff 0.1"), EAGER])
    code, text = compared(old, new)
    assert code == 1 and "1 wrong" in text and "diff 0.1" in text


def test_rates_of_several_runs(tmp_path):
    """The fastest of each side; wider than the drift of one run where the runs differ by more."""
    old = folder_of(tmp_path / "old", *([rate("decode", v)] for v in (300.0, 290.0)))
    new = folder_of(tmp_path / "new", *([rate("decode", v)] for v in (100.0, 97.0)))
    code, text = compared(old, new)
    assert code == 1 and "300" in text and "100" in text
    new = folder_of(tmp_path / "new", *([rate("decode", v)] for v in (100.0, 30.0)))
    assert compared(old, new)[0] == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"commit": "ffff"}, "commit 0123456789ab and ffff"),
        ({"commit": "0123456789ab+"}, "commit 0123456789ab and 0123456789ab+"),
        ({"threads": 1}, "threads 2 and 1"),
        ({"isa": ["avx512f"]}, "isa"),
        ({"cores": 4}, "device AMD EPYC, 2 cores and AMD EPYC, 4 cores"),
    ],
)
def test_runs_of_one_side_are_alike(change, reason, tmp_path):
    """The message names the two files."""
    old = folder_of(tmp_path / "old", row(), row())
    written(old / "2.jsonl", *row(), machine={**MACHINE, **change})
    for sides in ((old, old / "0.jsonl"), (old / "0.jsonl", old)):
        code, text = compared(*sides, across_devices=True)
        assert code == 2 and reason in text and "0.jsonl and 2.jsonl" in text
    (tmp_path / "empty").mkdir()
    code, text = compared(old / "0.jsonl", tmp_path / "empty")
    assert code == 2 and "no results (*.jsonl)" in text


def test_dirty_runs_and_runs_in_blocks_are_named(tmp_path):
    dirty = folder_of(tmp_path / "dirty", row(), row(), commit="0123456789ab+")
    later = folder_of(tmp_path / "later", row(), row(), time="2026-12-01T09:00:00+00:00")
    text = compared(dirty, later)[1]
    assert "commit 0123456789ab with changed files (dirty)" in text
    assert "OLD is dirty: nothing shows that its runs are of the same code" in text
    assert "older than those of the other: alternate them" in text
    text = compared(dirty / "0.jsonl", later / "0.jsonl")[1]
    assert "dirty" in text and "nothing shows" not in text and "alternate" not in text


# A GPU's clock.


def at_clock(mhz: int | None, us: float, limit: str = "compute") -> tuple[dict, list[dict]]:
    clocks = {"sm_mhz": mhz, "memory_mhz": 3200, "throttled": []} if mhz else None
    return {**GPU, "clocks": clocks}, [
        speed("deepkern cuda", np.array(STEADY) * us / 100, limit=limit)
    ]


@pytest.mark.parametrize(
    ("old", "new", "limit", "verdict"),
    [
        ((1980, 100), (1760, 112.5), "compute", "same"),  # the clock explains it
        ((1980, 100), (1760, 112.5), "memory", "slower"),
        ((1980, 100), (None, 112.5), "compute", "slower"),
        ((1980, 100), (1760, 135), "compute", "slower"),
        ((1980, 100), (1100, 180), "compute", "unclear"),  # past MOST_DRIFT
    ],
)
def test_times_relative_to_the_clock(old, new, limit, verdict, tmp_path):
    files = [written(tmp_path / f"{name}.jsonl", *found, machine=about)
             for name, (about, found) in (("old", at_clock(*old, limit)),
                                          ("new", at_clock(*new, limit)))]  # fmt: skip
    text = compared(*files)[1]
    assert f"1 {verdict};" in text, text
    noted = limit == "compute" and new[0] is not None
    assert ("SM clock" in text) is noted and ("1,980" in text) is noted


# The table.


def test_a_narrow_table_cuts_nothing(tmp_path):
    """At 80 columns, and at 40 with more lines; no line is padded."""
    size = "lengths=(16384,)*64 H=128 cache_dtype=uint8 page=64 causal=False Sq=2"
    old, new = ([{**r, "size": size, "op": "m_grouped_fp8_gemm_nt_contiguous"} for r in found]
                for found in (row(1234.5), row(1604.8)))  # fmt: skip
    files = [written(tmp_path / f"{i}.jsonl", *found) for i, found in enumerate((old, new))]
    for width in (80, 40):
        output = io.StringIO()
        compare.run(*files, console=Console(file=output, width=width))
        table = output.getvalue().split("Change of the")[1].split("1 slower")[0].splitlines()
        assert all(len(line) <= width and line == line.rstrip() for line in table), table
        words = " ".join(table).split()
        for text in (*size.split(), "+30", "123,450", "160,480", "eager", "299"):
            assert text in words, (text, table)


# Noise. Each model gives the factors by which the rounds of two calls are slower: [rounds, 2].


def steady(rng: np.random.Generator, rounds: int) -> np.ndarray:
    return np.exp(0.02 * rng.standard_normal((rounds, 2)))


def stalls(rng: np.random.Generator, rounds: int) -> np.ndarray:
    """A fifth of all rounds has one to five stalls, each as long as the round."""
    hit = rng.random((rounds, 2)) < 0.2
    return steady(rng, rounds) * (1 + hit * rng.integers(1, 6, (rounds, 2)))


def drift(rng: np.random.Generator, rounds: int) -> np.ndarray:
    """The machine is up to 2x slower, and changes in the run; one call suffers 10 % more of it."""
    level = rng.uniform(0, np.log(2)) + np.cumsum(0.03 * rng.standard_normal(rounds))
    return steady(rng, rounds) * np.exp(np.outer(level, [1.1, 1.0]))


def heavy_tails(rng: np.random.Generator, rounds: int) -> np.ndarray:
    """Pareto: the mean is infinite."""
    return 1 + 0.05 * rng.pareto(1.0, (rounds, 2))


def load(rng: np.random.Generator, rounds: int) -> np.ndarray:
    """Other work slows the call and its anchor for the whole run, each by a factor of its own.

    Their ratio differs by 12 % (standard deviation) between two runs, which no round shows.
    """
    return steady(rng, rounds) * np.exp(rng.normal(0.1, 0.06, 2))


NOISE = [steady, stalls, drift, heavy_tails]


def noisy(rng: np.random.Generator, model, factor: float = 1.0, op: str = "a") -> list[dict]:
    factors = model(rng, 31)
    return [speed("deepkern cpu", 100 * factor * factors[:, 0], op=op),
            speed("eager", 300 * factors[:, 1], op=op)]  # fmt: skip


def side(*runs: list[dict]) -> Side:
    return Side("", Path(), [results.Run(Path("run.jsonl"), MACHINE, found) for found in runs])


def verdicts(old: Side, new: Side) -> list[str]:
    return [change.verdict for change in compare.timed(old, new, compare.THRESHOLD)]


def alarms(
    rng: np.random.Generator, model, factor: float, repeats: int = 200, runs: int = 1
) -> float:
    """How often a call that takes `factor` times as long is called slower, or by chance faster."""
    found = []
    for _ in range(repeats):
        sides = (side(*(noisy(rng, model, f) for _ in range(runs))) for f in (1.0, factor))
        found += verdicts(*sides)
    return sum(v in (compare.SLOWER, compare.FASTER) for v in found) / repeats


@pytest.mark.parametrize("model", NOISE)
def test_false_alarms(rng, model):
    """At most 1 % of the comparisons of equal calls, here 2 % for the luck of 200 trials."""
    assert alarms(rng, model, 1.0) <= 0.02


@pytest.mark.parametrize("model", NOISE)
def test_detection(rng, model):
    """A call that takes 1.5 times as long is found in most pairs; on a steady machine, in all."""
    assert alarms(rng, model, 1.5) >= (1.0 if model is steady else 0.55)


def test_false_alarms_over_many_rows(rng):
    """40 rows, whose noise differs: few comparisons have an alarm in any row."""
    wrong = 0
    for _ in range(40):
        sides = (side([r for i in range(40) for r in noisy(rng, NOISE[i % 4], 1.0, f"op{i}")])
                 for _ in range(2))  # fmt: skip
        wrong += bool({compare.SLOWER, compare.FASTER} & {*verdicts(*sides)})
    assert wrong <= 3


def test_load_that_changes_between_runs(rng):
    """One run a side reports equal calls; several alternating ones do not, and find slower ones."""
    assert alarms(rng, load, 1.0) > 0.1
    for runs in (3, 5):
        assert alarms(rng, load, 1.0, runs=runs) <= 0.02
    assert alarms(rng, load, 1.5, runs=3) >= 0.4
    assert alarms(rng, load, 1.5, runs=5) >= 0.9
    assert alarms(rng, load, 1.3, runs=5) >= 0.4


def test_absolute_times_would_not_do(rng):
    """The machine drifts: medians alone, with the same threshold, call most equal calls changed."""
    changed = 0
    for _ in range(100):
        old, new = (noisy(rng, drift)[0]["median"] for _ in range(2))
        changed += abs(np.log(new / old)) > np.log1p(compare.THRESHOLD)
    assert changed > 70


# The real thing: an op of this machine, whatever else runs on it.

OP, SIZE = "cast_per_token", {"M": 32, "K": 1024}
RUNS, TRIES = 16, 2


@pytest.fixture
def one_thread():
    """Two threads on a loaded machine wait for each other, for 8 ms at a time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def timed() -> list[dict]:
    """A run without checks: rounds of 0.4 ms, which are mostly free of stalls."""
    generator = torch.Generator().manual_seed(0)
    args = deepkern.OPS[OP].positional(facts(OP).inputs(generator, **SIZE))
    call, baseline = getattr(deepkern, OP), facts(OP).baseline
    providers = {"deepkern cpu": [lambda: call(*args)], "eager": [lambda: baseline(*args)]}
    found = time_calls(providers, torch.device("cpu"), seconds=0.0124)
    return [speed(name, timing.samples, op=OP) for name, timing in found.items()]


def slowed(launch, turns: int):
    """A launcher that runs `turns` of an empty loop, too; load slows them as it slows the op."""

    def slow(*args):
        result = launch(*args)
        for _ in range(turns):
            pass
        return result

    return slow


@pytest.mark.proof
def test_a_planted_slowdown_is_found(one_thread, monkeypatch, tmp_path):
    """Ten pairs of folders with a call that takes 1.3 times as long, and ten of equal calls.

    The runs of a pair alternate; if the comparison is unclear, twice as many are added. The
    launcher of both calls is a wrapper: an op of the backend `cpu` has a shorter path to its own.
    """
    launch = deepkern.OPS[OP].launcher("cpu")

    def plant(turns: int) -> None:
        monkeypatch.setitem(deepkern.OPS[OP].launchers, "cpu", slowed(launch, turns))

    plant(0)
    turn = min(timeit.repeat("for _ in range(1000): pass", number=1, repeat=100)) * 1e3  # us
    added = round(0.3 * min(timed()[0]["least"] for _ in range(5)) / turn)

    def pair(name: str, turns: int) -> tuple[int, str]:
        folders, count = [tmp_path / f"{name}-{word}" for word in ("old", "new")], 0
        for attempt in range(TRIES):
            for _ in range(RUNS << attempt):
                for new in (0, 1) if count % 2 else (1, 0):
                    plant(turns if new else 0)
                    written(folders[new] / f"{count:02}.jsonl", *timed())
                count += 1
            code, text = compared(*folders)
            if "1 unclear;" not in text:
                break
        return code, text

    equal, slower = ([pair(f"{turns}-{i}", turns) for i in range(10)] for turns in (0, added))
    print(*(text for _, text in [*equal, *slower]))
    assert [code for code, _ in equal] == [0] * 10
    assert not any("1 faster;" in text for _, text in equal)
    assert [code for code, _ in slower] == [1] * 10


def test_a_planted_wrong_kernel_is_found(one_thread, plant_wrong_scales, monkeypatch, tmp_path):
    """By `bench op`: it is not timed, and the checks at small sizes find it, too."""
    monkeypatch.setattr(ceilings, "measure", lambda device: Ceilings(10.0, {"fp32": 0.1}))
    monkeypatch.setenv("DEEPKERN_COMMIT", "0123456789ab")

    def run(folder: Path) -> Path:
        console = Console(file=io.StringIO())
        op.run([OP], ["M=32,K=1024"], ["cpu"], ["eager"], 0.01, folder=folder, console=console)
        return folder

    old = run(tmp_path / "old")
    plant_wrong_scales("cpu")
    code, text = compared(old, run(tmp_path / "new"))
    assert code == 1 and f"{OP} M=32 K=1024 deepkern cpu" in text
    assert text.count("check on cpu") >= 3, text
