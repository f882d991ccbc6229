"""Checkpoints of a training run: exact resume, damage, a full disk, kills and signals."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import time
import warnings
from dataclasses import replace

import pytest

from model.checkpoint import CheckpointError
from model.training.run import LOG
from model.training.state import MANIFEST, STATE, damage, restore, save, saved_checkpoints
from model.training.stop import TORCHRUN_SECONDS, saved_steps, stop_requested
from tests.model.training_runs import (
    finish,
    fork,
    losses,
    run_script,
    same_state,
    state_of,
    toy_run,
)

CHECKPOINT = "checkpoints/step-{:08d}"
SHARD = "shard-00000.safetensors"


@pytest.fixture(scope="module")
def saved_folder(tmp_path_factory):
    """Of a run of 6 steps that saved steps 2 and 3."""
    run = toy_run(tmp_path_factory.mktemp("saved"))
    while run.step < 3:
        run.take_step()
        save(run)
    return run.folder


@pytest.fixture
def saved_run(saved_folder, tmp_path):
    """The run after step 3, in a copy of its folder."""
    run = toy_run(shutil.copytree(saved_folder, tmp_path / "run"))
    assert restore(run)
    return run


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resume_is_exact(tmp_path, precision, optimizer):
    options = {"precision": precision, "optimizer": optimizer, "bias_rate": 0.1}
    whole = toy_run(None, 4, **options)
    finish(whole)
    for stop in (2, 3, 4):
        run = toy_run(tmp_path, 4, **options)
        assert restore(run) == (stop > 2)
        while run.step < stop:
            run.take_step()
        save(run)
    assert losses(run) == losses(whole)
    assert same_state(state_of(run), state_of(whole))
    assert run.mean_loss == whole.mean_loss


@pytest.fixture(scope="module")
def script_results(tmp_path_factory):
    """What a run killed three times and one of two processes report."""
    folder = tmp_path_factory.mktemp("script")
    options = {"steps": 3, "precision": "fp8"}
    resume = (2, "resume_sharded", [f"{folder}/run", {"data": 2, "experts": 2}], options)
    return run_script(folder, ("kills", 3, random.randrange(2**31)), resume)


@pytest.mark.slow
def test_killed_three_times(script_results):
    """At random moments: no saved step is lost, and the run ends with the same bits."""
    result, _ = script_results
    assert result["kills"] == 3, result
    assert not any(result["lost"]), result
    assert all(result["equal"]), result


@pytest.mark.slow
def test_two_processes_resume_exactly(script_results):
    _, equal_by_rank = script_results
    assert equal_by_rank == [True, True]


def test_checkpoints_have_no_pickle(saved_run):
    files = {path.name for path in saved_run.folder.rglob("*") if path.is_file()}
    assert files == {LOG, STATE, MANIFEST, SHARD}
    steps = [path.name for path in saved_checkpoints(saved_run.folder / "checkpoints")]
    assert steps == ["step-00000003", "step-00000002"]


def flip_bit(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "flipped bit": (SHARD, flip_bit, "does not match its checksum"),
    "truncated": (SHARD, lambda f: os.truncate(f, 1000), "has 1000 bytes, expected"),
    "missing shard": (SHARD, lambda f: f.unlink(), "is missing"),
    "extra shard": (MANIFEST, lambda f: (f.parent / "a.safetensors").touch(), "a.safetensors is"),
    "state": (STATE, flip_bit, "does not match its checksum"),
    "missing manifest": (MANIFEST, lambda f: f.unlink(), "not a readable manifest"),
    "torn manifest": (MANIFEST, lambda f: os.truncate(f, 40), "not a readable manifest"),
    "empty manifest": (MANIFEST, lambda f: f.write_text("{}"), "is not listed"),
    "foreign manifest": (MANIFEST, lambda f: f.write_text("[1]"), "not a readable manifest"),
}


@pytest.mark.parametrize(("name", "harm", "reason"), DAMAGES.values(), ids=[*DAMAGES])
def test_damaged_checkpoint_is_named_and_skipped(saved_run, name, harm, reason):
    file = saved_run.folder / CHECKPOINT.format(3) / name
    harm(file)
    run = toy_run(saved_run.folder)
    with pytest.warns(UserWarning, match="continues from step-00000002") as caught:
        assert restore(run)
    assert str(file) in str(caught[0].message) and reason in str(caught[0].message)
    assert run.step == 2 and len(run.log) == 2
    run.take_step()
    save(run)
    assert losses(run) == losses(saved_run)
    kept = sorted(os.listdir(saved_run.folder / "checkpoints"))
    assert kept == ["step-00000002", "step-00000003"]
    assert damage(saved_run.folder / CHECKPOINT.format(3)) is None


def test_only_damaged_checkpoints_are_an_error(saved_run):
    for step in (2, 3):
        flip_bit(saved_run.folder / CHECKPOINT.format(step) / SHARD)
    with pytest.raises(CheckpointError, match=r"no checkpoint is valid.*00003.*00002") as caught:
        restore(toy_run(saved_run.folder))
    assert "checksum" in str(caught.value)
    assert len(saved_checkpoints(saved_run.folder / "checkpoints")) == 2


def test_other_options_are_an_error(saved_run):
    run = toy_run(saved_run.folder, learning_rate=0.5, batch=4)
    run.model.config = replace(run.model.config, rms_norm_eps=0.25)
    with pytest.raises(ValueError, match="cannot continue") as caught:
        restore(run)
    text = str(caught.value)
    assert "recipe: batch is 4, saved was 2; recipe: learning_rate is 0.5, saved was 0.003" in text
    assert "config: rms_norm_eps is 0.25, saved was 1e-06" in text


def test_restore_without_a_checkpoint(tmp_path):
    run = toy_run(tmp_path)
    assert not restore(run) and run.step == 0
    run.take_step()  # killed before its first save
    again = toy_run(tmp_path)
    assert not restore(again)
    assert (tmp_path / LOG).read_text() == "" and again.log == []


def test_log_is_cut_at_the_restored_step(saved_run):
    saved_run.record({"step": 3, "held_out": 4.5})
    whole = (saved_run.folder / LOG).read_text()
    saved_run.take_step()
    with (saved_run.folder / LOG).open("a") as file:
        file.write('{"step": 5, "tok')  # torn by a kill
    run = toy_run(saved_run.folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert restore(run)
    assert (saved_run.folder / LOG).read_text() == whole
    assert [row["step"] for row in run.log] == [1, 2, 3, 3]


def test_missing_log_is_named(saved_run):
    (saved_run.folder / LOG).unlink()
    run = toy_run(saved_run.folder)
    with pytest.warns(UserWarning, match=r"log.jsonl: 0 rows up to step 3"):
        assert restore(run)
    assert run.step == 3


def test_new_run_in_a_folder_of_another(saved_run):
    run = toy_run(saved_run.folder)
    run.take_step()
    with pytest.raises(ValueError, match="step-00000003 is of a later step than step-00000001"):
        save(run)


@pytest.mark.parametrize(("name", "count"), [("fsync", 6), ("replace", 1)])
def test_interrupted_save_leaves_a_valid_checkpoint(saved_run, monkeypatch, name, count):
    """Stops a save at each call of the function, as a kill would."""
    real, countdown = getattr(os, name), 0

    def interrupted(*args):
        nonlocal countdown
        countdown -= 1
        if countdown == 0:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(os, name, interrupted)
    for call in range(1, count + 1):
        run = toy_run(saved_run.folder)
        assert restore(run)
        before = run.step
        run.step += 1
        run.record({"step": run.step})
        countdown = call
        with pytest.raises((KeyboardInterrupt, RuntimeError)):
            save(run)
        again = toy_run(saved_run.folder)
        assert restore(again) and again.step in (before, run.step)
    again.take_step()
    countdown = 0
    save(again)
    assert -countdown == count  # every call was interrupted once


@pytest.fixture
def small_disk(saved_run):
    """Limits the size of a file to 20 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size=20_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk_is_named(saved_run, small_disk):
    saved_run.take_step()
    small_disk()
    with pytest.raises(OSError, match=r"a checkpoint needs \d\.\d MB, so free space") as caught:
        save(saved_run)
    assert caught.value.filename.endswith(f".step-00000004.new/{SHARD}")
    kept = sorted(os.listdir(saved_run.folder / "checkpoints"))
    assert kept == ["step-00000002", "step-00000003"]
    run = toy_run(saved_run.folder)
    assert restore(run) and run.step == 3


