"""Helpers for the providers that an op is timed against (`others` in testing/ops/<op>.py)."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType

Calls = dict[str, Callable[[], object]]  # what to time, by a description for the report


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def prepared(prepare: Callable[[], Callable[[], object]]) -> Callable[[], object]:
    """A call that runs `prepare` the first time, which is not timed, and its result every time."""
    calls: list[Callable[[], object]] = []

    def call() -> object:
        if not calls:
            calls.append(prepare())
        return calls[0]()

    return call


def with_deep_gemm(prepare: Callable[[ModuleType], Callable[[], object]]) -> Calls:
    """DeepGEMM, if it is installed; `prepare` gets the library."""
    if not is_installed("deep_gemm"):
        return {}
    return {"DeepGEMM": prepared(lambda: prepare(importlib.import_module("deep_gemm")))}
