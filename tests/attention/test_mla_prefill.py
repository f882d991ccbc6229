"""mla_prefill and its backward: ragged, hostile and empty sequences, precision, invariance.

Rows outside all sequences are NaN in the inputs, and so is every output before it is written.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import deepkern
from deepkern.testing import compare, ops

INT32_MAX = 2**31 - 1
SMALL = {"Dqk": 48, "Dv": 32}  # head widths for the interpreter
FP32 = {"dtype": torch.float32}


def check(args: tuple) -> tuple:
    """The outputs of the selected backend, compared with the reference."""
    got = deepkern.mla_prefill(*args)
    compare.assert_matches("mla_prefill", got, deepkern.reference.mla_prefill(*args))
    return got


def plain(args: tuple, b: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Sequence b by torch's scaled_dot_product_attention in `dtype`, [Lq, H, Dv]."""
    q, k, v, cu_q, cu_k, scale, causal = args
    rows, keys = slice(*cu_q[b : b + 2].tolist()), slice(*cu_k[b : b + 2].tolist())
    q, k, v = (x.transpose(0, 1).to(dtype) for x in (q[rows], k[keys], v[keys]))
    attn_mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
    if causal:
        attn_mask = attn_mask.tril(k.shape[1] - q.shape[1])
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, scale=scale, enable_gqa=q.shape[0] != k.shape[0]
    )
    return out.transpose(0, 1)


