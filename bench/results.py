"""The results of a run: JSON lines in bench/results/, one file per run, written whole."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

FOLDER = Path(__file__).parent / "results"


def path(machine: dict, keep: bool, folder: Path = FOLDER) -> Path:
    """`2026-11-23T12-52-39-cpu.jsonl`; git ignores a CPU's results unless `keep` is set."""
    when = machine["time"].replace(":", "-").removesuffix("+00-00")
    gpu = machine["gpu"]
    device = re.sub(r"\W+", "-", gpu["name"]).strip("-").lower() if gpu else "cpu"
    return folder / f"{when}-{device}{'-kept' if keep and not gpu else ''}.jsonl"


def write(records: list[dict], file: Path) -> None:
    """Writes one line per record, all or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        lines = (json.dumps(_finite(record), allow_nan=False) for record in records)
        fresh.write_text("".join(f"{line}\n" for line in lines))
        os.replace(fresh, file)
    finally:
        fresh.unlink(missing_ok=True)


def _finite(value):
    """NaN and inf as strings, because JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
