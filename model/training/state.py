"""Checkpoints of a run: saved atomically, verified when they are read, on any number of processes.

    restore(run)                 # continues from the newest valid checkpoint; False if none exists
    for row in saved_steps(run): # takes the remaining steps, saves after each
        print(row["main"])

    FOLDER/checkpoints/step-00000042/shard-00001-model-00001-of-00001.safetensors   one per process
                                     state.json       step, running mean, recipe, config
                                     manifest.json    size and checksum of each file

A checkpoint is written to a hidden directory, synced to the disk and renamed, so a directory
`step-N` is complete unless it was damaged later.  The last two are kept; the older one is used if
the newer is damaged.  torch.distributed.checkpoint divides the tensors among the processes and
reads them into any other layout of DTensors.  Several processes need one folder that all can see.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import CheckpointError
from model.config import Config
from model.training.optimizer import MOMENT
from model.training.processes import on_each, on_first
from model.training.recipe import Recipe
from model.training.run import LOG, Run, write_log
from model.training.shards import Nested, read_tensors, stored_names, write_tensors

CHECKPOINTS, STATE, MANIFEST = "checkpoints", "state.json", "manifest.json"
KEPT = 2  # checkpoints


def checkpoints_folder(run: Run) -> Path:
    if run.folder is None:
        raise ValueError("a run without a folder has no checkpoints")
    return run.folder / CHECKPOINTS


def state_tensors(run: Run, stored: Iterable[str] = ()) -> Nested:
    """Parameters and buffers ("model"), and moments ("optimizer"); they share the run's memory.

    stored: names in a checkpoint; a moment that is among them and not in the optimizer is created.
    """
    parameters, moments = dict(run.model.named_parameters()), run.optimizer.state
    for name in stored:
        kind, _, rest = name.partition(".")
        owner, _, key = rest.rpartition(".")
        if kind == "optimizer" and owner in parameters:
            zeros = torch.zeros_like(parameters[owner], dtype=MOMENT, requires_grad=False)
            moments[parameters[owner]].setdefault(key, zeros)
    named = {
        f"{name}.{key}": moment
        for name, parameter in parameters.items()
        for key, moment in moments[parameter].items()
    }
    return {"model": run.model.state_dict(), "optimizer": named}


def scalars(run: Run) -> dict[str, Any]:
    """The content of state.json."""
    (optimizer_steps,) = {group["steps"] for group in run.optimizer.param_groups}
    return {
        "step": run.step,
        "mean_loss": run.mean_loss,
        "optimizer_steps": optimizer_steps,
        "text": {"tokens": len(run.tokens), "sha256": run.tokens_checksum},
        "recipe": asdict(run.recipe),
        "config": run.model.config.to_dict(),
    }


def save(run: Run) -> Path:
    """Writes the checkpoint of the current step; returns its directory.

    Every process calls it.  A valid checkpoint of this step is left as it is.  Raises OSError that
    names the file if it cannot be written, and ValueError if the folder has later steps; the
    earlier checkpoints stay valid.  Raises ParallelError if another process is lost.
    """
    with run.parallel.naming_lost_ranks(f"save of step {run.step}"):
        return _save(run)


def _save(run: Run) -> Path:
    final = checkpoints_folder(run) / f"step-{run.step:08d}"
    fresh = final.with_name(f".{final.name}.new")
    try:
        if not on_first(lambda: _prepare(final, fresh)):
            own = write_tensors(fresh, state_tensors(run))
            files = {name: entry for part in on_each(lambda: own) for name, entry in part.items()}
            on_first(lambda: _finish(run, fresh, final, files))
    except OSError as error:
        on_first(lambda: shutil.rmtree(fresh, ignore_errors=True))
        tensors = [t for group in state_tensors(run).values() for t in group.values()]
        size = sum(t.numel() * t.element_size() for t in tensors) / 1e6
        text = f"{error.strerror or error}; a checkpoint needs {size:.1f} MB, so free space on the"
        text += " disk of the run's folder; the earlier checkpoints are unchanged"
        raise OSError(error.errno, text, error.filename or str(fresh)) from error
    return final


def _prepare(final: Path, fresh: Path) -> bool:
    """Whether the checkpoint exists; if not, makes an empty directory for it."""
    for path in saved_checkpoints(final.parent):
        if path.name > final.name:
            text = f"{path} is of a later step than {final.name}: restore the run, or choose"
            raise ValueError(f"{text} another folder")
    if final.exists() and damage(final) is None:
        return True
    for path in final.parent.glob(".step-*.new"):  # of a process that was killed
        shutil.rmtree(path)
    fresh.mkdir(parents=True)
    return False


def checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _finish(run: Run, fresh: Path, final: Path, files: dict[str, dict[str, Any]]) -> None:
    """Writes the JSON files and renames the directory; removes checkpoints that are not kept.

    files: name -> size and checksum of the files with tensors.
    """
    state = json.dumps(scalars(run), indent=1) + "\n"
    _write_file(fresh / STATE, state)
    state_entry = {"bytes": len(state), "sha256": hashlib.sha256(state.encode()).hexdigest()}
    _write_file(fresh / MANIFEST, json.dumps({STATE: state_entry, **files}, indent=1) + "\n")
    for name in files:
        if not (fresh / name).is_file():
            raise ValueError(f"{fresh / name}: not visible to process 0, expected a shared folder")
    _sync(fresh)
    log = final.parent.with_name(LOG)
    if log.exists():
        _sync(log)
    if final.exists():  # damaged
        shutil.rmtree(final)
    os.replace(fresh, final)
    _sync(final.parent)
    for old in [*saved_checkpoints(final.parent)[KEPT:], *final.parent.glob("step-*.damaged")]:
        shutil.rmtree(old, ignore_errors=True)


def _write_file(path: Path, text: str) -> None:
    try:
        with path.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def saved_checkpoints(folder: Path) -> list[Path]:
    """The directories of checkpoints, newest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted(found, key=lambda path: (len(path.name), path.name), reverse=True)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, with the name of the file; None if it is valid."""
    manifest = path / MANIFEST
    try:
        files = json.loads(manifest.read_text())
        for name, expected in files.items():
            file, size = path / name, expected["bytes"]
            if not file.is_file():
                return f"{file}: the file is missing"
            if file.stat().st_size != size:
                return f"{file}: the file has {file.stat().st_size} bytes, expected {size}"
            if checksum(file) != expected["sha256"]:
                return f"{file}: the content does not match its checksum"
        extra = {file.name for file in path.glob("*.safetensors")} - files.keys()
        if extra or STATE not in files:
            return f"{manifest}: {', '.join(sorted(extra)) or STATE} is not listed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{manifest}: not a readable manifest: {error!r}"
    return None


def restore(run: Run) -> bool:
    """Continues from the newest valid checkpoint of the folder; False if there is none at all.

    Every process calls it, before the first step.  A damaged checkpoint is named in a warning, and
    renamed.  Rows of the log after the restored step are removed.  Raises CheckpointError if
    checkpoints exist and none is valid, and ValueError that names the options of the recipe or the
    config that differ from the saved ones, or says that the text is another.  Raises ParallelError
    if another process is lost.
    """
    with run.parallel.naming_lost_ranks("restore"):
        return _restore(run)


def _restore(run: Run) -> bool:
    folder = checkpoints_folder(run)
    path, damaged = on_first(lambda: _choose(folder))
    if path is not None:
        saved = json.loads((path / STATE).read_text())
        _check_options(path, saved, run)
        read_tensors(path, state_tensors(run, stored_names(path)))
        run.step, run.mean_loss = saved["step"], saved["mean_loss"]
        for group in run.optimizer.param_groups:
            group["steps"] = saved["optimizer_steps"]
    run.log = on_first(lambda: _truncate_log(folder.with_name(LOG), run.step))
    on_first(lambda: [old.rename(f"{old}.damaged") for old in damaged] and None)
    return path is not None


def _choose(folder: Path) -> tuple[Path | None, list[Path]]:
    """The newest valid checkpoint, and the damaged ones that are newer."""
    reasons: dict[Path, str] = {}
    for path in saved_checkpoints(folder):
        reason = damage(path)
        if reason is None:
            for text in reasons.values():
                warnings.warn(f"{text}; the run continues from {path.name}", stacklevel=2)
            return path, [*reasons]
        reasons[path] = reason
    unusable = [*reasons.values(), *(f"{path}" for path in folder.glob("step-*.damaged"))]
    if unusable:
        text = f"{folder}: no checkpoint is valid ({'; '.join(unusable)}); to start anew, choose"
        raise CheckpointError(f"{text} another folder or remove this one")
    return None, []


def _check_options(path: Path, saved: dict[str, Any], run: Run) -> None:
    recipe = asdict(Recipe.from_dict(saved["recipe"])), asdict(run.recipe)
    config = Config.from_dict(saved["config"]).to_dict(), run.model.config.to_dict()
    text = saved["text"], scalars(run)["text"]
    texts = []
    for kind, (old, new) in {"recipe": recipe, "config": config, "text": text}.items():
        old, new = json.loads(json.dumps(old)), json.loads(json.dumps(new))
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                texts.append(f"{kind}: {name} is {new.get(name)}, saved was {old.get(name)}")
    if texts:
        raise ValueError(f"{path / STATE}: cannot continue: {'; '.join(texts)}")


def _truncate_log(log: Path, step: int) -> list[dict[str, Any]]:
    """Removes rows of later steps and a torn last line from the file; returns the other rows."""
    rows: list[dict[str, Any]] = []
    text = log.read_text(errors="replace") if log.exists() else ""
    for line in text.splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
        if rows[-1]["step"] > step:
            rows.pop()
            break
    steps = [row["step"] for row in rows if "main" in row]  # not those of scores
    if steps != [*range(1, step + 1)]:
        warnings.warn(f"{log}: {len(steps)} rows up to step {step}, expected {step}", stacklevel=2)
    if "".join(json.dumps(row) + "\n" for row in rows) != text:
        write_log(log, rows)
        _sync(log.parent)
    return rows