def one_sequence(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The boundaries of one sequence that is all rows, for each tensor: int32 [2]."""
    return [torch.tensor([0, len(x)], dtype=torch.int32, device=x.device) for x in tensors]


def sequence(args: tuple, b: int) -> tuple[slice, slice, tuple]:
    """Rows and keys of sequence b, and the arguments of a call with it alone."""
    q, k, v, cu_q, cu_k, *rest = args
    rows, keys = slice(*cu_q[b : b + 2].tolist()), slice(*cu_k[b : b + 2].tolist())
    return rows, keys, (q[rows], k[keys], v[keys], *one_sequence(q[rows], k[keys]), *rest)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("Hk", "Dqk", "Dv"),
    [(4, 48, 32), (1, 48, 32), (2, 20, 36)],
    ids=["heads=4", "one-key-head", "odd-widths"],
)
def test_against_torch_attention(backend, Hk, Dqk, Dv, causal, generator):
    args = ops.inputs(
        "mla_prefill",
        generator,
        (30, 9),
        (45, 9),
        H=4,
        Hk=Hk,
        Dqk=Dqk,
        Dv=Dv,
        causal=causal,
        **FP32,
    )
    out, lse = deepkern.mla_prefill(*args)
    for b, rows in enumerate((slice(0, 30), slice(30, 39))):
        compare.assert_close(out[rows], plain(args, b))
    q, k, _, _, cu_k, scale, _ = args
    keys = k[: cu_k[1]].double().repeat_interleave(4 // k.shape[1], 1)
    scores = torch.einsum("mhd,nhd->hmn", q[:30].double(), keys) * scale
    is_future = torch.ones_like(scores, dtype=torch.bool).triu(45 - 30 + 1) & causal
    compare.assert_close(lse[:, :30], scores.masked_fill(is_future, -math.inf).logsumexp(-1))


@pytest.mark.parametrize(("H", "Hk"), [(1, 1), (3, 3), (3, 1), (16, 16), (16, 1), (6, 2)])
def test_heads(kernel_backend, H, Hk, generator):
    check(ops.inputs("mla_prefill", generator, (40, 0, 3), H=H, Hk=Hk, unused=1, **SMALL))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("widths", [(192, 128), (1, 130), (100, 1), (65, 3), (17, 0), (0, 16)])
def test_widths(kernel_backend, widths, dtype, generator):
    Dqk, Dv = widths  # with H = 8, narrow widths have enough values for a stable error
    scaled = ops.inputs("mla_prefill", generator, (100,), H=8, Dqk=max(Dqk, 1), Dv=Dv, dtype=dtype)
    q, k, *rest = scaled
    check((q[..., :Dqk], k[..., :Dqk], *rest))


@pytest.mark.parametrize("causal", [True, False])
def test_lengths(backend, causal, generator):
    """Both sides empty, one key, one query, a tile plus and minus a row, q longer than k."""
    lengths, lengths_k = (0, 1, 63, 129, 5, 130, 0), (0, 63, 1, 129, 0, 257, 7)
    args = ops.inputs(
        "mla_prefill", generator, lengths, lengths_k, H=2, causal=causal, unused=2, **SMALL
    )
    out, lse = check(args)
    for rows in (slice(0, 2), slice(195, 200), slice(-2, None)):  # without a sequence or keys
        assert (out[rows] == 0).all() and (lse[:, rows] == -math.inf).all()
    if causal:  # 63 queries, one key: it is visible to the last query only
        assert (lse[:, 3:65] == -math.inf).all() and lse[:, 65].isfinite().all()


def test_strides(backend, generator):
    q, k, v, *rest = ops.inputs("mla_prefill", generator, (50, 20), H=3, **SMALL)
    want = deepkern.mla_prefill(q, k, v, *rest)
    wide = torch.full((70, 3, 100), torch.nan, dtype=q.dtype, device=q.device)
    wide[..., 1:49], wide[..., 60:92] = k, v
    q = q.transpose(0, 1).contiguous().transpose(0, 1)  # heads outermost
    got = deepkern.mla_prefill(q, wide[..., 1:49], wide[..., 60:92], *rest)
    for a, b in zip(got, want, strict=True):
        compare.assert_bitwise(a, b)


def test_sequence_bits_independent_of_batch(backend, generator):
    """A sequence has the same bits alone and at any position in a batch."""
    lengths, lengths_k = (129, 40, 3), (200, 70, 3)
    args = ops.inputs("mla_prefill", generator, lengths, lengths_k, H=2, unused=3, **SMALL)
    out, lse = deepkern.mla_prefill(*args)
    for b in range(3):
        rows, _, own_args = sequence(args, b)
        alone, alone_lse = deepkern.mla_prefill(*own_args)
        compare.assert_bitwise(alone, out[rows])
        compare.assert_bitwise(alone_lse, lse[:, rows])


@pytest.mark.parametrize("hostile", [-1, -INT32_MAX - 1, INT32_MAX, 25])
@pytest.mark.parametrize("side", [3, 4])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_hostile_boundaries(kernel_backend, hostile, side, at, generator):
    args = list(ops.inputs("mla_prefill", generator, (10, 0, 20), H=2, **SMALL, **FP32))
    args[side][at] = hostile
    check(tuple(args))


@pytest.mark.parametrize("repeat", range(4))
def test_random_boundaries(kernel_backend, repeat, generator):
    """No access outside the tensors, and every output is written."""
    q, k, v, _, _, *rest = ops.inputs(
        "mla_prefill", generator, (140,), (150,), H=1, **SMALL, **FP32
    )
    B = int(torch.randint(0, 9, (), generator=generator, device=q.device))
    bits = torch.randint(
        -(2**31), 2**31, (2, B + 1), generator=generator, device=q.device, dtype=torch.int64
    )
    near = torch.randint(-20, 180, (2, B + 1), generator=generator, device=q.device)
    use_near = torch.rand(2, B + 1, generator=generator, device=q.device) < 0.8
    cu_q, cu_k = torch.where(use_near, near, bits).int()
    check((q, k, v, cu_q, cu_k, *rest))


def test_chunks_of_queries_and_keys(backend, generator):
    """Queries in two chunks over the keys so far, and keys in two parts merged by lse."""
    q, k, v, _, _, scale, _ = ops.inputs("mla_prefill", generator, (100,), H=2, **SMALL, **FP32)

    def attend(q, k, v, causal):
        return deepkern.mla_prefill(q, k, v, *one_sequence(q, k), scale, causal)

    out, lse = attend(q, k, v, True)
    head, head_lse = attend(q[:60], k[:60], v[:60], True)
    tail, tail_lse = attend(q[60:], k, v, True)
    compare.assert_close(torch.cat((head, tail)), out.double())
    compare.assert_close(torch.cat((head_lse, tail_lse), 1), lse.double())
    old, old_lse = attend(q[60:], k[:60], v[:60], False)
    new, new_lse = attend(q[60:], k[60:], v[60:], True)
    merged, merged_lse = deepkern.merge_states(old, old_lse, new, new_lse)
    compare.assert_close(merged, out[60:].double())
    compare.assert_close(merged_lse, lse[:, 60:].double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_at_most_twice_plain_pytorch(backend, dtype, generator):
    args = ops.inputs("mla_prefill", generator, (200,), H=2, dtype=dtype)
    q, k, v, _, _, scale, _ = args
    exact = plain(args, 0)
    scores = torch.einsum("mhd,nhd->hmn", q.float(), k.float()) * scale
    is_future = torch.ones_like(scores, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(is_future, -math.inf).softmax(-1).to(dtype)
    rounded = torch.einsum("hmn,nhd->mhd", weights, v)
    got = deepkern.mla_prefill(*args)[0]
    assert compare.diff(got, exact) <= 2 * compare.diff(rounded, exact) + 1e-6


def test_large_scores(kernel_backend, generator):
    """Scores of hundreds: no overflow, and lse to fp32's precision."""
    q, k, v, *rest = ops.inputs("mla_prefill", generator, (80,), H=1, **SMALL, **FP32)
    check((q * 30, k * 30, v, *rest))
    check((q, k, v, *rest[:2], 0.0, True))


def test_inf_in_a_value_stays_inf(backend, generator):
    """In fp32, too, where the tensor core multiplies a high and a low part of each value."""
    device = generator.device
    q, k, v = torch.randn(3, 4, 1, 16, generator=generator, device=device).unbind()
    v[1, 0, 3] = math.inf
    bounds = torch.tensor([0, 4], dtype=torch.int32, device=device)
    out, _ = deepkern.mla_prefill(q, k, v, bounds, bounds, 0.25)
    assert (out[1:, 0, 3] == math.inf).all() and out[:, 0, :3].isfinite().all()


@pytest.mark.parametrize("special", [math.nan, math.inf])
def test_nan_and_inf_do_not_spread(backend, special, generator):
    """A query affects its row and head only, a key its sequence and head only."""
    args = ops.inputs("mla_prefill", generator, (40, 9), H=2, **SMALL)
    q, k, *rest = args
    k[0, 0, 3] = 1.0  # with other values all scores may be -inf, which gives zeros
    bad = q.clone()
    bad[5, 0, 3] = special
    out, lse = check((bad, k, *rest))
    want, want_lse = deepkern.mla_prefill(*args)
    others = torch.ones_like(lse, dtype=torch.bool)
    others[0, 5] = False
    assert out[5, 0].isnan().all() and lse[0, 5].isnan()
    compare.assert_bitwise(out[others.T], want[others.T])
    compare.assert_bitwise(lse[others], want_lse[others])

    bad = k.clone()
    bad[39, 1] = special
    out, lse = deepkern.mla_prefill(q, bad, *rest)
    assert out[39, 1].isnan().all() and lse[1, 39].isnan()
    compare.assert_bitwise(out[:, 0], want[:, 0])
    compare.assert_bitwise(out[40:], want[40:])


GRADIENTS = ("q", "k", "v")


def gradients(args: tuple, grad_out: torch.Tensor, grad_lse: torch.Tensor | None) -> tuple:
    """Gradients of the loss <grad_out, out> + <grad_lse, lse where finite>, by deepkern."""
    inputs = [x.detach().requires_grad_() for x in args[:3]]
    out, lse = deepkern.mla_prefill(*inputs, *args[3:])
    outputs, grads = [out], [grad_out]
    if grad_lse is not None:
        outputs, grads = [out, lse], [grad_out, grad_lse]
    return torch.autograd.grad(outputs, inputs, grads)


def plain_gradients(args: tuple, grad_out, grad_lse, dtype=torch.float64) -> tuple:
    """The same by torch's autograd in `dtype`, through one softmax over all rows and keys."""
    q, k, v = (x.detach().nan_to_num().to(dtype).requires_grad_() for x in args[:3])
    cu_q, cu_k, scale, causal = args[3:]
    group = q.shape[1] // k.shape[1]
    row = torch.arange(len(q), device=q.device)[:, None]
    key = torch.arange(len(k), device=q.device)
    attn_mask = torch.zeros(len(q), len(k), dtype=torch.bool, device=q.device)
    bounds = list(zip(cu_q.tolist(), cu_k.tolist(), strict=True))
    for (q0, k0), (q1, k1) in zip(bounds, bounds[1:], strict=False):
        same_sequence = (q0 <= row) & (row < q1) & (k0 <= key) & (key < k1)
        attn_mask |= same_sequence & (key - k1 <= row - q1) if causal else same_sequence
    k_per_head, v_per_head = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("mhd,nhd->hmn", q, k_per_head) * scale
    no_keys = ~attn_mask.any(1)
    scores = scores.masked_fill(~(attn_mask | no_keys[:, None]), -math.inf)
    weights = scores.softmax(-1).masked_fill(no_keys[:, None], 0)
    out = torch.einsum("hmn,nhd->mhd", weights, v_per_head)
    loss = (out * grad_out).sum()
    if grad_lse is not None:
        loss = loss + (scores.logsumexp(-1) * grad_lse.to(dtype))[:, ~no_keys].sum()
    return torch.autograd.grad(loss, (q, k, v))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("H", "Hk", "Dqk", "Dv", "dtype", "with_lse"),
    [
        (4, 4, 48, 32, torch.bfloat16, False),
        (4, 1, 48, 32, torch.bfloat16, True),
        (2, 1, 48, 32, torch.float32, True),
        (4, 4, 20, 36, torch.float16, True),
    ],
    ids=["out-only", "one-key-head", "fp32", "fp16-odd-widths"],
)
def test_gradients_against_autograd(backend, H, Hk, Dqk, Dv, dtype, with_lse, causal, generator):
    """Ragged: q longer than k, k longer than q, either empty, rows outside all sequences."""
    args = ops.inputs(
        "mla_prefill", generator, (50, 40, 7, 0), (75, 30, 0, 8),
        H=H, Hk=Hk, Dqk=Dqk, Dv=Dv, dtype=dtype, causal=causal, unused=2,
    )  # fmt: skip
    q, v = args[0], args[2]
    grad_out = torch.randn(*q.shape[:2], v.shape[2], generator=generator, device=q.device)
    grad_out, grad_lse = grad_out.to(q.dtype), None
    if with_lse:
        grad_lse = torch.randn(q.shape[1], len(q), generator=generator, device=q.device)
    got = gradients(args, grad_out, grad_lse)
    # The op computes delta from the rounded `out`, as in FlashAttention: part of its error.
    want = plain_gradients(args, grad_out, grad_lse)
    for name, a, b in zip(GRADIENTS, got, want, strict=True):
        compare.assert_close(a, b, name)


