"""The native CPU prefill ops on each instruction set: any shape, hostile contents, threads."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deepkern
from deepkern.runtime import native
from deepkern.testing import compare, ops
from deepkern.testing.isas import cpu_isas

REAL = [torch.bfloat16, torch.float16, torch.float32]
FAR = 2**31 - 1
OPS = ("mla_prefill", "mla_prefill_backward", "mla_sparse_prefill", "mla_sparse_prefill_backward")
pytestmark = pytest.mark.skipif(
    native.native_op("mla_prefill") is None, reason=str(native.missing_reason())
)
LENGTHS = st.lists(st.sampled_from([0, 1, 2, 17, 95, 96, 97, 130]), min_size=3, max_size=3)
TOLERANCE = {
    torch.bfloat16: {"rtol": 0.02, "atol": 0.02},
    torch.float16: {"rtol": 0.003, "atol": 0.003},
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
}


@pytest.fixture
def generator(seed) -> torch.Generator:
    """A CPU generator, also where the other tests run on a GPU."""
    return torch.Generator().manual_seed(seed)


@contextlib.contextmanager
def num_threads(n: int):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check(op_name: str, args: tuple) -> tuple:
    """Compares with the reference by absolute error: a gradient of one key is only rounding."""
    got = native.native_op(op_name)(*args)
    want = getattr(deepkern.reference, op_name)(*args)
    for g, w in zip(got, want, strict=True):
        if w is None:
            assert g.numel() == 0
            continue
        assert g.dtype == w.dtype and g.is_contiguous()
        torch.testing.assert_close(g, w, equal_nan=True, **TOLERANCE[g.dtype])
    return got


def strided(x: torch.Tensor, padding: int) -> torch.Tensor:
    """The same values, dimensions 0 and 1 swapped in memory, `padding` NaN after each row."""
    wide = x.new_full((x.shape[1], x.shape[0], x.shape[2] + padding), torch.nan)
    wide[..., : x.shape[2]] = x.transpose(0, 1)
    return wide.transpose(0, 1)[..., : x.shape[2]]


@settings(max_examples=25, deadline=None)
@given(
    lengths=LENGTHS,
    lengths_k=LENGTHS,
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2), (2, 2)]),
    Dqk=st.integers(1, 70),
    Dv=st.integers(0, 70),
    dtype=st.sampled_from(REAL),
    causal=st.booleans(),
    padding=st.integers(0, 3),
    hostile=st.sampled_from([None, -1, FAR, -FAR - 1, 100]),
    at=st.integers(0, 3),
    backward=st.booleans(),
    data=st.data(),
    seed=st.integers(0, 2**31),
)
def test_any_sequences(
    lengths, lengths_k, heads, Dqk, Dv, dtype, causal, padding, hostile, at, backward, data, seed
):
    generator = torch.Generator().manual_seed(seed)
    q, k, v, cu_q, cu_k, *rest = ops.inputs(
        "mla_prefill", generator, lengths, lengths_k,
        H=heads[0], Hk=heads[1], Dqk=Dqk, Dv=Dv, dtype=dtype, causal=causal,
    )  # fmt: skip
    if hostile is not None:
        (cu_q if data.draw(st.booleans()) else cu_k)[at] = hostile
    args = *(strided(x, padding) for x in (q, k, v)), cu_q, cu_k, *rest
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPKERN_CPU_ISA", data.draw(st.sampled_from(cpu_isas())))
        out, lse = check("mla_prefill", args)
        if backward:
            grad_out = strided(torch.randn(out.shape, generator=generator).to(dtype), padding)
            grad_lse = torch.randn(lse.shape, generator=generator)
            check("mla_prefill_backward", (grad_out, *args[:3], out, lse, *args[3:], grad_lse))


@settings(max_examples=25, deadline=None)
@given(
    S=st.integers(0, 4),
    Skv=st.integers(0, 40),
    H=st.sampled_from([0, 1, 5, 16, 33, 130]),
    topk=st.sampled_from([0, 1, 7, 96, 97, 200]),
    R=st.integers(0, 40),
    D=st.integers(0, 20),
    dtype=st.sampled_from(REAL),
    options=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    padding=st.integers(0, 3),
    data=st.data(),
    seed=st.integers(0, 2**31),
)
def test_any_indices(S, Skv, H, topk, R, D, dtype, options, padding, data, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths, sink, with_lse = options
    q, kv, indices, scale, R, attn_sink, topk_length = ops.inputs(
        "mla_sparse_prefill", generator, S=S, Skv=Skv, H=H, topk=topk, R=R, D=max(D, 1 - R),
        dtype=dtype, lengths=lengths, sink=sink,
    )  # fmt: skip
    wild = torch.randint(-FAR - 1, FAR, indices.shape, generator=generator).int()
    indices = torch.where(torch.rand(indices.shape, generator=generator) < 0.1, wild, indices)
    if lengths and S:
        topk_length[0] = data.draw(st.sampled_from([-1, FAR, -FAR - 1, 1]))
    args = strided(q, padding), strided(kv, padding), indices, scale, R, attn_sink, topk_length
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPKERN_CPU_ISA", data.draw(st.sampled_from(cpu_isas())))
        out, _, lse = check("mla_sparse_prefill", args)
        grad_out = strided(torch.randn(out.shape, generator=generator).to(dtype), padding)
        grad_lse = torch.randn(lse.shape, generator=generator) if with_lse else None
        check(
            "mla_sparse_prefill_backward",
            (grad_out, grad_lse, *args[:3], out, lse, scale, attn_sink, topk_length),
        )


# Sizes with several tasks: (kwargs of `inputs`).
THREADED = {
    "mla_prefill": {"lengths": (200, 30), "H": 4, "Hk": 2, "Dqk": 40, "Dv": 24},
    "mla_prefill_backward": {"lengths": (300,), "H": 2, "Hk": 1, "Dqk": 40, "Dv": 24},
    "mla_sparse_prefill": {"S": 3, "H": 40, "topk": 100, "R": 64, "D": 16},
    "mla_sparse_prefill_backward": {"S": 5, "H": 40, "topk": 100, "R": 64, "D": 16, "sink": True},
}


@pytest.mark.parametrize("op_name", OPS)
def test_bits_independent_of_threads(op_name, isa, generator):
    """With one thread, mla_prefill_backward has tasks of whole sequences, with more of tiles."""
    args = ops.inputs(op_name, generator, **THREADED[op_name])
    op = native.native_op(op_name)
    with num_threads(1):
        want = op(*args)
    for n in (2, 7):
        with num_threads(n):
            got = op(*args)
        for g, w in zip(got, want, strict=True):
            compare.assert_bitwise(g, w)


def test_prefill_bits_independent_of_batch(isa, generator):
    args = ops.inputs("mla_prefill_backward", generator, (120, 70, 5), H=2, Dqk=40, Dv=24)
    grad_out, q, k, v, out, lse, cu, _, *rest = args
    whole = native.native_op("mla_prefill_backward")(*args)
    for b in range(3):
        rows = slice(int(cu[b]), int(cu[b + 1]))
        own = torch.tensor([0, rows.stop - rows.start], dtype=torch.int32)
        one = [x[rows] for x in (grad_out, q, k, v, out)]
        got = native.native_op("mla_prefill")(*one[1:4], own, own, *rest[:2])
        for g, w in zip(got, (out[rows], lse[:, rows]), strict=True):
            torch.testing.assert_close(g, w, rtol=0.02, atol=0.02)
        got = native.native_op("mla_prefill_backward")(*one, lse[:, rows], own, own, *rest)
        for g, w in zip(got, whole, strict=True):
            compare.assert_bitwise(g, w[rows])


def test_sparse_bits_independent_of_other_queries(isa, generator):
    args = ops.inputs("mla_sparse_prefill", generator, S=4, H=20, topk=100, R=64, D=16)
    q, kv, indices, *rest = args
    want = native.native_op("mla_sparse_prefill")(*args)
    for s in range(4):
        got = native.native_op("mla_sparse_prefill")(q[s : s + 1], kv, indices[s : s + 1], *rest)
        for g, w in zip(got, want, strict=True):
            compare.assert_bitwise(g[0], w[s])


def bad_prefill(generator) -> dict[str, tuple]:
    q, k, v, cu_q, cu_k, scale, _ = ops.inputs("mla_prefill", generator, (4, 5), H=4, Dqk=8, Dv=6)
    return {
        "q: expected dtype": (q.double(), k, v, cu_q, cu_k, scale),
        "q: expected rank 3": (q[0], k, v, cu_q, cu_k, scale),
        "q: expected stride 1": (q.mT.contiguous().mT, k, v, cu_q, cu_k, scale),
        "k: expected dtype": (q, k.half(), v, cu_q, cu_k, scale),
        "k: expected size 8": (q, k[..., :7], v, cu_q, cu_k, scale),
        "k: expected a number of heads": (q, k[:, :3], v[:, :3], cu_q, cu_k, scale),
        "v: expected size 9": (q, k, v[:8], cu_q, cu_k, scale),
        "v: expected size 4": (q, k, v[:, :3], cu_q, cu_k, scale),
        "cu_seqlens_q: expected dtype": (q, k, v, cu_q.long(), cu_k, scale),
        "cu_seqlens_k: expected size 3": (q, k, v, cu_q, cu_k[:2], scale),
        "cu_seqlens_q: expected at least": (q, k, v, cu_q[:0], cu_k[:0], scale),
        "softmax_scale: expected": (q, k, v, cu_q, cu_k, -1.0),
    }


def bad_sparse_prefill(generator) -> dict[str, tuple]:
    q, kv, indices, scale, R, _, _ = ops.inputs("mla_sparse_prefill", generator, S=3, H=2, R=8, D=4)
    lengths = torch.ones(3, dtype=torch.int32)
    return {
        "kv: expected dtype": (q, kv.float(), indices, scale, R),
        "kv: expected size 1": (q, kv.expand(-1, 2, -1), indices, scale, R),
        "indices: expected dtype": (q, kv, indices.long(), scale, R),
        "indices: expected size 3": (q, kv, indices[:2], scale, R),
        "v_head_dim: expected": (q, kv, indices, scale, 13),
        "attn_sink: expected dtype": (q, kv, indices, scale, R, torch.ones(2).double()),
        "attn_sink: expected size 2": (q, kv, indices, scale, R, torch.ones(3)),
        "topk_length: expected dtype": (q, kv, indices, scale, R, None, lengths.long()),
        "topk_length: expected size 3": (q, kv, indices, scale, R, None, lengths[:2]),
    }


@pytest.mark.parametrize(
    ("op_name", "bad"),
    [("mla_prefill", bad_prefill), ("mla_sparse_prefill", bad_sparse_prefill)],
    ids=["mla_prefill", "mla_sparse_prefill"],
)
def test_bad_arguments_raise(op_name, bad, generator):
    for message, args in bad(generator).items():
        with pytest.raises(RuntimeError, match=f"{op_name}: {message}"):
            native.native_op(op_name)(*args)
