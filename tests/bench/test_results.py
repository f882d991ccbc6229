"""Reading results: what a file of schema 2 must have, and which files count as committed."""

from __future__ import annotations

import json
import subprocess

import pytest

from bench import results
from tests.bench.result_files import CHECK, EAGER, GPU, MACHINE, SPEED, VERDICT, written


def test_a_run_is_read_back(tmp_path):
    failed = {**CHECK, "ok": False, "error": float("nan")}
    run = results.load(written(tmp_path / "run.jsonl", failed, SPEED, EAGER, VERDICT))
    assert run.machine == MACHINE and run.file == tmp_path / "run.jsonl"
    assert run.of("speed") == [SPEED, EAGER] and run.of("model") == []
    (check,) = run.of("check")
    assert check["error"] != check["error"], "NaN is a number again"
    assert run.device == "AMD EPYC, 2 cores"
    assert results.load(written(run.file, machine=GPU)).device == "NVIDIA H200"


@pytest.mark.parametrize(
    ("records", "line", "message"),
    [
        ([{**SPEED, "samples": "fast"}], 2, "'samples' is 'fast', expected list"),
        ([SPEED, {**EAGER, "least": True}], 3, "'least' is True, expected int or float or null"),
        ([SPEED, {k: v for k, v in EAGER.items() if k != "fp8"}], 3, "no 'fp8'"),
        ([SPEED, {**EAGER, "samples": [1.0, -1.0]}], 3, "not all positive"),
        ([{**SPEED, "ok": False}], 2, "check failed"),
        ([{**SPEED, "least": None}], 2, "without 'least'"),
        ([SPEED, SPEED], 3, "occurs twice"),
        ([VERDICT, {**VERDICT, "seconds": None}], 3, "'seconds' is None"),
        ([{"name": "no kind"}], 2, "expected an object with a kind"),
    ],
)
def test_an_error_names_file_and_line(tmp_path, records, line, message):
    file = written(tmp_path / "run.jsonl", *records)
    with pytest.raises(results.Invalid, match=f"{file}:{line}: .*{message}"):
        results.load(file)


def test_text_that_is_no_result(tmp_path):
    file = tmp_path / "run.jsonl"
    for text, message in (
        ("", "empty"), ("{\n", ":1: not JSON"), (json.dumps(SPEED), ":1: expected kind 'machine'"),
        (json.dumps(MACHINE) + '\n{"kind"', ":2: not JSON"),
    ):  # fmt: skip
        file.write_text(text)
        with pytest.raises(results.Invalid, match=f"{file}.*{message}"):
            results.load(file)


def test_an_old_schema_is_named(tmp_path):
    old = {key: value for key, value in MACHINE.items() if key != "schema"}
    file = written(tmp_path / "run.jsonl", {"kind": "speed", "microseconds": 1.0}, machine=old)
    with pytest.raises(results.OldSchema, match=f"{file}: schema 1, expected 2"):
        results.load(file)
    assert len(results.load(file, schemas=(1, 2)).of("speed")) == 1


def test_committed_results(tmp_path):
    """Those of a commit, unchanged, by time; of another schema the name only."""

    def git(*words: str) -> None:
        identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True)

    later = {**MACHINE, "time": "2026-11-30T10:00:00+00:00"}
    old = {key: value for key, value in MACHINE.items() if key != "schema"}
    first, last = written(tmp_path / "b.jsonl"), written(tmp_path / "a.jsonl", machine=later)
    changed = written(tmp_path / "changed.jsonl")
    written(tmp_path / "old.jsonl", machine=old)
    assert len(results.committed(tmp_path)) == 3, "without git every file counts"
    git("init", "--quiet")
    assert len(results.committed(tmp_path)) == 3, "nor has this repository a commit"
    git("add", ".")
    git("commit", "--quiet", "-m", "results")
    written(changed, SPEED)
    written(tmp_path / "untracked.jsonl")
    runs = results.committed(tmp_path)
    assert [run.file for run in runs] == [first, last] and runs.skipped == ["old.jsonl"]
    assert not results.is_committed(changed)


def test_the_files_of_this_repository_are_read():
    """No committed file is damaged."""
    runs = results.committed()
    assert runs or runs.skipped