def test_gradient_error_at_most_twice_pytorch(backend, generator):
    args = ops.inputs("mla_prefill", generator, (150,), H=2)
    grad_out = torch.randn(150, 2, 128, generator=generator, device=generator.device).bfloat16()
    exact = plain_gradients(args, grad_out, None)
    plain = plain_gradients(args, grad_out, None, torch.bfloat16)
    got = gradients(args, grad_out, None)
    for a, b, c in zip(got, plain, exact, strict=True):
        assert compare.diff(a, c) <= 2 * compare.diff(b, c) + 1e-6


def test_gradient_of_lse_only(backend, generator):
    """As in context parallelism, where merging has a gradient through lse."""
    q, k, v, *rest = ops.inputs("mla_prefill", generator, (40,), H=2, **SMALL, **FP32)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    grad_lse = torch.randn(2, 40, generator=generator, device=q.device)
    got = torch.autograd.grad(deepkern.mla_prefill(*inputs, *rest)[1], inputs, grad_lse)
    grad_out = torch.zeros(40, 2, 32, device=q.device)
    want = plain_gradients((q, k, v, *rest), grad_out, grad_lse)
    for name, a, b in zip(GRADIENTS[:2], got, want, strict=False):
        compare.assert_close(a, b, name)
    assert (got[2] == 0).all()


