"""Compares a result with the reference: bit for bit, or within a bound of docs/numerics.md."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ..runtime import arch, native
from . import ops

TOLERANCE = {  # the largest `diff` of an output, by its dtype
    torch.bfloat16: 5e-6,
    torch.float16: 5e-6,
    torch.float32: 1e-9,
    torch.float64: 1e-9,
}
# Of float32 outputs of FP8 products, where the tensor core keeps 14 bits of a sum.
FP8_SUM_TOLERANCE = 3e-7
FP8_SUM_TARGETS = ("sm_89", "sm_90", "sm_120")
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Mismatch(AssertionError):
    """Two results differ by more than the bound."""


def diff(x: Tensor, y: Tensor) -> float:
    """1 - 2Σxy / Σ(x² + y²) in float64: 0 for equal tensors, ~ε²/2 for a relative error ε."""
    x, y = x.double(), y.double()
    squares = (x * x + y * y).sum()
    return 0.0 if squares == 0 else (((x - y) ** 2).sum() / squares).item()


def bits(x: Tensor) -> Tensor:
    """The bits of `x` as integers; every NaN has the same ones."""
    if x.is_floating_point():
        nan = torch.full((), float("nan"), dtype=torch.float32, device=x.device).to(x.dtype)
        x = torch.where(x.isnan(), nan, x)
    return x.contiguous().view(_BITS[x.element_size()])


def assert_bitwise(got: Tensor, want: Tensor, label: str = "result") -> None:
    """Equal in dtype, shape and every bit (all NaNs are equal)."""
    _assert_same_type(got, want, label)
    wrong = bits(got) != bits(want)
    if wrong.any():
        first = tuple(int(i) for i in wrong.nonzero()[0])
        raise Mismatch(
            f"{label}: {int(wrong.sum())} of {wrong.numel()} values differ, first at {first}: "
            f"got {got[first].item()!r}, want {want[first].item()!r}"
        )


def tolerance(dtype: torch.dtype, op: str | None = None, target: str | None = None) -> float:
    """The largest allowed `diff` of an output of `op`, computed by the GPU target `target`.

    None: of any op; by no GPU.
    """
    is_fp8_product = op is not None and getattr(ops.facts(op), "FP8_PRODUCT", False)
    if dtype == torch.float32 and is_fp8_product and target in FP8_SUM_TARGETS:
        return FP8_SUM_TOLERANCE
    return TOLERANCE[dtype]


def target_of(x: Tensor) -> str | None:
    """The target of a tensor's GPU; None on a CPU."""
    return arch.of(x.device).name if x.is_cuda else None


def assert_close(
    got: Tensor, want: Tensor, label: str = "result", dtype=None, *, op=None, target=None
) -> float:
    """Within the bound for `dtype` (by default that of `got`); inf and NaN at the same positions.

    `want` may have a wider dtype. `op` and `target` choose the bound as in `tolerance`; the target
    is by default that of the device of `got`. Returns the diff.
    """
    _assert_same_type(got, want.to(got.dtype), label)
    for test in (torch.isnan, torch.isposinf, torch.isneginf):
        if not torch.equal(test(got), test(want)):
            raise Mismatch(f"{label}: {test.__name__} is true at other positions than expected")
    finite = want.isfinite()
    error = diff(got[finite], want[finite])
    bound = tolerance(dtype or got.dtype, op, target or target_of(got))
    if not error <= bound:
        worst = (got.double() - want.double()).abs().nan_to_num()
        raise Mismatch(f"{label}: diff {error:.3g} > {bound:.3g}; max |error| {worst.max():.3g}")
    return error


def assert_matches(op_name: str, got, want, target: str | None = None) -> float:
    """Compares all outputs of an op with the reference's; returns the largest diff (0 if EXACT).

    `target` is the GPU target that computed them: by default that of their device, if it is a GPU.
    """
    exact = ops.facts(op_name).EXACT
    got, want = as_tuple(got), as_tuple(want)
    if len(got) != len(want):
        raise Mismatch(f"{op_name}: {len(got)} outputs, the reference has {len(want)}")
    largest = 0.0
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        label = f"{op_name} output {i}"
        if w is None:  # an optional output that was not requested; the op returns it empty
            if g is not None and g.numel():
                raise Mismatch(f"{label}: got {g}, want nothing")
            continue
        if exact or g.dtype not in TOLERANCE:
            assert_bitwise(g, w, label)
        else:
            largest = max(largest, assert_close(g, w, label, op=op_name, target=target))
    return largest


def as_tuple(outputs) -> tuple:
    """The outputs of an op as a tuple, also if it has one."""
    return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)


def _assert_same_type(got: Tensor, want: Tensor, label: str) -> None:
    if got.dtype != want.dtype or got.shape != want.shape:
        raise Mismatch(
            f"{label}: got {got.dtype} {tuple(got.shape)}, want {want.dtype} {tuple(want.shape)}"
        )


@contextlib.contextmanager
def poison() -> Iterator[None]:
    """Every uninitialized tensor created inside starts as NaN (integers: the largest value)."""
    flags = torch.utils.deterministic, torch.are_deterministic_algorithms_enabled()
    fill = flags[0].fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    flags[0].fill_uninitialized_memory = True
    native.poison(True)
    try:
        yield
    finally:
        native.poison(False)
        torch.use_deterministic_algorithms(flags[1])
        flags[0].fill_uninitialized_memory = fill
