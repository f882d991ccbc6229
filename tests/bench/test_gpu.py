"""The stages for a GPU machine: their commands, what resumes, and a stage that fails or hangs."""

from __future__ import annotations

import io
import json
import sys
import time

import pytest
import torch
from rich.console import Console

import deepkern
from bench import families, gpu, machine
from bench.gpu import Stage
from deepkern.runtime import native


def test_stages_name_existing_files_and_all_ops(tmp_path):
    known = {stage.name: stage for stage in gpu.stages(tmp_path)}
    assert len(known) == len(gpu.stages(tmp_path))
    for family in families.FAMILIES:
        assert (machine.ROOT / known[f"tests {family}"].command[-1]).is_dir()
    assert all((machine.ROOT / file).is_file() for file in gpu.MODEL_TESTS)
    ops = [
        name.split()[1] for name in known if name.startswith("speed ") and len(name.split()) == 2
    ]
    assert ops == sorted(deepkern.OPS)
    assert {f"speed {op} cuda" for op in gpu.HOPPER} <= known.keys()
    assert all(native.native_op(op, "cuda") for op in gpu.HOPPER) or native.missing_reason()
    for stage in known.values():
        assert 0 < stage.limit <= 590
        assert stage.command[0] == sys.executable


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def run(stages, folder, about=None, **options) -> tuple[int, dict, str]:
    output = io.StringIO()
    console = Console(file=output, width=200)
    about = machine.describe() if about is None else about
    minutes = options.pop("minutes", None)
    code = gpu.run_stages(stages, folder, about, minutes, console, **options)
    return code, json.loads((folder / "stages.json").read_text()), output.getvalue()


def test_a_second_call_runs_what_failed(tmp_path):
    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x'); print('built')"
    first = [Stage("build", python(count)), Stage("tests", python("print('1 failed'); exit(3)"))]
    code, tree, output = run(first, tmp_path)
    records = tree["stages"]
    assert code == 1 and tree["machine"]["torch"] == torch.__version__
    assert records["build"]["exit"] == 0 and records["build"]["last"] == "built"
    assert records["tests"]["exit"] == 3 and records["tests"]["last"] == "1 failed"
    assert "exit 3" in output and "built" in (tmp_path / "build.log").read_text()

    second = [first[0], Stage("tests", python("print('passed')"))]
    code, tree, output = run(second, tmp_path)
    assert code == 0 and tree["stages"]["tests"]["last"] == "passed"
    assert (tmp_path / "count").read_text() == "x" and "done before" in output

    code, _, _ = run(second[:1], tmp_path, again=True)
    assert code == 0 and (tmp_path / "count").read_text() == "xx"


@pytest.mark.parametrize("key", gpu.IDENTITY)
def test_another_machine_or_commit_starts_again(key, tmp_path):
    about = machine.describe()
    stage = [Stage("build", python("print('built')"))]
    run(stage, tmp_path, about)
    _, _, output = run(stage, tmp_path, {**about, key: "another"})
    assert "done before" not in output and "exit 0" in output


def test_a_stage_without_time_is_left(tmp_path):
    stages = [Stage("short", python("print(1)"), 1), Stage("long", python("print(2)"), 600)]
    code, tree, output = run(stages, tmp_path, minutes=0.5)
    assert code == 1 and list(tree["stages"]) == ["short"]
    assert "no time left for: long" in output
    code, tree, _ = run(stages, tmp_path)
    assert code == 0 and list(tree["stages"]) == ["short", "long"]


def test_a_stage_that_hangs_is_killed(tmp_path):
    child = f"[{sys.executable!r}, '-c', 'import time; time.sleep(60)']"
    code = f"import subprocess; print('waiting', flush=True); subprocess.run({child})"
    record = gpu.run_stage(python(code), tmp_path / "log", limit=2)
    assert record["exit"] == "killed after 2 s" and record["seconds"] < 30
    assert record["last"] == "waiting"


def test_results_of_a_stage_name_the_commit_of_the_start(tmp_path):
    """A stage may write files into the tree, after which git calls it changed."""
    code = "from bench import machine; print(machine.describe()['commit'])"
    about = {**machine.describe(), "commit": "0123456789ab"}
    _, tree, _ = run([Stage("speed", python(code))], tmp_path, about)
    assert tree["stages"]["speed"]["last"] == "0123456789ab"


def test_an_interrupt_ends_the_stage(tmp_path, monkeypatch):
    file = tmp_path / "alive"
    code = f"import time, pathlib\nwhile True: pathlib.Path({str(file)!r}).touch(); time.sleep(0.1)"

    def interrupted(process, limit=None):
        while not file.exists():
            time.sleep(0.05)
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu.subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu.run_stage(python(code), tmp_path / "log", limit=60)
    time.sleep(0.5)
    file.unlink()
    time.sleep(0.5)
    assert not file.exists(), "the stage goes on"