def test_gradients_through_merge_states(backend, generator):
    """Keys in two parts, merged by lse; the second part is not visible to some queries."""
    q, k, v, _, _, scale, _ = ops.inputs("mla_prefill", generator, (60,), H=2, **SMALL, **FP32)
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def attend(q, k, v):
        return deepkern.mla_prefill(q, k, v, *one_sequence(q, k), scale, True)

    out, _ = attend(q, k, v)
    new = attend(q, k[25:], v[25:])  # not visible to queries 0 to 24
    head, _ = attend(q[:25], k[:25], v[:25])
    old = deepkern.mla_prefill(q, k[:25], v[:25], *one_sequence(q, k[:25]), scale, False)
    merged = torch.cat((head, deepkern.merge_states(*old, *new)[0][25:]))
    grad = torch.randn(60, 2, 32, generator=generator, device=q.device)
    got = torch.autograd.grad(merged, inputs, grad)
    for a, b in zip(got, torch.autograd.grad(out, inputs, grad), strict=True):
        compare.assert_close(a, b.double())


def test_gradient_bits_independent_of_batch(backend, generator):
    args = ops.inputs("mla_prefill", generator, (70, 33), (90, 20), H=2, Hk=1, unused=3, **SMALL)
    q = args[0]
    grad = torch.randn(len(q), 2, 32, generator=generator, device=q.device).to(q.dtype)
    in_batch = gradients(args, grad, None)
    for b in range(2):
        rows, keys, own_args = sequence(args, b)
        alone = gradients(own_args, grad[rows], None)
        for got, want, part in zip(alone, in_batch, (rows, keys, keys), strict=True):
            compare.assert_bitwise(got, want[part])


