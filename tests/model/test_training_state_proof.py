"""Checkpoints of a training run: 20 kills, other numbers of processes, a signal, a disk."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import warnings

import pytest

from model.training.state import damage, restore, save, saved_checkpoints
from model.training.stop import saved_steps
from tests.model.training_runs import run_script, toy_run

pytestmark = pytest.mark.proof
ONE, TWO, THREE = {}, {"data": 2}, {"data": 3}  # layouts
FOUR = {"data": 2, "tensor": 2, "experts": 2}


def test_killed_twenty_times(tmp_path):
    """At random moments: no saved step is lost, and every run ends with the same bits."""
    (result,) = run_script(tmp_path, ("kills", 20, random.randrange(2**31)))
    print(result)
    assert result["kills"] == 20, result
    assert not any(result["lost"]), result
    assert all(result["equal"]), result


def test_resume_on_other_numbers_of_processes(tmp_path):
    """The weights are the saved ones to the bit; the order of sums over processes differs."""
    folder = f"{tmp_path}/run"
    options = {"batch": 6}
    whole, first, second, third = run_script(
        tmp_path,
        (1, "train_sharded", [f"{tmp_path}/whole", ONE, 6], options),
        (2, "train_sharded", [folder, TWO, 2], options),
        (3, "train_sharded", [folder, THREE, 4], options),
        (1, "train_sharded", [folder, ONE, 6], options),
    )
    assert [calls[0][:2] for calls in (whole, first, second, third)] == [
        [False, 0], [False, 0], [True, 2], [True, 4],
    ]  # fmt: skip
    resumed = [first[0][2], second[0][2], third[0][2]]
    assert sum(resumed, []) == pytest.approx(whole[0][2], abs=1e-4)


def test_values_on_another_layout(tmp_path):
    calls, layouts = [], {1: ONE, 2: TWO, 3: THREE, 4: FOUR}
    for saved, loaded in ((4, 3), (2, 4), (4, 1)):
        folder = f"{tmp_path}/{saved}-{loaded}"
        calls += [
            (saved, "save_sharded", [folder, layouts[saved]], {}),
            (loaded, "load_sharded", [folder, layouts[loaded]], {}),
        ]
    wrong = run_script(tmp_path, *calls)[1::2]
    assert wrong == [[[]] * 3, [[]] * 4, [[]]]
    assert len([*(tmp_path / "4-3").rglob("*.safetensors")]) == 4


def test_signal_to_one_process_stops_all(tmp_path):
    (ends,) = run_script(tmp_path, (2, "stop_one", [f"{tmp_path}/stopped"], {}))
    assert ends == [["SIGTERM: stopped and saved after step 2", 2]] * 2


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_disk_that_is_full(tiny_disk):
    run = toy_run(tiny_disk / "run")
    rows = saved_steps(run)
    assert next(rows)["step"] == 1
    filler = tiny_disk / "filler"
    with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with pytest.warns(UserWarning, match="step 2 is not saved.*No space left on device"):
        next(rows)
    with pytest.raises(OSError, match="free space") as caught:
        save(run)
    assert caught.value.errno == errno.ENOSPC and ".step-00000002.new" in caught.value.filename
    assert [p.name for p in saved_checkpoints(run.folder / "checkpoints")] == ["step-00000001"]
    filler.unlink()
    assert next(rows)["step"] == 3
    assert damage(run.folder / "checkpoints/step-00000003") is None
    again = toy_run(run.folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the log has every row
        assert restore(again) and again.step == 3
