"""Compares a result with the oracle: bit for bit, or within a bound of docs/numerics.md."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

# Ops whose floating-point outputs must equal the reference bit for bit.
BITWISE = {
    "cast_per_token",
    "cast_per_block",
    "cast_per_channel",
    "cast_back",
    "swiglu_cast",
    "rmsnorm_cast",
    "mla_cache_append",
    "mla_cache_gather",
    "indexer_cache_append",
    "hadamard_transform",
    "hadamard_cast",
    "route_topk",
    "expert_dispatch",
    "update_expert_bias",
}
TOLERANCE = {
    torch.bfloat16: 5e-6,
    torch.float16: 5e-6,
    torch.float32: 1e-9,
    torch.float64: 1e-9,
}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Mismatch(AssertionError):
    """Two results differ by more than they may."""


def diff(x: Tensor, y: Tensor) -> float:
    """1 - 2Σxy / Σ(x² + y²) in float64: 0 for equal tensors, ~ε² for a relative error ε."""
    x, y = x.double(), y.double()
    total = (x * x + y * y).sum()
    return 0.0 if total == 0 else (((x - y) ** 2).sum() / total).item()


def bits(x: Tensor) -> Tensor:
    """The bits of `x` as integers, every NaN made the same one."""
    if x.is_floating_point():
        nan = torch.full((), float("nan"), dtype=torch.float32, device=x.device).to(x.dtype)
        x = torch.where(x.isnan(), nan, x)
    return x.contiguous().view(_BITS[x.element_size()])


def assert_bitwise(got: Tensor, want: Tensor, label: str = "result") -> None:
    """Equal in dtype, shape and every bit (all NaNs count as one)."""
    _assert_alike(got, want, label)
    wrong = bits(got) != bits(want)
    if wrong.any():
        where = tuple(int(i) for i in wrong.nonzero()[0])
        raise Mismatch(
            f"{label}: {int(wrong.sum())} of {wrong.numel()} values differ, first at {where}: "
            f"got {got[where].item()!r}, want {want[where].item()!r}"
        )


def assert_close(got: Tensor, want: Tensor, label: str = "result", dtype=None) -> float:
    """Within the bound of docs/numerics.md for `dtype` (that of `got`); inf and NaN as in `want`.

    `want` may be of a wider dtype. Returns the diff.
    """
    _assert_alike(got, want.to(got.dtype), label)
    for what in (torch.isnan, torch.isposinf, torch.isneginf):
        if not torch.equal(what(got), what(want)):
            raise Mismatch(f"{label}: {what.__name__} holds at other places than in the oracle")
    finite = want.isfinite()
    error = diff(got[finite], want[finite])
    bound = TOLERANCE[dtype or got.dtype]
    if not error <= bound:
        worst = (got.double() - want.double()).abs().nan_to_num()
        raise Mismatch(f"{label}: diff {error:.3g} > {bound:.3g}; max |error| {worst.max():.3g}")
    return error


def assert_matches(op_name: str, got, want) -> float:
    """Holds all outputs of an op against the oracle's; returns the largest diff (0 if bitwise)."""
    got, want = _as_tuple(got), _as_tuple(want)
    if len(got) != len(want):
        raise Mismatch(f"{op_name}: {len(got)} outputs, the oracle has {len(want)}")
    largest = 0.0
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        label = f"{op_name} output {i}"
        if w is None:  # an output left out; the op under the public function has it empty
            if g is not None and g.numel():
                raise Mismatch(f"{label}: got {g}, want nothing")
            continue
        if op_name in BITWISE or g.dtype not in TOLERANCE:
            assert_bitwise(g, w, label)
        else:
            largest = max(largest, assert_close(g, w, label))
    return largest


def _as_tuple(outputs) -> tuple:
    return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)


def _assert_alike(got: Tensor, want: Tensor, label: str) -> None:
    if got.dtype != want.dtype or got.shape != want.shape:
        raise Mismatch(
            f"{label}: got {got.dtype} {tuple(got.shape)}, want {want.dtype} {tuple(want.shape)}"
        )


@contextlib.contextmanager
def poison() -> Iterator[None]:
    """Every uninitialised tensor made inside starts as NaN (integers: the largest value)."""
    flags = torch.utils.deterministic, torch.are_deterministic_algorithms_enabled()
    fill = flags[0].fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    flags[0].fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(flags[1])
        flags[0].fill_uninitialized_memory = fill
