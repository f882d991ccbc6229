"""`python -m bench compare`: verdicts and exit codes; false alarms and detection under noise."""

from __future__ import annotations

import functools
import io
import timeit
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import deepkern
from bench import checks, compare, results
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
    assert "│ eager " in text and "linear_bf16" not in text
    text = two_files(tmp_path, [*row(), *others], [row()[0], slow, others[0]])[1]
    assert "│ compile " in text


def test_few_rounds_are_unclear(tmp_path):
    """The note says which option gives enough of them."""
    slow = [speed("deepkern cpu", [90e3] * 3), speed("eager", [290e3, 300e3, 310e3])]
    code, text = two_files(tmp_path, row(), slow)
    assert code == 0 and "3 rounds, 5 are needed: --seconds 6" not in text
    code, text = two_files(tmp_path, slow, slow)
    assert code == 0 and "3 rounds, 5 are needed: --seconds 6" in text
    code, text = two_files(tmp_path, row()[:1], row()[:1])
    assert code == 0 and "no other provider is timed in both runs" in text


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
    lines = [next(i for i, line in enumerate(text.splitlines()) if f"{op} " in line[:4])
             for op in "dcba"]  # fmt: skip
    assert lines == sorted(lines)


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


NOISE = [steady, stalls, drift, heavy_tails]


def noisy(rng: np.random.Generator, model, factor: float = 1.0, op: str = "a") -> list[dict]:
    factors = model(rng, 31)
    return [speed("deepkern cpu", 100 * factor * factors[:, 0], op=op),
            speed("eager", 300 * factors[:, 1], op=op)]  # fmt: skip


def verdicts(old: list[dict], new: list[dict]) -> list[str]:
    runs = (results.Run(Path("run.jsonl"), MACHINE, records) for records in (old, new))
    return [change.verdict for change in compare.timed(*runs, compare.THRESHOLD)]


def alarms(rng: np.random.Generator, model, factor: float, repeats: int = 200) -> float:
    """How often a call that takes `factor` times as long is called slower, or by chance faster."""
    pairs = ((noisy(rng, model), noisy(rng, model, factor)) for _ in range(repeats))
    found = [v for old, new in pairs for v in verdicts(old, new)]
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
        runs = [[r for i in range(40) for r in noisy(rng, NOISE[i % 4], 1.0, f"op{i}")]
                for _ in range(2)]  # fmt: skip
        wrong += bool({compare.SLOWER, compare.FASTER} & {*verdicts(*runs)})
    assert wrong <= 3


def test_absolute_times_would_not_do(rng):
    """The machine drifts: medians alone, with the same threshold, call most equal calls changed."""
    changed = 0
    for _ in range(100):
        old, new = (noisy(rng, drift)[0]["median"] for _ in range(2))
        changed += abs(np.log(new / old)) > np.log1p(compare.THRESHOLD)
    assert changed > 70


# The real thing: an op of this machine, whatever else runs on it.

OP, SIZE = "cast_per_token", {"M": 128, "K": 1024}
BLOCKS, TRIES = 8, 4


@pytest.fixture
def one_thread():
    """Two threads on a loaded machine wait for each other, for 8 ms at a time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def arguments() -> tuple:
    return deepkern.OPS[OP].positional(facts(OP).inputs(torch.Generator().manual_seed(0), **SIZE))


def timed_rounds(count: int) -> dict[str, list[float]]:
    """The op and eager, timed in turn in `count` rounds or some more: microseconds.

    Rounds of 0.2 ms are mostly free of stalls.
    """
    args, op, baseline = arguments(), getattr(deepkern, OP), facts(OP).baseline
    providers = {"deepkern cpu": [lambda: op(*args)], "eager": [lambda: baseline(*args)]}
    rounds: dict[str, list[float]] = {name: [] for name in providers}
    while len(rounds["eager"]) < count:
        timings = time_calls(providers, torch.device("cpu"), seconds=0.006, rounds=31)
        shared = min(len(timing.samples) for timing in timings.values())
        for name, timing in timings.items():
            rounds[name] += timing.samples[:shared]
    return rounds


def records(rounds: dict[str, list[float]]) -> list[dict]:
    """Records of 31 samples, each the median of successive rounds; none if the op is wrong."""
    args = arguments()
    got, want = getattr(deepkern, OP)(*args), facts(OP).baseline(*args)
    ok, error, note = checks.compare_plain(OP, args, got, want)
    if ok is False:
        return [failed("deepkern cpu", note, op=OP, size=checks.text(SIZE), error=error)]
    return [
        speed(name, map(np.median, np.array_split(times, 31)), op=OP, size=checks.text(SIZE))
        for name, times in rounds.items()
    ]


def slowed(launch, turns: int):
    """A launcher that runs `turns` of an empty loop, too; load slows them as it slows the op."""

    def slow(*args):
        result = launch(*args)
        for _ in range(turns):
            pass
        return result

    return slow


def settled(compare_once) -> tuple[int, str]:
    """Compares up to TRIES times, with twice the rounds each time, until the verdict is clear."""
    for attempt in range(TRIES):
        code, text = compare_once(8 << attempt)
        if "1 unclear;" not in text:
            break
    return code, text


@pytest.mark.proof
def test_a_planted_slowdown_is_found(one_thread, monkeypatch, tmp_path):
    """Ten pairs with a call that takes 1.3 times as long, and ten of equal calls.

    The launcher of both calls is a wrapper: an op of the backend `cpu` has a shorter path to its
    own.
    """
    op = deepkern.OPS[OP]
    launch = op.launcher("cpu")

    def plant(turns: int) -> None:
        monkeypatch.setitem(op.launchers, "cpu", slowed(launch, turns))

    plant(0)
    turn = min(timeit.repeat("for _ in range(1000): pass", number=1, repeat=100)) * 1e3  # us
    added = round(0.3 * min(timed_rounds(500)["deepkern cpu"]) / turn)

    def pair(turns: int, repeats: int) -> tuple[int, str]:
        """OLD and NEW in alternating blocks: the load of a block differs as that of a run does."""
        rounds: list[dict[str, list[float]]] = [{}, {}]
        for block in range(BLOCKS):
            for which in (0, 1) if block % 2 else (1, 0):
                plant(turns if which else 0)
                for name, times in timed_rounds(31 * repeats // BLOCKS).items():
                    rounds[which].setdefault(name, []).extend(times)
        return two_files(tmp_path, *map(records, rounds))

    equal, slower = [], []
    for _ in range(10):
        equal.append(settled(functools.partial(pair, 0)))
        slower.append(settled(functools.partial(pair, added)))
    print(*(text for _, text in [*equal, *slower]))
    assert [code for code, _ in equal] == [0] * 10
    assert not any("1 faster;" in text for _, text in equal)
    assert [code for code, _ in slower] == [1] * 10


def test_a_planted_wrong_kernel_is_found(one_thread, monkeypatch, tmp_path):
    """It is not timed, and the checks of the job at small sizes find it, too."""
    old = [
        *records(timed_rounds(31)),
        *(c.record() for c in checks.check(OP, "cpu", torch.device("cpu"))),
    ]
    op = deepkern.OPS[OP]
    launch = op.launcher("cpu")
    monkeypatch.setitem(
        op.launchers, "cpu", lambda *args: (launch(*args)[0], launch(*args)[1] * 1.02)
    )
    new = [
        *records(timed_rounds(31)),
        *(c.record() for c in checks.check(OP, "cpu", torch.device("cpu"))),
    ]
    code, text = two_files(tmp_path, old, new)
    assert code == 1 and "│ deepkern cpu │" in text
    assert text.count("check on cpu") >= 3, text
