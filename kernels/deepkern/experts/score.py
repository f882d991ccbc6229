"""Router scores inside Triton kernels, the same bits on every machine.

Which expert a token goes to must not depend on whose exp computed its score. So exp (of
arithmetic.py) and log1p are spelled out as IEEE additions, multiplications and divisions, each
rounded to nearest even, and the forward kernel that uses them is launched with
`enable_fp_fusion=False` (no a * b + c in one rounding). `deepkern/reference/experts.py` has the
same formulas, operation for operation, in PyTorch. A score is within 2.5 units in the last place of
float64's, as torch.sigmoid's is.

A sum must not depend on how a kernel lays out its tile either: the denominator of the softmax is
added up in integers, which is exact, and the scores of a token's experts pair by pair.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..arithmetic import exp, sigmoid


@triton.jit
def log1p(u):
    """ln(1 + u) for 0 <= u <= 1, as 2 artanh(t) with t = u / (2 + u): nothing cancels."""
    t = tl.div_rn(u, u + 2.0)
    z = t * t
    p = z * 0.116121642 + 0.108532876
    p = p * z + 0.142961785
    p = p * z + 0.199998528
    p = p * z + 0.333333343
    t += t
    return p * z * t + t


@triton.jit
def sqrtsoftplus(x):
    return tl.sqrt_rn(tl.where(x > 0.0, x, 0.0) + log1p(exp(-tl.abs(x))))


@triton.jit
def softmax_sums(x):
    """The largest of each row of `x` and the sum of e^(x - largest), both [M, 1].

    The sum is in units of 2^-40, so it is exact and has no order. It is NaN where a term is (which
    an inf in the row makes, too, and a row that is all -inf).
    """
    largest = tl.max(x, 1, keep_dims=True)
    e = exp(x - largest)
    is_nan = tl.max((e != e).to(tl.int32), 1, keep_dims=True) != 0
    units = tl.where(e == e, e, 0.0) * 1099511627776.0
    total = tl.sum(units.to(tl.int64), 1, keep_dims=True).to(tl.float32) * 9.094947017729282e-13
    return largest, tl.where(is_nan, float("nan"), total)


@triton.jit
def scores(x, largest, total, SCORE: tl.constexpr):
    """The scores of logits `x`; only softmax asks for the `softmax_sums` of their row."""
    if SCORE == "sigmoid":
        s = sigmoid(x)
    elif SCORE == "sqrtsoftplus":
        s = sqrtsoftplus(x)
    else:
        s = tl.div_rn(exp(x - largest), total)
    return s
