"""Router scores inside Triton kernels, with the same bits on every machine.

    sigmoid(x),  softmax(x) over the experts,  sqrtsoftplus(x) = sqrt(ln(1 + e^x))

The choice of experts must not depend on the exp of the machine that computes the score. So exp
(`arithmetic.py`) and log1p are written as IEEE additions, multiplications and divisions, each
rounded to nearest even, and the forward kernel that uses them is launched with
`enable_fp_fusion=False` (no fused multiply-add). `deepkern/reference/experts.py` has the same
formulas, operation for operation, in PyTorch. A score is within 2.5 units in the last place of
float64, as torch.sigmoid is.

Sums must not depend on the layout of a tile: the denominator of the softmax is summed in integers,
which is exact, and the scores of a token's experts are summed pair by pair.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..arithmetic import exp, sigmoid

SCORES = ("sigmoid", "softmax", "sqrtsoftplus")
TILE = 1024  # logits per program


@triton.jit
def log1p(u):
    """ln(1 + u) for 0 <= u <= 1, as 2 artanh(t) with t = u / (2 + u): no cancellation."""
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
def softmax_stats(x):
    """(row_max, row_sum) of `x`: the maximum of each row and Σ e^(x - row_max), both [M, 1].

    The sum is in units of 2^-40: exact, and independent of the order. It is NaN if a term is NaN,
    which an inf in the row causes, too, and a row that is all -inf.
    """
    row_max = tl.max(x, 1, keep_dims=True)
    e = exp(x - row_max)
    is_nan = tl.max((e != e).to(tl.int32), 1, keep_dims=True) != 0
    units = tl.where(e == e, e, 0.0) * 1099511627776.0
    row_sum = tl.sum(units.to(tl.int64), 1, keep_dims=True).to(tl.float32) * 9.094947017729282e-13
    return row_max, tl.where(is_nan, float("nan"), row_sum)


@triton.jit
def row_stats(x, SCORE: tl.constexpr):
    """What `scores` needs of the rows of `x` [M, N]: `softmax_stats`, or zeros for other scores."""
    row_max, row_sum = 0.0, 0.0
    if SCORE == "softmax":
        row_max, row_sum = softmax_stats(x)
    return row_max, row_sum


@triton.jit
def scores(x, row_max, row_sum, SCORE: tl.constexpr):
    """The scores of logits `x`, given the `row_stats` of their rows."""
    if SCORE == "sigmoid":
        s = sigmoid(x)
    elif SCORE == "sqrtsoftplus":
        s = sqrtsoftplus(x)
    else:
        s = tl.div_rn(exp(x - row_max), row_sum)
    return s


@triton.jit
def pointwise_gradient(grad, x, s, SCORE: tl.constexpr):
    """The gradient of logits `x`, given that of their scores `s`; SCORE is not "softmax"."""
    if SCORE == "sigmoid":
        grad *= s * sigmoid(-x)
    else:
        grad = tl.where(s > 0.0, grad * sigmoid(x) / (2.0 * s), 0.0)
    return grad
