"""Random inputs for every op, and the sizes at which it is tested, timed and inspected.

A family's module holds one function per op, under the op's name: `cast_per_token(generator,
M=..., K=...)` returns the op's arguments in the schema's order, on the generator's device. Its
`SIZES` say which keyword arguments are worth running.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

FAMILIES = ("quant", "matmul", "attention", "indexer", "sparse_attention", "experts")


@dataclass(frozen=True)
class Sizes:
    """Keyword arguments for an op's input function. The first of `small` is used everywhere."""

    small: list[dict]  # what the interpreter takes in well under a second: every test
    cpu: list[dict]  # timed on a CPU
    gpu: list[dict]  # tested and timed on a GPU
    inspect: list[dict] = field(default_factory=list)  # each tile that a launch may choose, once


def family(op_name: str):
    """The inputs module that knows `op_name`."""
    for name in FAMILIES:
        module = importlib.import_module(f"{__name__}.{name}")
        if op_name in module.SIZES:
            return module
    raise LookupError(f"{op_name}: no family's inputs module has sizes for it")


def sizes(op_name: str) -> Sizes:
    """The sizes of `op_name`."""
    return family(op_name).SIZES[op_name]


def make(op_name: str, generator: torch.Generator, **size) -> tuple:
    """The arguments of `op_name` at one size, in the schema's order."""
    maker: Callable = getattr(family(op_name), op_name)
    return maker(generator, **size)
