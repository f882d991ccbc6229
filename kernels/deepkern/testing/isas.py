"""The instruction sets under which tests run the native CPU ops."""

from __future__ import annotations

import functools
import os
from unittest import mock

import torch

from ..runtime import native

ISAS = ("portable", "avx2", "avx512")


def supported(isa: str) -> bool:
    """Whether this CPU has an instruction set of the native ops."""
    with mock.patch.dict(os.environ, DEEPKERN_CPU_ISA=isa):
        try:
            native.native_op("cast_per_token")(torch.ones(1, 1))
        except RuntimeError as error:
            assert "instruction set" in str(error)
            return False
    return True


@functools.cache
def cpu_isas() -> list[str]:
    """The instruction sets of the native ops that this CPU has."""
    return [isa for isa in ISAS if supported(isa)]
