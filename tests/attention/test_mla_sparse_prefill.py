"""mla_sparse_prefill and its backward: FlashMLA's grid at sizes for the interpreter.

Rows of kv that no index selects are NaN. Gradients are compared with float64 autograd of a formula
that differs from the reference's.
"""

from __future__ import annotations

import math

import pytest
import torch

import deepkern
from deepkern.attention import sparse_gradients
from deepkern.testing import compare, ops
from deepkern.testing.sparse_attention import OPTIONS

FP32 = {"dtype": torch.float32}
SMALL = {"R": 64, "D": 16}
FAR = 2**31 - 1
HOSTILE = [-1, -FAR - 1, FAR, "rows"]


def valid_indices(args: tuple) -> torch.Tensor:
    """Which indices select a row: bool [S, topk]."""
    _, kv, indices, _, _, _, topk_length = args
    valid = (indices >= 0) & (indices < kv.shape[0])
    if topk_length is not None:
        place = torch.arange(indices.shape[-1], device=indices.device)
        valid &= place < topk_length[:, None, None]
    return valid[:, 0]


def poisoned(args: tuple) -> tuple:
    """The arguments with NaN in every row of kv that no valid index selects."""
    q, kv, indices, *rest = args
    selected = torch.zeros(kv.shape[0], dtype=torch.bool, device=kv.device)
    selected[indices[:, 0][valid_indices(args)].long()] = True
    return q, kv.masked_fill(~selected[:, None, None], math.nan), indices, *rest


def check(args: tuple) -> tuple:
    """The op's results, after a comparison with the oracle, whose result stays in float64."""
    args = poisoned(args)
    got = deepkern.mla_sparse_prefill(*args)
    want = deepkern.reference.mla_sparse_prefill(args[0].double(), *args[1:])
    for g, w in zip(got, want, strict=True):
        compare.assert_close(g, w)
    return got


def torch_attention(q, kv, indices, scale, R, sink, valid) -> tuple[torch.Tensor, ...]:
    """All queries by torch's softmax, the sink one more column; NaN for a query without rows."""
    keys = kv[indices[:, 0].long().clamp(0, kv.shape[0] - 1), 0]  # [S, topk, W]
    scores = torch.einsum("shw,snw->shn", q, keys) * scale
    scores = scores.masked_fill(~valid[:, None], -math.inf)
    column = torch.full_like(scores[..., :1], -math.inf)
    column = column if sink is None else sink[None, :, None] + torch.zeros_like(column)
    weights = torch.cat((scores, column), -1).softmax(-1)[..., :-1]
    out = torch.einsum("shn,snr->shr", weights, keys[..., :R])
    return out, scores.amax(-1), scores.logsumexp(-1)


def exact_gradients(args: tuple, grad_out, grad_lse) -> tuple[torch.Tensor, ...]:
    """Gradients of q, kv and the sink in float64."""
    q, kv, indices, scale, R, sink, _ = args
    leaves = [x.detach().double().requires_grad_() for x in (q, kv, sink) if x is not None]
    sink = leaves[2] if sink is not None else None
    out, _, lse = torch_attention(*leaves[:2], indices, scale, R, sink, valid_indices(args))
    loss = (out * grad_out.double()).sum()
    if grad_lse is not None:
        loss = loss + (lse * grad_lse.double()).sum()
    return torch.autograd.grad(loss, leaves)


def gradients(args: tuple, grad_out, grad_lse) -> tuple[torch.Tensor, ...]:
    """Gradients of q, kv and the sink through the public function."""
    q, kv, indices, scale, R, sink, topk_length = args
    leaves = [x.detach().requires_grad_() for x in (q, kv, sink) if x is not None]
    q, kv, *rest = leaves
    out, _, lse = deepkern.mla_sparse_prefill(
        q, kv, indices, scale, R, rest[0] if rest else None, topk_length
    )
    outputs, grads = (out,), (grad_out,)
    if grad_lse is not None:
        outputs, grads = (out, lse), (grad_out, grad_lse)
    return torch.autograd.grad(outputs, leaves, grads)


def with_gradients(generator, args: tuple, lse: bool = True) -> tuple:
    """Arguments of `gradients`, with random gradients of out and lse; lse is finite."""
    q, _, indices, _, R, _, topk_length = args
    indices[:, 0, 0] = 0  # every query has a row: otherwise torch_attention gives NaN
    if topk_length is not None:
        topk_length.clamp_(min=1)
    grad_out = torch.randn(*q.shape[:2], R, generator=generator, device=q.device).to(q.dtype)
    grad_lse = torch.randn(q.shape[:2], generator=generator, device=q.device) if lse else None
    return args, grad_out, grad_lse