@pytest.mark.parametrize(("at", "hostile"), [(0, -1), (1, INT32_MAX), (2, -INT32_MAX - 1), (3, 0)])
def test_gradients_with_random_boundaries(backend, at, hostile, generator):
    """No access outside the tensors, and every gradient is written."""
    args = list(ops.inputs("mla_prefill", generator, (150,), (140,), H=2, Hk=1, **SMALL, **FP32))
    for side in (3, 4):
        near = torch.randint(-20, 180, (6,), generator=generator, device=generator.device).int()
        near[at] = hostile
        args[side] = near
    out, lse = deepkern.reference.mla_prefill(*args)
    grad = torch.randn(out.shape, generator=generator, device=out.device)
    backward = grad, *args[:3], out, lse, *args[3:]
    got = deepkern.mla_prefill_backward(*backward)
    want = deepkern.reference.mla_prefill_backward(*backward)
    # If every query has one key, the gradient of q is 0, and rounding is all that is left of it.
    zero = [w.abs().max() < 1e-9 and g.abs().max() < 1e-5 for g, w in zip(got, want, strict=True)]
    got = tuple(w if z else g for g, w, z in zip(got, want, zero, strict=True))
    compare.assert_matches("mla_prefill_backward", got, want)


def test_debug_errors(generator, monkeypatch):
    q, k, v, cu_q, cu_k, *rest = ops.inputs("mla_prefill", generator, (4, 5), H=1, **SMALL)
    monkeypatch.setenv("DEEPKERN_DEBUG", "1")
    with pytest.raises(ValueError, match="mla_prefill: cu_seqlens_q: expected ascending values in"):
        deepkern.mla_prefill(q, k, v, cu_q + 1, cu_k, *rest)
    with pytest.raises(ValueError, match="mla_prefill: cu_seqlens_k: expected ascending values in"):
        deepkern.mla_prefill(q, k, v, cu_q, cu_k.flip(0), *rest)