def test_training_goes_on_with_a_full_disk(saved_run, small_disk):
    rows, log = saved_steps(saved_run), saved_run.folder / LOG
    small_disk(log.stat().st_size + 20)  # within the next row
    with pytest.warns(UserWarning) as caught:
        next(rows)
    texts = [str(warning.message) for warning in caught]
    assert "log.jsonl: File too large; a later row rewrites it" in texts[0]
    assert "step 4 is not saved" in texts[1]
    small_disk(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert next(rows)["step"] == 5
    assert damage(saved_run.folder / CHECKPOINT.format(5)) is None
    assert [json.loads(row)["step"] for row in log.read_text().splitlines()] == [1, 2, 3, 4, 5]
    small_disk()
    with pytest.raises(OSError, match="free space"):  # the last step
        next(rows)


def poison_input(run):
    """The first layer gets NaN; returns the hook."""
    return run.model.layers[0].register_forward_pre_hook(
        lambda _, args: (args[0] * float("nan"), *args[1:])
    )


def poison_gradient(run):
    return run.model.norm.weight.register_hook(lambda grad: grad * float("inf"))


def raise_loss(run):
    return run.model.register_forward_hook(
        lambda _, args, losses: {**losses, "main": losses["main"] * 3}
    )


POISONS = {
    "NaN in the batch": (poison_input, "the loss is nan"),
    "infinite gradient": (poison_gradient, "the norm of the gradient is "),
    "spike of the loss": (raise_loss, "above its running mean"),
}


@pytest.mark.parametrize(("poison", "reason"), POISONS.values(), ids=[*POISONS])
@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_poisoned_step_is_skipped(tmp_path, precision, poison, reason):
    run = toy_run(tmp_path, precision=precision)
    assert "skipped" not in run.take_step()
    before, mean = state_of(run), run.mean_loss
    hook = poison(run)
    row = run.take_step()
    hook.remove()
    assert reason in row["skipped"] and run.step == row["step"] == 2
    assert same_state(state_of(run), before) and run.mean_loss == mean
    assert json.loads((tmp_path / LOG).read_text().splitlines()[1])["skipped"] == row["skipped"]
    save(run)
    row = run.take_step()
    assert "skipped" not in row and not same_state(state_of(run), before)
    again = toy_run(tmp_path, precision=precision)
    assert restore(again) and again.take_step()["main"] == row["main"]


def test_skipped_first_step(tmp_path):
    run = toy_run(tmp_path)
    hook = poison_input(run)
    assert run.take_step()["skipped"] == "the loss is nan"
    hook.remove()
    save(run)
    again = toy_run(tmp_path)
    assert restore(again) and again.mean_loss is None and not any(again.optimizer.state.values())
    assert again.take_step()["main"] == run.take_step()["main"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_run_after_its_step(tmp_path, number, capfd):
    run = toy_run(tmp_path)
    hook = run.model.register_forward_hook(
        lambda *_: os.kill(os.getpid(), number) if run.step == 2 else None
    )
    previous = signal.getsignal(number)
    with pytest.raises(SystemExit, match=f"{number.name}: stopped and saved after step 3"):
        for _ in saved_steps(run, every=100):
            pass
    hook.remove()
    assert "the running step ends and is saved" in capfd.readouterr().err
    assert signal.getsignal(number) == previous
    again = toy_run(tmp_path)
    assert restore(again) and again.step == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_second_signal_ends_at_once():
    def work():
        with stop_requested() as stopping:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # repeated by torchrun: ignored
            assert stopping() == "SIGTERM"
            time.sleep(TORCHRUN_SECONDS + 0.1)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    _, status = os.waitpid(fork(work), 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM


def test_saved_steps_saves_every_n_steps(tmp_path):
    run, steps = toy_run(tmp_path), []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in saved_steps(run, every=4):
            steps.append([int(p.name[5:]) for p in saved_checkpoints(tmp_path / "checkpoints")])
    assert steps == [[], [], [], [4], [4], [6, 4]]
