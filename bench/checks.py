"""Checks every op on every backend that this machine has.

`cuda`, `triton` and `cpu` are compared with the reference, within the bounds of docs/numerics.md.
The `torch` backend is the reference. It is compared, within a wider bound, with the op's `baseline`
in plain PyTorch (testing/ops/).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

import deepkern
from deepkern.runtime import backends
from deepkern.testing import compare
from deepkern.testing.ops import by_name, facts
from deepkern.testing.providers import BF16_TOLERANCE

from . import machine

ROW_TOLERANCE = 0.02  # of a row; a row of zeros has a diff of 1, FP8 rounding one of 1e-3
SMALL_ROW = 1e-3
PLAIN_TOLERANCE = BF16_TOLERANCE  # plain PyTorch rounds at other steps than the reference


@dataclass(frozen=True)
class Check:
    """One op at one size on one backend. `ok` is None if there was nothing to compare it with."""

    op: str
    backend: str
    size: str
    against: str  # "oracle" or "plain PyTorch"
    ok: bool | None
    error: float | None  # the largest diff over the outputs; 0 where bits are equal
    tolerance: float  # of `error`; 0 where bits must be equal
    note: str = ""

    def record(self) -> dict:
        return {"kind": "check", **asdict(self)}


def plan(ops: list[str]) -> list[tuple[str, str]]:
    """(op, backend) for everything that this machine can check."""
    return [(op, name) for op in ops for name in backends.BACKENDS
            if machine.served(deepkern.OPS[op], name)]  # fmt: skip


def check(op: str, backend: str, device: torch.device, seed: int = 0) -> Iterator[Check]:
    """Checks `op` on `backend` at each of its small sizes."""
    for size in facts(op).SIZES.small:
        generator = torch.Generator(device).manual_seed(seed)
        try:
            args = deepkern.OPS[op].positional(facts(op).inputs(generator, **size))
            reason = backends.unsupported_reason(deepkern.OPS[op], backend, device, args)
            if reason:
                yield Check(op, backend, text(size), "oracle", None, None, 0.0, reason)
            else:
                yield _check(op, backend, text(size), args)
        except Exception as error:
            note = f"{type(error).__name__}: {error}"[:300]
            yield Check(op, backend, text(size), "oracle", False, None, 0.0, note)


def _check(op: str, backend: str, size: str, args: tuple) -> Check:
    with torch.no_grad(), deepkern.backend(backend), compare.poison():
        got = outputs(getattr(deepkern, op), args)
    if backend == "torch":
        ok, error, note = compare_plain(op, args, got, outputs(facts(op).baseline, args))
        return Check(op, backend, size, "plain PyTorch", ok, error, PLAIN_TOLERANCE, note)
    want = outputs(getattr(deepkern.reference, op), args)
    bound = tolerance(op, want)
    try:
        error = compare.assert_matches(op, got, want)
    except compare.Mismatch as mismatch:
        return Check(op, backend, size, "oracle", False, largest(got, want), bound, str(mismatch))
    return Check(op, backend, size, "oracle", True, error, bound)


def outputs(call: Callable, args: tuple) -> tuple:
    """The outputs of `call` on copies of its tensors, or those tensors if it returns None."""
    args = tuple(copy(x) if isinstance(x, Tensor) else x for x in args)
    got = call(*args)
    got = tuple(x for x in args if isinstance(x, Tensor)) if got is None else got
    return compare.as_tuple(got)


def copy(x: Tensor) -> Tensor:
    """A copy with the same strides and the same values between its elements."""
    memory = x.untyped_storage().clone()
    return x.new_empty(0).set_(memory, x.storage_offset(), x.shape, x.stride())


def tolerance(op: str, want: tuple) -> float:
    """The widest bound of an output of `op`; 0 if all must be equal bit for bit."""
    if facts(op).EXACT:
        return 0.0
    outputs = [x for x in want if isinstance(x, Tensor) and x.dtype in compare.TOLERANCE]
    bounds = (compare.tolerance(x.dtype, op, compare.target_of(x)) for x in outputs)
    return max(bounds, default=0.0)


def largest(got: tuple, want: tuple) -> float | None:
    """The largest diff of the outputs of equal shapes, for the record of a failure."""
    pairs = [
        (g.double(), w.double())
        for g, w in zip(got, want, strict=False)
        if isinstance(g, Tensor) and isinstance(w, Tensor) and g.shape == w.shape
    ]
    diffs = [compare.diff(g.nan_to_num(0, 0, 0), w.nan_to_num(0, 0, 0)) for g, w in pairs]
    return max(diffs, default=None)


def worst_row(got: tuple, want: tuple) -> float:
    """The largest diff of a row (last dimension) of the floating-point outputs.

    A diff of all values does not show one wrong row among thousands. Rows that have less than
    SMALL_ROW of the mean energy in both are left out: rounding alone can change them.
    """
    worst = 0.0
    for g, w in zip(got, want, strict=True):
        if not isinstance(g, Tensor) or not isinstance(w, Tensor):
            continue
        if not w.is_floating_point() or w.ndim < 2 or not w.numel():
            continue
        g, w = (x.float().nan_to_num(0, 0, 0).flatten(0, -2) for x in (g, w))
        energy = g.square().sum(-1) + w.square().sum(-1)
        rows = energy > 2 * SMALL_ROW * w.square().sum(-1).mean()
        diffs = (g - w).square().sum(-1)[rows] / energy[rows]
        worst = max(worst, diffs.max().item() if diffs.numel() else 0.0)
    return worst


def compare_plain(
    op: str,
    args: tuple,
    got: tuple,
    want: tuple,
    tolerance: float = PLAIN_TOLERANCE,
    name: str = "plain PyTorch",
) -> tuple[bool | None, float | None, str]:
    """(equal, largest diff, reason if not equal) of outputs `got` and `want`; one is `name`'s.

    Integers must be equal; floating-point values, FP8 included, within `tolerance`, with NaN and
    inf at the same positions. An output that either does not give (None) is skipped; `equal` is
    None if none is left.
    """
    readable = getattr(facts(op), "readable", None)
    compared, worst = 0, 0.0
    for number, (g, w) in enumerate(zip(got, want, strict=True)):
        if not isinstance(g, Tensor) or not isinstance(w, Tensor):
            continue
        if readable is not None:
            g, w = (readable(x, **by_name(op, args)) for x in (g, w))
        compared += 1
        if g.shape != w.shape:
            return False, None, f"output {number}: {tuple(g.shape)}, {name} {tuple(w.shape)}"
        if not w.is_floating_point():
            if not torch.equal(g.to(w.dtype), w):
                return False, largest((g,), (w,)), f"output {number} differs from {name}"
            continue
        g, w = g.double(), w.double()
        finite = w.isfinite()
        if not (finite.all() and g.isfinite().all()):
            if not all(torch.equal(test(g), test(w)) for test in (torch.isnan, torch.isposinf)):
                return False, None, f"output {number}: NaN or inf at other positions than {name}"
            if not torch.equal(g.isfinite(), finite):
                return False, None, f"output {number}: -inf at other positions than {name}"
            g, w = g[finite], w[finite]
        worst = max(worst, compare.diff(g, w))
    if not compared:
        return None, None, f"{name} gives nothing to compare"
    if not worst <= tolerance:
        return False, worst, f"diff to {name} {worst:.3g} > {tolerance:.0e}"
    return True, worst, ""


def text(size: dict) -> str:
    """A size as text: 'M=33 K=300 dtype=float32', 'lengths=(4096,)*64'."""
    return " ".join(f"{name}={_value_text(value)}" for name, value in size.items())


def _value_text(value) -> str:
    if isinstance(value, tuple) and len(value) > 4 and len(set(value)) == 1:
        return f"({value[0]},)*{len(value)}"
    return str(value).removeprefix("torch.")
