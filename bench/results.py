"""The results of a run: JSON lines in bench/results/, one file per run, written whole.

The first line describes the machine (`bench.machine.describe`) and has `schema`: SCHEMA. The lines
after it are records of the kinds "check", "speed", "model" and "verdict", or of a study's own kind.
A file without `schema` is of schema 1: its "speed" records have other keys. Its "model" records are
the same.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(__file__).parent / "results"
WRITTEN: dict[Path, str] = {}  # by this process, with what is in it
SCHEMA = 2

_Number = (int, float)
_NONE = type(None)
_OK = (bool, _NONE)
_MAYBE = (int, float, _NONE)
# kind -> key -> the types of its value
KEYS: dict[str, dict[str, tuple[type, ...]]] = {
    "machine": {
        **dict.fromkeys(("time", "cpu", "system", "python", "torch", "triton", "deepkern"), (str,)),
        **dict.fromkeys(("cores", "threads"), (int,)),
        "gpu": (dict, _NONE), "commit": (str, _NONE), "schema": (int,), "command": (str,),
        "driver": (str, _NONE), "clocks": (dict, _NONE), "ceilings": (dict, _NONE),
    },
    "check": {
        **dict.fromkeys(("op", "backend", "size", "against", "note"), (str,)),
        "ok": _OK, "error": _MAYBE, "tolerance": _MAYBE,
    },
    "speed": {
        **dict.fromkeys(("op", "size", "shapes", "provider", "about", "note"), (str,)),
        "ok": _OK, "error": _MAYBE, "tolerance": _MAYBE, "samples": (list,),
        **dict.fromkeys(("least", "median", "spread", "calls", "graph", "host"), _MAYBE),
        "bytes": _MAYBE, "flops": _MAYBE, "fp8": _OK,
        **dict.fromkeys(("gb_per_s", "tflops", "roof_us", "roof_share"), _MAYBE),
        "limit": (str, _NONE),
    },
    "model": {
        **dict.fromkeys(("name", "unit", "note"), (str,)),
        "value": (int, float, str), "ok": _OK,
    },
    "verdict": {"disagreements": (int,), "seconds": _Number},
}  # fmt: skip


class Invalid(ValueError):
    """A file that is not a result; the message names the file and the line."""


class OldSchema(ValueError):
    """A result of another schema; the message names the file and the schema."""


@dataclass(frozen=True)
class Run:
    """A result: the machine's line and the records after it."""

    file: Path
    machine: dict
    records: list[dict] = field(repr=False)

    def of(self, kind: str) -> list[dict]:
        """The records of this kind, in the file's order."""
        return [record for record in self.records if record["kind"] == kind]

    @property
    def device(self) -> str:
        """The name of the GPU, or of the CPU with the number of its cores."""
        gpu = self.machine["gpu"]
        return gpu["name"] if gpu else f"{self.machine['cpu']}, {self.machine['cores']} cores"


def is_ours(provider: str) -> bool:
    """Whether a provider is a backend of deepkern, such as "deepkern cpu"."""
    return provider.split()[:1] == ["deepkern"]


def time_of(speed: dict) -> float | None:
    """Microseconds of a "speed" record that count: the median on a GPU, the least on a CPU."""
    return speed["least"] if speed.get("host") is None else speed["median"]


class Runs(list[Run]):
    """Results, the newest last; `skipped` has the names of the files of another schema."""

    skipped: list[str]


def load(file: Path, schemas: tuple[int, ...] = (SCHEMA,)) -> Run:
    """Reads and checks a result.

    Raises `OldSchema` if its schema is not one of `schemas`, `Invalid` if a line is not a record of
    its schema. "speed" records of schema 1 are not checked.
    """
    lines = list(enumerate(file.read_text(encoding="utf-8").splitlines(), 1))
    if not lines:
        raise Invalid(f"{file}: the file is empty")
    head = _parsed(file, *lines[0])
    if head["kind"] != "machine":
        raise Invalid(f"{file}:1: expected kind 'machine', got {head['kind']!r}")
    schema = head.get("schema", 1)
    if schema not in schemas:
        raise OldSchema(f"{file}: schema {schema}, expected {' or '.join(map(str, schemas))}")
    records = [_parsed(file, *line) for line in lines[1:]]
    if schema == SCHEMA:
        for number, record in enumerate([head, *records], 1):
            problem = _problem(record)
            if problem:
                raise Invalid(f"{file}:{number}: {record['kind']}: {problem}")
        _check_rows(file, records)
    return Run(file, head, records)


