"""Which Hopper kernels a GPU has proven: `evidence.json`, which `python -m bench prove` writes.

The file names the ops whose GPU tests passed, the GPU, and the hash of the sources that ran.
Without it, or once the sources have changed, `auto` leaves these kernels alone.
"""

from __future__ import annotations

import ctypes
import functools
import json
from pathlib import Path

from . import native

FILE = Path(__file__).parent / "evidence.json"


@functools.cache
def sources() -> str | None:
    """The hash of csrc/sm90 as it was compiled into deepkern._C; None if it was not."""
    module = native._load("_C")[0]
    function = (
        getattr(ctypes.CDLL(module.__file__), "deepkern_sm90_sources", None) if module else None
    )
    if function is None:
        return None
    function.restype = ctypes.c_char_p
    return function().decode()


@functools.cache
def recorded() -> dict:
    """What the file says; empty if there is none."""
    if not FILE.exists():
        return {}
    found = json.loads(FILE.read_text())
    if not isinstance(found, dict) or {"ops", "gpu", "sources", "result"} - set(found):
        raise ValueError(f"{FILE}: expected ops, gpu, sources and result, got {found!r:.200}")
    return found


def why_unproven(op: str) -> str | None:
    """Why `auto` does not take the Hopper kernel of `op`, or None if it may."""
    found = recorded()
    if op not in found.get("ops", ()):
        return "no run on a GPU has proven it yet"
    if found["sources"] != sources():
        return f"its sources have changed since they were proven on {found['gpu']}"
    return None
