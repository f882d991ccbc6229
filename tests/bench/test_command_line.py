"""The commands of `python -m bench`: what they refuse, and what they print without a GPU."""

from __future__ import annotations

import runpy
import sys

import pytest
import torch
from typer.testing import CliRunner

from bench import gpu, job
from bench.__main__ import app

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
