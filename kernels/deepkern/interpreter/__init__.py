"""Triton's interpreter (TRITON_INTERPRET=1) with exact arithmetic, memory checks and race checks.

Upstream does not promise correct results for bf16 and FP8 (triton issues 11584, 10945), and its
results are silently wrong. This package corrects them. It is the only monkey-patching of Triton in
the project:

numbers     formats, casts, bf16 arithmetic, fma, min/max and dots, in numpy. Upstream computes
            dots and arithmetic on bf16 *bit patterns*, truncates float32 -> bf16, rounds
            float32 -> FP8 wrongly and does not saturate, wraps float -> int, rounds tl.fma twice,
            lets NaN win in tl.maximum, and ignores input_precision.
ops         the builder's operations on those formats, and the loads and stores.
reductions  reductions and scans. Upstream compares bit patterns, ignores the index operand of
            argmax, and calls a combine function once per element.
memory      checks every load, store, atomic, descriptor and block pointer against the bounds of
            its tensor, and detects races between programs.
patches     launches, `and`/`or`/`not` on tiles (upstream returns the second operand), float and
            bool arguments (upstream passes Python numbers, which promote differently), scalars as
            loop bounds with numpy >= 2.4, autotuning without a driver (uses the first
            configuration, times nothing), and less overhead per launch and per call of a device
            function.

Known differences from a GPU: the order and precision of accumulation (a dot here is the exact sum,
rounded once, then added to the accumulator); `/`, exp, log, sqrt, sin, ... on float32, which a GPU
approximates to 1-2 ulp and the interpreter rounds correctly; multiply-add contraction (a * b + c
becomes one fma on a GPU unless enable_fp_fusion=False); payloads of NaNs; flushing of float32
subnormals by approximate functions; argmax of tiles with NaN, which depends on the layout.
Unsupported: inline assembly, libdevice, tl.dot_scaled before Triton 3.8.

DEEPKERN_INTERPRETER_ORDER=reverse or random:SEED runs the programs of a grid in another order.
"""

import os

from .memory import InterpreterMemoryError, InterpreterRaceError

__all__ = ["InterpreterMemoryError", "InterpreterRaceError", "active", "install"]

_installed = False


def active() -> bool:
    """Whether this process runs Triton kernels in the corrected interpreter."""
    return _installed


def install() -> bool:
    """Patch Triton's interpreter if TRITON_INTERPRET is set; return `active()`.

    Call it before the first kernel runs. Without TRITON_INTERPRET=1 it imports and changes nothing.

    Raises:
        RuntimeError: this version of Triton lacks a part of the interpreter that we replace.
    """
    global _installed
    enabled = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
    if enabled and not _installed:
        from .patches import apply

        apply()
        _installed = True
    return _installed
