"""The families of ops: the folders of kernels/deepkern that hold them."""

from __future__ import annotations

import deepkern

FAMILIES = ("quant", "matmul", "attention", "experts")


def family_of(op: str) -> str:
    """Such as "matmul" for fp8_gemm_nt; "other" for an op that is no longer there."""
    if op not in deepkern.OPS:
        return "other"
    return getattr(deepkern, op).__module__.split(".")[1]


def ops_of(family: str) -> list[str]:
    """The ops of a family, sorted."""
    return [op for op in sorted(deepkern.OPS) if family_of(op) == family]
