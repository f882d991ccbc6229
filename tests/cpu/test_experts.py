"""The native routing, dispatch and combine against the reference, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deepkern
from deepkern.runtime import native
from deepkern.testing import compare, ops
from deepkern.testing.isas import cpu_isas
from deepkern.testing.random_inputs import values

F32, BF16, F16, FP8 = torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn
REAL = [BF16, F16, F32]
pytestmark = pytest.mark.skipif(
    native.native_op("expert_combine") is None, reason=str(native.missing_reason())
)
HOSTILE = [-1, -2, -(2**31), 2**31 - 1, 1000]
HOSTILE_INT64 = [*HOSTILE, -(2**63), 2**63 - 1, 2**32, 2**32 + 1]
SCORES = st.sampled_from(["sigmoid", "softmax", "sqrtsoftplus"])
dtypes = st.sampled_from(REAL)
seeds = st.integers(0, 2**31)


def check(name: str, args: tuple, want=None) -> None:
    """The native op on every instruction set equals the reference."""
    want = getattr(deepkern.reference, name)(*args) if want is None else want
    for isa in cpu_isas():
        with pytest.MonkeyPatch.context() as patch, compare.poison():
            patch.setenv("DEEPKERN_CPU_ISA", isa)
            compare.assert_matches(name, native.native_op(name)(*args), want)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def embed(x: torch.Tensor) -> torch.Tensor:
    """A copy of x within a larger tensor, so that its rows are strided and not aligned."""
    filler = torch.nan if x.dtype.is_floating_point else 77
    larger = torch.full((*x.shape[:-1], x.shape[-1] + 7), filler).to(x.dtype)
    return larger[..., 3 : 3 + x.shape[-1]].copy_(x)


def hostile_indices(draw, T: int, topk: int, limit: int, dtype: torch.dtype) -> torch.Tensor:
    """[T, topk] of valid and invalid indices, with duplicates."""
    hostile = HOSTILE_INT64 if dtype == torch.int64 else HOSTILE
    index = st.integers(0, max(limit - 1, 0)) | st.sampled_from([*hostile, limit])
    rows = draw(st.lists(st.lists(index, min_size=topk, max_size=topk), min_size=T, max_size=T))
    return embed(torch.tensor(rows, dtype=dtype).view(T, topk))


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from([*REAL, FP8]), seeds)
def test_expert_dispatch(data, dtype, seed):
    draw = data.draw
    T, topk, E = draw(st.integers(0, 9)), draw(st.integers(0, 5)), draw(st.integers(1, 20))
    K = draw(st.sampled_from([0, 1, 100, 128, 300, 2048, 2100]))
    idx = hostile_indices(draw, T, topk, E, draw(st.sampled_from([torch.int32, torch.int64])))
    x = embed(values(generator(seed), T, K, dtype=F32).clamp(-448, 448).to(dtype))
    cast = draw(st.sampled_from([None, "fp32", "ue8m0"])) if dtype != FP8 else None
    scale = None
    if cast is None and draw(st.booleans()):
        scale = torch.rand(-(-K // 128), T, generator=generator(seed)).T
    num_assigned = draw(st.none() | st.integers(0, 30))
    args = x, idx, E, scale, draw(st.integers(1, 5)), cast, num_assigned
    check("expert_dispatch", args)
    check("expert_load", (idx, E))


@settings(max_examples=40, deadline=None)
@given(st.data(), dtypes, dtypes, st.none() | dtypes, seeds)
def test_expert_combine(data, dtype, weights_dtype, shared_dtype, seed):
    draw = data.draw
    T, topk, rows = draw(st.integers(0, 6)), draw(st.integers(0, 70)), draw(st.integers(0, 20))
    K = draw(st.sampled_from([0, 1, 31, 100, 1024, 1100]))
    y = embed(values(generator(seed), rows, K, dtype=dtype))
    handle = hostile_indices(draw, T, topk, rows, torch.int32)
    # Positive terms: the bound on the error is relative to their sum.
    y = y.abs()
    weights = embed(torch.rand(T, topk, generator=generator(seed)).to(weights_dtype))
    shared = None
    if shared_dtype is not None:
        shared = embed(values(generator(seed), T, K, dtype=shared_dtype).abs())
    check("expert_combine", (y, weights, handle, shared))
    check("expert_dispatch_backward", (y, handle))


@settings(max_examples=25, deadline=None)
@given(st.data(), dtypes, dtypes, dtypes, seeds)
def test_expert_combine_backward(data, dtype, grad_dtype, weights_dtype, seed):
    """Each row is named at most once; other entries of the handle are hostile."""
    draw = data.draw
    T, topk, rows = draw(st.integers(0, 6)), draw(st.integers(0, 5)), draw(st.integers(0, 40))
    K = draw(st.sampled_from([0, 1, 31, 128, 300]))
    entries = [*range(rows), *HOSTILE * 12]
    order = torch.randperm(len(entries), generator=generator(seed))[: T * topk]
    handle = embed(torch.tensor(entries, dtype=torch.int32)[order].view(T, topk))
    grad = embed(values(generator(seed), T, K, dtype=grad_dtype).abs())
    y = embed(values(generator(seed + 1), rows, K, dtype=dtype).abs())
    weights = embed(torch.rand(T, topk, generator=generator(seed)).to(weights_dtype))
    check("expert_combine_backward", (grad, y, weights, handle))


def test_combine_backward_writes_the_last_of_equal_rows(isa):
    """As the Triton kernel: if several slots name one row, the last slot counts."""
    handle = torch.tensor([[1, 1], [0, 1]], dtype=torch.int32)
    weights = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    grad, y = torch.tensor([[1.0], [10.0]]), torch.ones(3, 1)
    grad_y, grad_weights = native.native_op("expert_combine_backward")(grad, y, weights, handle)
    assert grad_y.flatten().tolist() == [30.0, 40.0, 0.0]
    assert grad_weights.tolist() == [[1.0, 1.0], [10.0, 10.0]]


@settings(max_examples=50, deadline=None)
@given(st.data(), dtypes, st.none() | dtypes, SCORES, st.booleans(), st.booleans(), seeds)
def test_route_topk(data, dtype, bias_dtype, score, normalize, special, seed):
    """Logits in steps of 1/8, so that there are equal scores; some are NaN or infinite."""
    draw = data.draw
    T, num_groups, size = draw(st.integers(0, 6)), draw(st.integers(1, 9)), draw(st.integers(1, 40))
    topk_groups = draw(st.integers(1, num_groups))
    topk = draw(st.integers(1, topk_groups * size))
    E = num_groups * size
    logits = (torch.randn(T, E, generator=generator(seed)) * 24).round() / 8
    bias = torch.randn(E, generator=generator(seed))
    if special and T:
        bad = torch.tensor([torch.nan, torch.inf, -torch.inf, -200.0])
        at = torch.randint(T * E, (4,), generator=generator(seed))
        logits.view(-1)[at] = bad[torch.randperm(4, generator=generator(seed))]
        bias[0] = -torch.inf
    bias = None if bias_dtype is None else bias.to(bias_dtype)
    group_score = draw(st.sampled_from(["top2", "max"]))
    rule = topk, num_groups, topk_groups, score, group_score, normalize, 2.5
    check("route_topk", (embed(logits.to(dtype)), bias, *rule))


@settings(max_examples=40, deadline=None)
@given(st.data(), dtypes, dtypes, SCORES, st.booleans(), seeds)
def test_route_topk_backward(data, dtype, grad_dtype, score, normalize, seed):
    draw = data.draw
    T, topk, E = draw(st.integers(0, 6)), draw(st.integers(0, 6)), draw(st.integers(1, 40))
    idx = hostile_indices(draw, T, topk, E, torch.int64)
    grad = embed(torch.randn(T, topk, generator=generator(seed)).to(grad_dtype))
    logits = embed((torch.randn(T, E, generator=generator(seed)) * 2).to(dtype))
    args = grad, logits, idx, score, normalize, 2.5
    want = deepkern.reference.route_topk_backward(*args)
    # Where a weight is 1 for all logits, the gradient differs from 0 only by rounding: one
    # chosen expert with `normalize`, a softmax over one expert.
    chosen = [len({e for e in row if 0 <= e < E}) for row in idx.tolist()]
    constant = [normalize and n == 1 or score == "softmax" and E == 1 for n in chosen]
    cancels = torch.tensor(constant, dtype=torch.bool)
    for isa in cpu_isas():
        with pytest.MonkeyPatch.context() as patch, compare.poison():
            patch.setenv("DEEPKERN_CPU_ISA", isa)
            got = native.native_op("route_topk_backward")(*args)
        assert got[cancels].abs().sum() <= 1e-4
        compare.assert_close(got[~cancels], want[~cancels])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 3), st.integers(0, 70), st.integers(1, 40), SCORES, dtypes, st.data(), seeds)
def test_sequence_balance_loss(B, S, E, score, dtype, data, seed):
    topk = data.draw(st.integers(0, 4))
    grad, logits, idx, score, alpha = ops.inputs(
        "sequence_balance_loss_backward", generator(seed), B=B, S=S, E=E, topk=topk, score=score,
        dtype=dtype,
    )  # fmt: skip
    logits, idx = embed(logits), embed(idx)
    check("sequence_balance_loss", (logits, idx, score, alpha))
    if E > 1:  # with one expert the gradient differs from 0 only by rounding
        check("sequence_balance_loss_backward", (grad, logits, idx, score, alpha))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(-9, 9) | st.sampled_from([2**62, -(2**63)]), max_size=20),
    st.sampled_from([0.001, 0.0, -1.0, torch.inf]),
    st.booleans(),
)
def test_update_expert_bias(load, rate, narrow):
    load = torch.tensor(load, dtype=torch.int64)
    bias = torch.linspace(-1, 1, len(load))
    check("update_expert_bias", (bias, load.int() if narrow else load, rate))


# Enough tokens for two threads.
LARGE = {
    "expert_dispatch": {"T": 70, "E": 16, "topk": 4, "K": 1100, "cast": "fp32"},
    "expert_combine": {"T": 70, "topk": 4, "K": 1100},
    "expert_combine_backward": {"T": 70, "topk": 4, "K": 1100},
    "route_topk": {"T": 100, "E": 256, "num_groups": 8, "topk_groups": 4},
    "route_topk_backward": {"T": 100, "E": 256},
    "sequence_balance_loss": {"B": 2, "S": 200, "E": 64, "topk": 4},
    "sequence_balance_loss_backward": {"B": 2, "S": 200, "E": 64, "topk": 4},
}


@pytest.mark.parametrize("name", LARGE)
def test_bits_independent_of_threads(name, isa):
    args = ops.inputs(name, generator(1), **LARGE[name])
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(compare.as_tuple(native.native_op(name)(*args)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            compare.assert_bitwise(got, want)


def test_bits_independent_of_other_tokens(isa):
    logits, *rule = ops.inputs("route_topk", generator(2), **LARGE["route_topk"])
    y, weights, handle = ops.inputs("expert_combine", generator(2), **LARGE["expert_combine"])
    route, combine = native.native_op("route_topk"), native.native_op("expert_combine")
    routed, combined = route(logits, *rule), combine(y, weights, handle)
    for first, last in ((0, 1), (17, 20), (69, 70)):
        for got, want in zip(route(logits[first:last], *rule), routed, strict=True):
            compare.assert_bitwise(got, want[first:last])
        part = combine(y, weights[first:last], handle[first:last])
        compare.assert_bitwise(part, combined[first:last])


def bad_calls() -> dict[str, tuple]:
    """By message: (op, arguments), each of which the Python contract rejects, too."""
    x, idx, handle = torch.ones(3, 8), torch.zeros(3, 2).long(), torch.zeros(3, 2).int()
    weights, q = torch.ones(3, 2), torch.ones(3, 8).to(FP8)
    return {
        "expert_dispatch: topk_idx: expected size": ("expert_dispatch", (x, idx[:2], 4)),
        "expert_dispatch: topk_idx: expected dtype": ("expert_dispatch", (x, idx.float(), 4)),
        "expert_dispatch: num_experts": ("expert_dispatch", (x, idx, 0)),
        "expert_dispatch: alignment": ("expert_dispatch", (x, idx, 4, None, 0)),
        "expert_dispatch: topk_idx: expected fewer": (
            "expert_dispatch", (x, idx, 4, None, 2**62)),
        "expert_dispatch: cast: expected None": (
            "expert_dispatch", (q, idx, 4, None, 1, "fp32")),
        "expert_dispatch: cast: expected ue8m0": (
            "expert_dispatch", (x, idx, 4, None, 1, "fp16")),
        "expert_dispatch: x_scale": ("expert_dispatch", (x, idx, 4, torch.ones(3, 2))),
        "expert_dispatch: num_assigned": (
            "expert_dispatch", (x, idx, 4, None, 1, None, -1)),
        "expert_load: num_experts": ("expert_load", (idx, 0)),
        "expert_combine: handle: expected dtype": ("expert_combine", (x, weights, idx)),
        "expert_combine: handle: expected size": ("expert_combine", (x, weights, handle[:2])),
        "expert_combine: shared": ("expert_combine", (x, weights, handle, x[:2])),
        "expert_combine_backward: y": ("expert_combine_backward", (x, x[:, :7], weights, handle)),
        "expert_dispatch_backward: grad": ("expert_dispatch_backward", (q, handle)),
        "route_topk: score": ("route_topk", (x, None, 2, 1, 1, "relu")),
        "route_topk: group_score": ("route_topk", (x, None, 2, 1, 1, "sigmoid", "top3")),
        "route_topk: num_groups": ("route_topk", (x, None, 2, 3)),
        "route_topk: topk_groups": ("route_topk", (x, None, 2, 2, 3)),
        "route_topk: topk: ": ("route_topk", (x, None, 9)),
        "route_topk: bias": ("route_topk", (x, x[0, :7], 2)),
        "route_topk_backward: idx": ("route_topk_backward", (weights, x, handle)),
        "sequence_balance_loss: score": ("sequence_balance_loss", (x[None], idx[None], "relu")),
        "sequence_balance_loss: topk_idx": ("sequence_balance_loss", (x[None], idx)),
        "sequence_balance_loss_backward: grad": (
            "sequence_balance_loss_backward", (torch.ones(2), x[None], idx[None])),
        "update_expert_bias: load": ("update_expert_bias", (x[0], idx[0])),
    }  # fmt: skip


def test_bad_arguments_raise():
    for message, (name, args) in bad_calls().items():
        with pytest.raises(RuntimeError, match=message):
            native.native_op(name)(*args)
        with pytest.raises((TypeError, ValueError)), deepkern.backend("torch"):
            getattr(deepkern, name)(*args)
