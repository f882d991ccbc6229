"""Which Hopper kernels have passed their tests on a GPU: `verified_kernels.json`.

`python -m bench.verify` writes the file. It names the ops whose GPU tests passed, the GPU, and the
hash of the sources that ran. Without it, or once the sources change, `auto` does not use these
kernels.
"""

from __future__ import annotations

import ctypes
import functools
import json
from pathlib import Path

from . import native

FILE = Path(__file__).parent / "verified_kernels.json"


@functools.cache
def compiled_sources() -> str | None:
    """The hash of the csrc/sm90 sources compiled into deepkern._C; None if there are none."""
    module = native.load("_C")[0]
    function = (
        getattr(ctypes.CDLL(module.__file__), "deepkern_sm90_sources", None) if module else None
    )
    if function is None:
        return None
    function.restype = ctypes.c_char_p
    return function().decode()


@functools.cache
def read_record() -> dict:
    """The content of the file; empty if there is none."""
    if not FILE.exists():
        return {}
    record = json.loads(FILE.read_text())
    if not isinstance(record, dict) or {"ops", "gpu", "sources", "result"} - set(record):
        raise ValueError(f"{FILE}: expected ops, gpu, sources and result, got {record!r:.200}")
    return record


def unverified_reason(op: str) -> str | None:
    """Why `auto` does not use the Hopper kernel of `op`, or None if it may."""
    record = read_record()
    if op not in record.get("ops", ()):
        return "not verified on a GPU yet"
    if record["sources"] != compiled_sources():
        return f"its sources changed since it was verified on {record['gpu']}"
    return None
