"""Providers: other implementations of an op, to compare its results and its speed with.

`of(op, args)` lists them: "eager" is the op's `baseline` in plain PyTorch, "compile" is
`torch.compile` of it, and the others come from `providers` in testing/ops/<op>.py: torch's own
fused functions, and libraries if they are installed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from . import ops
from .compare import as_tuple
from .timing import Timing

Call = Callable[[], object]

# The largest diff to the op's reference, by what a provider rounds. A relative error of 1 % in all
# values is a diff of 5e-5.
BF16_TOLERANCE = 2e-5  # operands or results to 16 bits; up to 8e-6 was measured
FP8_TOLERANCE = 1e-3  # intermediate results to FP8, or not to FP8 where the op does: about 3e-4


MOST_SIZES = 256  # of an op in one process, for code that torch compiles
# Every name that an op may give a provider, and what it is.
NAMES = {
    "eager": "the op in plain PyTorch, step by step",
    "compile": "torch.compile of eager; takes minutes: only if named",
    "linear_bf16": "F.linear in bf16, operands dequantized before",
    "linear_fp16": "F.linear in fp16, operands dequantized before",
    "linear_fp32": "F.linear in fp32, operands dequantized before (CPU)",
    "scaled_mm": "F.scaled_mm with blockwise scales: cuBLASLt (GPU)",
    "grouped_mm": "F.grouped_mm in bf16, operands dequantized before",
    "bmm": "torch.bmm in bf16, operands dequantized before",
    "sdpa": "F.scaled_dot_product_attention, keys gathered before",
    "sdpa_fp32": "the same in fp32 (CPU)",
    "sdpa_padded": "the same, sequences padded to the longest",
    "flex_attention": "torch's FlexAttention, compiled (GPU)",
    "deep_gemm": "DeepGEMM",
    "fast_hadamard_transform": "Dao's fast_hadamard_transform",
    "flash_attn": "FlashAttention",
    "flash_mla": "FlashMLA",
    "flashinfer": "FlashInfer",
    "liger": "Liger Kernel",
    "quack": "quack",
    "transformer_engine": "Transformer Engine",
    "vllm": "vLLM; on a CPU in a process of its own",
}


@dataclass(frozen=True)
class Provider:
    """One call; the first one may prepare something, which is not timed."""

    name: str  # such as "eager" or "deep_gemm"
    about: str  # what it does, in one line
    call: Call
    # The op's outputs from the call's result, untimed; None for an output that it does not give.
    outputs: Callable[..., tuple] = as_tuple
    tolerance: float = BF16_TOLERANCE  # of the largest diff to the reference
    # Times the call where it runs in a process of its own, for this many seconds and with this many
    # copies of the inputs. If two OpenMP pools take turns, one spins while the other works.
    time_alone: Callable[[float, int], Timing] | None = None


def of(op: str, args: tuple, names: tuple[str, ...] | None = None) -> list[Provider]:
    """The op's providers for a call with all arguments `args`, or those with one of `names`."""
    found = [eager(op, args), compiled(op, args)]
    further = getattr(ops.facts(op), "providers", None)
    if further is not None:
        try:
            found += further(**ops.by_name(op, args))
        except Exception as error:
            found.append(Provider("further providers", "", functools.partial(_raise, error)))
    return [p for p in found if names is None or p.name in names]


def eager(op: str, args: tuple) -> Provider:
    """The op's `baseline`."""
    baseline = ops.facts(op).baseline
    return Provider("eager", _about(op), lambda: baseline(*args), _outputs(args))


def compiled(op: str, args: tuple) -> Provider:
    """torch.compile of the op's `baseline`; compiles in the first call."""
    call = prepared(lambda: functools.partial(compiled_baseline(op), *args))  # imports slowly
    return Provider("compile", "torch.compile of eager", call, _outputs(args))


def _about(op: str) -> str:
    return ops.facts(op).baseline.__doc__.splitlines()[0].rstrip(".")


@functools.cache
def compiled_baseline(op: str) -> Callable:
    allow_recompilations()
    return torch.compile(ops.facts(op).baseline, dynamic=False)


def allow_recompilations() -> None:
    """One compilation per size: after the limit, 8 by default, code would run uncompiled.

    With fullgraph=True torch raises `FailOnRecompileLimitHit` there.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, MOST_SIZES)


def _outputs(args: tuple) -> Callable[[object], tuple]:
    """The outputs of a baseline: its result, or the tensors of `args` if it works in place."""

    def outputs(result: object) -> tuple:
        return (
            tuple(x for x in args if isinstance(x, Tensor)) if result is None else as_tuple(result)
        )

    return outputs


def _raise(error: Exception) -> None:
    raise error


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def prepared(prepare: Callable[[], Call]) -> Call:
    """A call that runs `prepare` the first time, which is not timed, and its result every time."""
    calls: list[Call] = []

    def call() -> object:
        if not calls:
            calls.append(prepare())
        return calls[0]()

    return call


def library(
    name: str,
    about: str,
    prepare: Callable[[ModuleType], Call],
    module: str | None = None,
    **options,
) -> list[Provider]:
    """The provider of a package, or nothing if it is not installed.

    `prepare` gets the package, or its submodule `module`; `options` are fields of `Provider`.
    """
    path = module or name
    if not is_installed(path.partition(".")[0]):
        return []
    call = prepared(lambda: prepare(importlib.import_module(path)))
    return [Provider(name, about, call, **options)]