def test_errors(generator):
    q, k, v, cu_q, cu_k, scale, causal = ops.inputs("mla_prefill", generator, (4, 5), H=4, **SMALL)
    with pytest.raises(TypeError, match="mla_prefill: v: expected dtype torch.bfloat16"):
        deepkern.mla_prefill(q, k, v.half(), cu_q, cu_k, scale)
    with pytest.raises(ValueError, match="mla_prefill: k: expected a number of heads that"):
        deepkern.mla_prefill(q, k[:, :3], v[:, :3], cu_q, cu_k, scale)
    with pytest.raises(ValueError, match="mla_prefill: k: expected a number of heads that"):
        deepkern.mla_prefill(q, k[:, :0], v[:, :0], cu_q, cu_k, scale)
    with pytest.raises(ValueError, match="mla_prefill: cu_seqlens_q: expected B"):
        deepkern.mla_prefill(q, k, v, cu_q[:0], cu_k[:0], scale)
    with pytest.raises(ValueError, match="mla_prefill: softmax_scale: expected a number >= 0"):
        deepkern.mla_prefill(q, k, v, cu_q, cu_k, -1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "lengths",
    [(2048, 0, 3000), (4097,), (8192,), (1,) * 300],
    ids=["2048-0-3000", "4097", "8192", "300x1"],
)
@pytest.mark.parametrize(("H", "Hk"), [(16, 16), (16, 1), (128, 128)])
def test_long_sequences(lengths, H, Hk, causal, generator):
    """Against float64, one head at a time: the reference's scores of all heads need much memory."""
    args = ops.inputs("mla_prefill", generator, lengths, H=H, Hk=Hk, causal=causal, unused=5)
    q, k, v, *rest = args
    with deepkern.backend("triton"):
        out, lse = deepkern.mla_prefill(*args)
    for head in range(0, H, max(H // 4, 1)):
        one, kv = slice(head, head + 1), slice(head // (H // Hk), head // (H // Hk) + 1)
        want = deepkern.reference.mla_prefill(q[:, one], k[:, kv], v[:, kv], *rest)
        compare.assert_matches("mla_prefill", (out[:, one], lse[one]), want)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "lengths", [(2048, 0, 3000), (8192,), (1,) * 300], ids=["2048-0-3000", "8192", "300x1"]
)
@pytest.mark.parametrize(("H", "Hk"), [(16, 16), (16, 2), (128, 128)])
def test_gradients_of_long_sequences(lengths, H, Hk, causal, generator):
    size = {"H": H, "Hk": Hk, "causal": causal, "unused": 5, "from_lse": True}
    with deepkern.backend("triton"):
        args = ops.inputs("mla_prefill_backward", generator, lengths, **size)
        got = deepkern.mla_prefill_backward(*args)
        again = deepkern.mla_prefill_backward(*args)
    for a, b in zip(got, again, strict=True):
        compare.assert_bitwise(a, b)
    grad_out, q, k, v, out, lse, *rest, grad_lse = args
    group = H // Hk
    for kv_head in range(0, Hk, max(Hk // 4, 1)):
        heads, kv = slice(kv_head * group, (kv_head + 1) * group), slice(kv_head, kv_head + 1)
        want = deepkern.reference.mla_prefill_backward(
            grad_out[:, heads], q[:, heads], k[:, kv], v[:, kv], out[:, heads], lse[heads],
            *rest, grad_lse[heads],
        )  # fmt: skip
        for a, b in zip((got[0][:, heads], got[1][:, kv], got[2][:, kv]), want, strict=True):
            compare.assert_close(a, b)
