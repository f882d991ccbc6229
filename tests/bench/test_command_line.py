"""The commands of `python -m bench`: what they refuse, and what they print without a GPU."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import time

import pytest
import torch
from typer.testing import CliRunner

from bench import ceilings, compare, cost_report, gpu, job, results, timings
from bench.__main__ import app
from bench.machine import ROOT
from bench.pages import report
from deepkern.testing import providers

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["op", "no_such_op"], "no op 'no_such_op'"),
        (["op", "cast_per_token", "--shapes", "no_such"], "no shapes 'no_such'"),
        (
            ["op", "cast_per_token", "--shapes", "M=1,H=3"],
            "expected NAME=VALUE with a NAME of M, K",
        ),
        (["op", "swiglu", "--against", "no_such_provider"], "no provider 'no_such_provider'"),
        (["inspect", "no_such_op"], "no op 'no_such_op'"),
        (["inspect", "cast_per_token", "--target", "sm_1"], "no target 'sm_1'"),
        (["tune", "cast_back"], "no tiles to tune"),
        (["tune", "--size", "M=x"], "expected sizes such as"),
        (["model", "--model", "other"], "no model 'other'; there are"),
        (["model", "--against", "other"], "no provider 'other'; there are"),
        (["compare", "no_such_file", "no_such_file"], "no_such_file"),
        (["gpu", "--stage", "other"], "no stage 'other'; there are"),
        (["no_such_command"], "no_such_command"),
        (["--no-such-option"], "--no-such-option"),
    ],
    ids=" ".join,
)
def test_command_line_refuses(words, message):
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2 and message in done.output


def test_run_is_the_default(monkeypatch):
    calls = []
    monkeypatch.setattr(job, "run", lambda **options: calls.append(options) or 0)
    options = ["--keep", "--seconds", "0.1"]
    for words in ([], ["run"], options, ["run", *options]):
        assert CliRunner().invoke(app, words).exit_code == 0
    assert calls[0] == calls[1] and calls[2] == calls[3]
    assert calls[2]["keep"] is True and calls[2]["seconds"] == 0.1


def test_the_help_of_op_lists_the_providers():
    lines = CliRunner().invoke(app, ["op", "--help"]).output.splitlines()
    for name, about in providers.NAMES.items():
        assert sum(line.split(maxsplit=1) == [name, about] for line in lines) == 1, name
    assert max(map(len, lines[-len(providers.NAMES) :])) <= 80


def interrupted(words: list[str]) -> list[str]:
    """What a command that Ctrl-C ends prints on stderr."""
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 130 and "Traceback" not in done.output
    return done.stderr.splitlines()


def test_ctrl_c_says_what_was_kept(monkeypatch, tmp_path):
    """In the second row of two; their file has the first."""
    monkeypatch.setattr(results, "WRITTEN", {})
    monkeypatch.setattr(ceilings, "measure", lambda device: ceilings.Ceilings(10.0, {"fp32": 0.1}))
    time_op = timings.time_op

    def stop(op, size, *rest):
        if size["M"] == 8:
            raise KeyboardInterrupt
        return time_op(op, size, *rest)

    monkeypatch.setattr(timings, "time_op", stop)
    words = ["op", "cast_per_token", "--seconds", "0.001", "--against", "eager",
             "--backend", "torch", "--folder", str(tmp_path)]  # fmt: skip
    lines = interrupted([*words, "--shapes", "M=4,K=256", "--shapes", "M=8,K=256"])
    (file,) = tmp_path.iterdir()
    checked = len(results.load(file).of("check"))
    assert lines == [f"interrupted; kept {file}: {checked} checks, 1 rows"]
    assert {r["size"] for r in results.load(file).of("speed")} == {"M=4 K=256"}


@pytest.mark.parametrize("words", [["run"], ["report"], ["cost"], ["compare", ".", "."]])
def test_ctrl_c_ends_every_verb(words, monkeypatch):
    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(results, "WRITTEN", {})
    for module, name in ((job, "run"), (report, "run"), (cost_report, "run"), (compare, "run")):
        monkeypatch.setattr(module, name, stop)
    assert interrupted(words) == ["interrupted; nothing was written"]


@pytest.mark.slow
def test_ctrl_c_in_a_terminal(tmp_path):
    """It reaches the processes that check, too: no traceback of theirs, and all end."""
    command = [sys.executable, "-m", "bench", "--no-model", "--folder", str(tmp_path)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env={**os.environ, "PYTHONPATH": f"{ROOT}/kernels:{ROOT}"},
    )  # fmt: skip
    while not (line := process.stdout.readline()).startswith("╰"):
        assert line, "the command ended"
    time.sleep(1)  # the processes start
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines() == ["interrupted; nothing was written"], errors
    end = time.monotonic() + 20
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < end:  # multiprocessing's own processes end after the command
            os.killpg(process.pid, 0)
            time.sleep(0.1)


@without_gpu
@pytest.mark.parametrize("words", [["tune", "fp8_gemm_nt"], ["gpu"]], ids=" ".join)
def test_needs_a_gpu(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2 and "needs a GPU" in done.output
    assert not list(tmp_path.iterdir())


def test_dry_run_prints_stages_and_runs_none(tmp_path):
    words = ["gpu", "--out", str(tmp_path / "out"), "--dry-run"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0
    stages = [line.split(" (at most ")[0] for line in done.output.splitlines()]
    assert stages == [stage.name for stage in gpu.stages(tmp_path)]
    assert "setup.py" in done.output and f"(at most {gpu.LIMIT} s)" in done.output
    assert not (tmp_path / "out").exists()
    one = CliRunner().invoke(app, [*words, "--stage", "launch"])
    assert len(one.output.splitlines()) == 1 and one.output.startswith("launch (at most")


@pytest.mark.slow
def test_inspect_checks_and_prints_a_table():
    done = CliRunner().invoke(app, ["inspect", "cast_per_token", "--target", "sm_90", "--check"])
    assert done.exit_code == 0, done.output
    for word in ("cast_per_token", "sm_90", "0 with problems"):
        assert word in done.output


@pytest.mark.parametrize("study", ["accumulation", "expert_parallel", "launch", "placement"])
def test_studies_are_scripts(study, monkeypatch, capsys):
    """`python -m bench.studies.NAME --help`, without a process."""
    monkeypatch.setattr(sys, "argv", [study, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"bench.studies.{study}", run_name="__main__", alter_sys=True)
    assert ended.value.code == 0 and f"bench.studies.{study}" in capsys.readouterr().out
