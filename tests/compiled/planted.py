"""Bugs planted in the PTX of compiled kernels, and the search for them.

The PTX is edited between Triton's cache and the driver, under a key of its own in Triton's table of
loaded kernels: the edited kernel reaches neither the cache nor another launch.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch

import deepkern
from deepkern.runtime import arch, ptx_driver
from deepkern.testing import compare, ops

ORDERS = ("random", "earliest", "latest")
_numbers = itertools.count()


@dataclass(frozen=True)
class Edit:
    """Of the statements that match `pattern` one is replaced; "" drops it."""

    pattern: str
    replacement: str = ""
    which: int = 0  # index of the match
    every: bool = False  # all of them

    def __call__(self, ptx: str) -> str:
        lines = ptx.split("\n")
        code = [k for k, line in enumerate(lines) if re.search(self.pattern, line.split("//")[0])]
        assert code, f"no statement matches {self.pattern}"
        for k in code if self.every else [code[self.which]]:
            statement = lines[k].split("//")[0]
            whole = "" if not self.replacement else None
            lines[k] = re.sub(self.pattern, self.replacement, statement) if whole is None else ""
        return "\n".join(lines)


@contextlib.contextmanager
def edited(target: str, edit: Callable[[str], str] | None, kernel: str) -> Iterator[list[str]]:
    """Launches inside `compiled(target)` run kernels of this name with edited PTX.

    Gives the names of the kernels that were edited.
    """
    changed: list[str] = []
    key = f"edited {target} {next(_numbers)}"
    utilities = ptx_driver.driver_for(arch.ARCHS[target]).utils
    load = utilities.load_binary

    def load_edited(name: str, ptx: bytes, *rest):
        if edit is not None and re.search(kernel, name):
            changed.append(name)
            ptx = edit(ptx.decode()).encode()
        return load(name, ptx, *rest)

    with (
        mock.patch.object(utilities, "load_binary", load_edited),
        mock.patch.object(ptx_driver.PtxDriver, "get_current_device", lambda self: key),
    ):
        yield changed


def fault_of(
    op: str, size: int, target: str, seed: int, order: str
) -> deepkern.KernelFailure | AssertionError | None:
    """What a check or the comparison with the oracle says about one run of an op."""
    generator = torch.Generator().manual_seed(seed)
    arguments = ops.inputs(op, generator, **ops.sizes(op).small[size])
    want_arguments = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments)
    options = {"seed": seed, "order": order, "max_instructions": 5_000_000}
    try:
        with deepkern.backend("triton"), deepkern.compiled(target, **options):
            got = getattr(torch.ops.deepkern, op)(*arguments)
        want = getattr(deepkern.reference, op)(*want_arguments)
        compare.assert_matches(
            op, arguments if got is None else got, want_arguments if want is None else want, target
        )
    except (deepkern.KernelFailure, AssertionError) as fault:
        return fault
    return None


@dataclass(frozen=True)
class Planted:
    """A bug in the kernel of an op; `report` is the kind of check, or "value"."""

    name: str
    target: str
    op: str
    size: int
    edit: Edit
    report: str
    kernel: str = "."

    def search(self, seed: int, seeds: int, edit: Edit | None) -> Exception | None:
        """The first fault over some seeds and all orders, or None."""
        with edited(self.target, edit, self.kernel) as changed:
            for s in range(seed, seed + seeds):
                for order in ORDERS:
                    fault = fault_of(self.op, self.size, self.target, s, order)
                    assert edit is None or changed, f"no kernel {self.kernel}"
                    if fault is not None:
                        return fault
        return None
