"""The facts of every op, one module per op: `deepkern.testing.ops.<op>`.

Tests, benchmarks and inspection read an op's facts here and nowhere else. A module has:

    inputs(generator, **size)   random arguments in the schema's order, on the generator's device
    SIZES                       keyword arguments for `inputs`: tested, timed and inspected sizes
    EXACT                       True if the outputs must equal the reference bit for bit
    cost(**arguments, result=)  the bytes and FLOPs of a call (see testing/costs.py)
    baseline(...)               plain PyTorch, with the op's own parameters; None for an output
                                that PyTorch does not give

and optionally:

    FP8_PRODUCT = True          float32 outputs are FP8 products: their tolerance depends on the
                                GPU (compare.tolerance)
    others(**arguments)         {description: call}: further providers to time, not checked
    readable(output, **arguments)
                                an output as numbers that can be compared with a tolerance

`cost`, `others` and `readable` take arguments by name and ignore the rest with `**rest`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from types import ModuleType

from torch import Generator

from ..costs import Cost

REQUIRED = ("inputs", "SIZES", "EXACT", "cost", "baseline")


@dataclass(frozen=True)
class Sizes:
    """Keyword arguments for an op's `inputs`. Most tests use the first of `small`."""

    small: list[dict]  # the interpreter runs each in well under a second; every test uses these
    cpu: list[dict]  # timed on a CPU
    gpu: list[dict]  # tested and timed on a GPU
    inspect: list[dict] = field(default_factory=list)  # each tile that a launch may choose, once


def facts(op_name: str) -> ModuleType:
    """The module with the facts of `op_name`."""
    try:
        return importlib.import_module(f"{__name__}.{op_name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{op_name}":
            raise
        raise LookupError(f"{op_name}: no module {__name__}.{op_name}") from None


def inputs(op_name: str, generator: Generator, *size, **more) -> tuple:
    """The arguments of `op_name` at one size, in the schema's order."""
    return facts(op_name).inputs(generator, *size, **more)


def sizes(op_name: str) -> Sizes:
    """The sizes of `op_name`."""
    return facts(op_name).SIZES


def by_name(op_name: str, args: tuple) -> dict:
    """All arguments of a call, which come in the schema's order, by their names."""
    from deepkern import OPS

    return dict(zip(OPS[op_name].names, args, strict=True))


def cost(op_name: str, args: tuple, result) -> Cost:
    """The bytes and FLOPs of a call with all arguments `args` that returned `result`."""
    return facts(op_name).cost(**by_name(op_name, args), result=result)