def committed(folder: Path = FOLDER) -> Runs:
    """The committed results of the present schema in `folder`, the newest last.

    A file that git ignores, does not track or has changed is left out. Every file counts where
    there is no git repository.
    """
    runs, skipped = Runs(), []
    for file in sorted(folder.glob("*.jsonl")):
        if is_committed(file):
            try:
                runs.append(load(file))
            except OldSchema:
                skipped.append(file.name)
    runs.sort(key=lambda run: run.machine["time"])
    runs.skipped = skipped
    return runs


def is_committed(file: Path) -> bool:
    """Whether the last commit has this file with this content; True if there is no repository."""

    def git(*words: str) -> int:
        return subprocess.run(
            ["git", "-C", str(file.parent), *words], capture_output=True
        ).returncode

    try:
        if git("rev-parse", "--verify", "HEAD"):
            return True
        return not (git("cat-file", "-e", f"HEAD:./{file.name}") or
                    git("diff", "--quiet", "HEAD", "--", file.name))  # fmt: skip
    except OSError:
        return True


def _parsed(file: Path, number: int, line: str) -> dict:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise Invalid(f"{file}:{number}: not JSON: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        raise Invalid(f"{file}:{number}: expected an object with a kind")
    for key in ("error", "value"):
        if record.get(key) in ("nan", "inf", "-inf") and record.get("unit") != "text":
            record[key] = float(record[key])
    return record


def _problem(record: dict) -> str | None:
    """What is wrong with a record of a known kind; None if nothing is."""
    for key, types in KEYS.get(record["kind"], {}).items():
        if key not in record:
            return f"no {key!r}"
        if not isinstance(record[key], types) or (
            isinstance(record[key], bool) and bool not in types
        ):
            names = " or ".join("null" if t is _NONE else t.__name__ for t in types)
            return f"{key!r} is {record[key]!r}, expected {names}"
    if record["kind"] != "speed":
        return None
    samples = record["samples"]
    if not all(isinstance(us, _Number) and not isinstance(us, bool) and us > 0 for us in samples):
        return "'samples' are not all positive numbers"
    if samples and record["ok"] is False:
        return "'samples' of a call whose check failed"
    if samples and not all(record[key] for key in ("least", "median")):
        return "'samples' without 'least' and 'median'"
    return None


def _check_rows(file: Path, records: list[dict]) -> None:
    """The providers of an (op, size) are different."""
    seen: set[tuple[str, str, str]] = set()
    for number, record in enumerate(records, 2):
        if record["kind"] == "speed":
            label = record["op"], record["size"], record["provider"]
            if label in seen:
                raise Invalid(f"{file}:{number}: speed: {', '.join(label)} occurs twice")
            seen.add(label)


def path(machine: dict, keep: bool, folder: Path = FOLDER) -> Path:
    """`2026-11-23T12-52-39-cpu.jsonl`; git ignores a CPU's results unless `keep` is set.

    Not the name of a file that exists: a run may take less than a second.
    """
    when = machine["time"].replace(":", "-").removesuffix("+00-00")
    gpu = machine["gpu"]
    device = re.sub(r"\W+", "-", gpu["name"]).strip("-").lower() if gpu else "cpu"
    kept = "-kept" if keep and not gpu else ""
    file, number = folder / f"{when}-{device}{kept}.jsonl", 1
    while file.exists():
        number += 1
        file = folder / f"{when}.{number}-{device}{kept}.jsonl"
    return file


def write(records: list[dict], file: Path) -> None:
    """Writes one line per record, all or nothing."""
    lines = (json.dumps(_finite(record), allow_nan=False) for record in records)
    write_text("".join(f"{line}\n" for line in lines), file)
    WRITTEN[file] = f": {contents(records)}"


def contents(records: list[dict]) -> str:
    """Such as "828 checks, 66 rows"."""
    checks = sum(r.get("kind") == "check" for r in records)
    rows = {(r.get("op"), r.get("size")) for r in records if r.get("kind") == "speed"}
    return f"{checks} checks, {len(rows)} rows"


def write_text(text: str, file: Path) -> None:
    """Writes a file all or nothing; makes its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, file)
        WRITTEN[file] = ""
    finally:
        fresh.unlink(missing_ok=True)


def _finite(value):
    """NaN and inf as strings, because JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