def check_gradients(inputs: tuple) -> None:
    """Compares with float64 autograd in fp32, and in bf16 with the oracle.

    The oracle receives the op's own rounded out. The error of bf16 results is also compared with
    that of plain PyTorch, below.
    """
    args, grad_out, grad_lse = inputs
    q, kv, indices, scale, _, sink, lengths = args
    got = gradients(*inputs)
    if q.dtype == torch.float32:
        want = exact_gradients(*inputs)
    else:
        out, _, lse = deepkern.mla_sparse_prefill(*args)
        want = deepkern.reference.mla_sparse_prefill_backward(
            grad_out, grad_lse, q.double(), kv.double(), indices, out, lse, scale, sink, lengths
        )
    for g, w in zip(got, want if sink is not None else want[:2], strict=True):
        compare.assert_close(g, w)


def test_matches_torch_softmax(backend, generator):
    args = ops.inputs("mla_sparse_prefill", generator, H=5, sink=True, holes=False, **SMALL, **FP32)
    q, kv, indices, scale, R, sink, _ = args
    valid = valid_indices(args)
    want = torch_attention(q.double(), kv.double(), indices, scale, R, sink.double(), valid)
    for g, w in zip(deepkern.mla_sparse_prefill(*args), want, strict=True):
        compare.assert_close(g, w)


@pytest.mark.parametrize("H", [1, 3, 9, 16, 63, 64, 126, 128])
def test_any_number_of_heads(kernel_backend, H, generator):
    check(ops.inputs("mla_sparse_prefill", generator, H=H, **SMALL, **OPTIONS))


@pytest.mark.parametrize("kind", [{}, {"dtype": torch.float16}, FP32], ids=["bf16", "fp16", "fp32"])
def test_v3_widths(kernel_backend, kind, generator):
    check(ops.inputs("mla_sparse_prefill", generator, S=2, H=9, topk=70, **kind))


@pytest.mark.parametrize(("R", "D"), [(130, 6), (1, 1), (16, 0), (0, 20)])
def test_odd_widths(kernel_backend, R, D, generator):
    check(ops.inputs("mla_sparse_prefill", generator, H=2, R=R, D=D, **FP32))


@pytest.mark.parametrize("topk", [0, 1, 63, 64, 65, 600])
def test_any_topk(kernel_backend, topk, generator):
    size = {"S": 2, "H": 2, "topk": topk, "Skv": 300, **SMALL, **FP32}
    check(ops.inputs("mla_sparse_prefill", generator, **size, **OPTIONS))


def test_strided_operands(backend, generator):
    args = ops.inputs("mla_sparse_prefill", generator, H=4, **SMALL)
    q, kv, indices, *rest = args
    apart = q.new_full((*q.shape[:2], 96), math.nan)
    apart[..., :80] = q
    wide = torch.cat((kv, torch.full_like(kv, math.nan)), 1)
    got = deepkern.mla_sparse_prefill(apart[..., :80], wide[:, :1], indices, *rest)
    for g, w in zip(got, deepkern.mla_sparse_prefill(*args), strict=True):
        compare.assert_bitwise(g, w)


@pytest.mark.parametrize("hostile", HOSTILE, ids=["-1", "min", "max", "end"])
def test_indices_out_of_range_are_ignored(backend, hostile, generator):
    args = ops.inputs("mla_sparse_prefill", generator, H=2, sink=True, **SMALL, **FP32)
    q, kv, indices, *rest = args
    hostile = kv.shape[0] if hostile == "rows" else hostile
    some = indices.clone()
    some[..., ::3] = hostile
    got = check((q, kv, some, *rest))
    kept = torch.arange(32, device=q.device) % 3 != 0
    want = deepkern.reference.mla_sparse_prefill(q, kv, indices[..., kept], *rest)
    for g, w in zip(got, want, strict=True):
        compare.assert_close(g, w)
    out, max_logits, lse = check((q, kv, torch.full_like(indices, hostile), *rest))
    assert (out == 0).all() and (lse == -math.inf).all() and (max_logits == -math.inf).all()


def test_lengths_clamp_and_limit_indices(backend, generator):
    q, kv, indices, *rest, _ = ops.inputs("mla_sparse_prefill", generator, S=4, H=2, **SMALL)
    lengths = torch.tensor([-5, 7, FAR, -FAR - 1], dtype=torch.int32, device=q.device)
    out, _, lse = check((q, kv, indices, *rest, lengths))
    assert (out[[0, 3]] == 0).all() and (lse[[0, 3]] == -math.inf).all()
    short = deepkern.mla_sparse_prefill(q[1:2], kv, indices[1:2, :, :7], *rest)
    compare.assert_bitwise(out[1:2], short[0])
    compare.assert_bitwise(lse[1:2], short[2])


def test_sinks(backend, generator):
    """-inf changes no bit, +inf gives 0; max_logits and lse stay the same."""
    args = ops.inputs("mla_sparse_prefill", generator, H=4, **SMALL)
    q, kv, indices, scale, R, _, _ = args
    indices[1] = -1
    sink = torch.tensor([math.inf, -math.inf, 0.5, -3.0], device=q.device)
    out, max_logits, lse = check((q, kv, indices, scale, R, sink, None))
    plain, plain_max, plain_lse = deepkern.mla_sparse_prefill(*args)
    compare.assert_bitwise(lse, plain_lse)
    compare.assert_bitwise(max_logits, plain_max)
    compare.assert_bitwise(out[:, 1], plain[:, 1])
    assert (out[:, 0] == 0).all() and (out[1] == 0).all() and (out[0, 1:] != 0).any()


def test_bits_independent_of_other_queries(backend, generator):
    args = ops.inputs("mla_sparse_prefill", generator, S=4, H=3, **SMALL, **OPTIONS)
    q, kv, indices, scale, R, sink, lengths = args
    got = deepkern.mla_sparse_prefill(*args)
    for s in range(4):
        one = slice(s, s + 1)
        alone = deepkern.mla_sparse_prefill(q[one], kv, indices[one], scale, R, sink, lengths[one])
        for g, a in zip(got, alone, strict=True):
            compare.assert_bitwise(a[0], g[s])


def test_same_bits_as_mla_sparse_decode(backend, generator):
    """With one query per sequence and too few indices for a split."""
    if backend == "cpu":
        pytest.skip("the native ops have different kernels")
    args = ops.inputs("mla_sparse_prefill", generator, H=3, **SMALL, **OPTIONS)
    q, kv, indices, scale, R, sink, lengths = args
    out, _, lse = deepkern.mla_sparse_prefill(*args)
    got = deepkern.mla_sparse_decode(q[:, None], kv[:, None], indices, scale, lengths, sink, R)
    compare.assert_bitwise(got[0][:, 0], out)
    compare.assert_bitwise(got[1][..., 0], lse)


@pytest.mark.parametrize("kind", [{}, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(
    "size",
    [
        {"H": 9, **SMALL, **OPTIONS},
        {"H": 17, "topk": 70, "Skv": 30, **SMALL},
        {"H": 18, "R": 130, "D": 6, "sink": True},
        {"S": 2, "H": 16, "topk": 40, "Skv": 64, "sink": True},
    ],
    ids=["H9-options", "H17", "H18-R130", "H16-R512"],
)
def test_gradients(backend, size, kind, generator):
    args = ops.inputs("mla_sparse_prefill", generator, **size, **kind)
    inputs = with_gradients(generator, args)
    check_gradients(inputs)


@pytest.mark.parametrize("kind", [{}, FP32], ids=["bf16", "fp32"])
def test_gradients_one_query_at_a_time(backend, kind, generator, monkeypatch):
    """With the smallest workspace."""
    monkeypatch.setattr(sparse_gradients, "WORKSPACE", 1)
    size = {"S": 5, "H": 6, "Skv": 20, "sink": True}
    args = ops.inputs("mla_sparse_prefill", generator, **size, **SMALL, **kind)
    inputs = with_gradients(generator, args, lse=False)
    check_gradients(inputs)


def test_gradient_of_a_row_that_all_select(backend, generator):
    """Every index of every query is the same row: its gradient is a sum over all pairs."""
    args = ops.inputs("mla_sparse_prefill", generator, S=4, H=2, topk=50, **SMALL, **FP32)
    args[2].fill_(7)
    inputs = with_gradients(generator, args, lse=False)
    args[2].fill_(7)
    got, want = gradients(*inputs), exact_gradients(*inputs)
    compare.assert_close(got[1], want[1])
    assert (got[1][torch.arange(50, device=args[0].device) != 7] == 0).all()


def test_gradients_of_queries_without_rows(backend, generator):
    """Indices out of range and infinite sinks: gradients are 0, and nothing is NaN."""
    args = ops.inputs("mla_sparse_prefill", generator, S=3, H=3, sink=True, **SMALL)
    q, kv, indices, scale, R, sink, _ = args
    sink[:2] = torch.tensor([math.inf, -math.inf])
    indices[0], indices[1] = -1, FAR
    args = poisoned(args)
    grad_out = torch.randn(3, 3, R, generator=generator, device=q.device).to(q.dtype)
    grad_q, grad_kv, grad_sink = gradients(args, grad_out, None)
    selected = indices[2, 0][indices[2, 0] >= 0].long().unique()
    assert (grad_q[:2] == 0).all() and (grad_q[2, 0] == 0).all() and (grad_q[2, 1:] != 0).any()
    assert (grad_sink[:2] == 0).all() and grad_sink[2] != 0
    assert grad_kv.isfinite().all() and (grad_kv[selected] != 0).any()
    grad_kv[selected] = 0
    assert (grad_kv == 0).all()


def test_grad_q_independent_of_other_queries(backend, generator):
    args = ops.inputs(
        "mla_sparse_prefill_backward", generator, grad_lse=True, H=3, **SMALL, **OPTIONS
    )
    grad_out, grad_lse, q, kv, indices, out, lse, scale, sink, lengths = args
    grad_q = deepkern.mla_sparse_prefill_backward(*args)[0]
    one = slice(1, 2)
    alone = deepkern.mla_sparse_prefill_backward(
        grad_out[one], grad_lse[one], q[one], kv, indices[one], out[one], lse[one], scale, sink,
        lengths[one],
    )  # fmt: skip
    compare.assert_bitwise(alone[0][0], grad_q[1])


def test_gradient_error_at_most_twice_pytorch(backend, generator):
    args = ops.inputs("mla_sparse_prefill", generator, S=8, H=16, Skv=60, topk=48, **SMALL)
    inputs = with_gradients(generator, args, lse=False)
    q, kv, indices, scale, R, sink, _ = args
    leaves = [x.detach().requires_grad_() for x in (q, kv)]
    keys = leaves[1][indices[:, 0].long().clamp(min=0), 0]
    scores = torch.einsum("shw,snw->shn", leaves[0], keys).float() * scale
    weights = scores.masked_fill(~valid_indices(args)[:, None], -math.inf).softmax(-1).bfloat16()
    out = torch.einsum("shn,snr->shr", weights, keys[..., :R])
    plain = torch.autograd.grad(out, leaves, inputs[1])
    for g, p, e in zip(gradients(*inputs), plain, exact_gradients(*inputs), strict=True):
        assert compare.diff(g, e) <= 2 * compare.diff(p, e) + 1e-6


def peak(call) -> int:
    """Peak bytes of CPU memory that torch allocates during a call."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    allocated = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()
            most = max(most, allocated)
    return most


@pytest.mark.slow
def test_peak_memory_of_the_backward(generator, monkeypatch):
    """The workspace, fp32 sums and the gradients, for any number of queries."""
    if generator.device.type != "cpu":
        pytest.skip("measures CPU memory; for a GPU see test_peak_memory_on_a_gpu")
    monkeypatch.setattr(sparse_gradients, "WORKSPACE", 1 << 20)
    args = ops.inputs("mla_sparse_prefill_backward", generator, S=8, H=4, topk=700, **SMALL)
    q, kv = args[2:4]
    launch = deepkern.OPS["mla_sparse_prefill_backward"].launcher("triton")
    bound = (1 << 20) + 4 * kv.numel() + 2 * (kv.numel() + q.numel()) + 4096
    assert (1 << 19) < peak(lambda: launch(*args)) <= bound
    at_once = sparse_gradients.queries_at_once(8, 4, 80, 700, 2)
    assert 1 <= at_once < 8, "the bound tests nothing if all queries fit"


@pytest.mark.parametrize("what", ["forward", "backward"])
def test_any_indices_are_safe(what, generator):
    """Any int32 for an index or a length: the interpreter raises for an access out of bounds."""
    device = generator.device

    def hostile(high, *shape):
        """A third in bounds, a third near the bounds, a third any int32."""
        kind = torch.randint(0, 3, shape, generator=generator, device=device)
        near = torch.randint(-2, high + 3, shape, generator=generator, device=device)
        wide = torch.randint(-FAR - 1, FAR, shape, generator=generator, device=device)
        return torch.where(kind == 0, near.clamp(0, high), torch.where(kind == 1, near, wide)).int()

    for _ in range(3):
        args = ops.inputs(
            "mla_sparse_prefill", generator, S=4, H=2, topk=80, sink=True, **SMALL, **FP32
        )
        q, kv, _, scale, R, sink, _ = args
        args = q, kv, hostile(50, 4, 1, 80), scale, R, sink, hostile(80, 4)
        with deepkern.backend("triton"):
            got = deepkern.mla_sparse_prefill(*args)
        compare.assert_matches(
            "mla_sparse_prefill", got, deepkern.reference.mla_sparse_prefill(*args)
        )
        if what == "backward":
            grad = torch.randn_like(got[0])
            back = (grad, None, q, kv, args[2], got[0], got[2], scale, sink, args[6])
            want = deepkern.reference.mla_sparse_prefill_backward(*back)
            with deepkern.backend("triton"):
                got = deepkern.mla_sparse_prefill_backward(*back)
            compare.assert_matches("mla_sparse_prefill_backward", got, want)


def test_debug_errors_name_the_argument(generator, monkeypatch):
    args = ops.inputs("mla_sparse_prefill", generator, S=1, H=1, topk=5, lengths=True, **SMALL)
    *rest, lengths = args
    monkeypatch.setenv("DEEPKERN_DEBUG", "1")
    lengths.fill_(4)
    args[2][..., 4] = FAR  # past the length
    deepkern.mla_sparse_prefill(*args)
    with pytest.raises(ValueError, match=r"mla_sparse_prefill: topk_length: expected lengths in"):
        deepkern.mla_sparse_prefill(*rest, lengths + 2)
    with pytest.raises(ValueError, match=r"mla_sparse_prefill: indices: expected values in \[-1"):
        deepkern.mla_sparse_prefill(*rest, lengths + 1)


def test_errors(generator):
    args = ops.inputs("mla_sparse_prefill", generator, S=1, H=1, **SMALL)
    with pytest.raises(TypeError, match="mla_sparse_prefill: kv: expected q's dtype"):
        deepkern.mla_sparse_prefill(args[0], args[1].float(), *args[2:])
    with pytest.raises(ValueError, match="mla_sparse_prefill: v_head_dim: expected a part of"):
        deepkern.mla_sparse_prefill(*args[:4], 81, *args[5:])


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "options"])
@pytest.mark.parametrize("H", [1, 3, 9, 16, 63, 64, 126, 128])
@pytest.mark.parametrize("S", [1, 62, 213])
def test_flashmla_grid(S, H, options, generator):
    for Skv, topk in ((128, 128), (592, 128), (1521, 512), (114, 384), (32, 2048), (4321, 2048)):
        args = ops.inputs("mla_sparse_prefill", generator, S=S, Skv=Skv, H=H, topk=topk, **options)
        with deepkern.backend("triton"):
            check(args)


@pytest.mark.gpu
def test_more_than_65535_queries(generator):
    args = ops.inputs("mla_sparse_prefill", generator, S=70000, Skv=256, H=16, topk=8, **SMALL)
    with deepkern.backend("triton"):
        got = deepkern.mla_sparse_prefill(*args)
        last = slice(69990, 70000)
        alone = deepkern.mla_sparse_prefill(args[0][last], args[1], args[2][last], *args[3:])
    for g, a in zip(got, alone, strict=True):
        compare.assert_bitwise(g[last], a)


@pytest.mark.gpu
@pytest.mark.parametrize("H", [16, 128])
def test_gradients_at_v3_sizes(H, generator):
    size = {"S": 40, "Skv": 4096, "H": H, "topk": 2048, "grad_lse": True}
    args = ops.inputs("mla_sparse_prefill_backward", generator, **size, **OPTIONS)
    with deepkern.backend("triton"):
        got = deepkern.mla_sparse_prefill_backward(*args)
        again = deepkern.mla_sparse_prefill_backward(*args)
    want = deepkern.reference.mla_sparse_prefill_backward(*args)
    for g, a, w in zip(got, again, want, strict=True):
        compare.assert_close(g, w, dtype=torch.bfloat16)
        compare.assert_bitwise(g, a)


@pytest.mark.gpu
def test_peak_memory_on_a_gpu(generator):
    args = ops.inputs("mla_sparse_prefill_backward", generator, S=512, Skv=8192, H=128, topk=2048)
    q, kv = args[2:4]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with deepkern.backend("triton"):
        deepkern.mla_sparse_prefill_backward(*args)
    torch.cuda.synchronize()
    most = torch.cuda.max_memory_allocated() - before
    assert most <= sparse_gradients.WORKSPACE + 6 * kv.numel() + 2 * q.numel() + (32 << 20)
