"""Native CPU ops over the attention caches: any shapes, strides and indices, threads, batches."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import deepkern
from deepkern.runtime import native
from deepkern.testing import caches, compare, ops
from deepkern.testing.isas import cpu_isas

BF16, F16, F32, U8 = torch.bfloat16, torch.float16, torch.float32, torch.uint8
REAL = [BF16, F16, F32]
FAR = 2**31 - 1
pytestmark = pytest.mark.skipif(
    native.native_op("mla_decode") is None, reason=str(native.missing_reason())
)


@pytest.fixture
def generator(seed) -> torch.Generator:
    """A CPU generator, also where the other tests run on a GPU."""
    return torch.Generator().manual_seed(seed)


def with_own_cache(name: str, args: tuple) -> tuple:
    """The arguments, with a copy of the cache if the op writes it."""
    if not name.endswith("_append"):
        return args
    return tuple(
        a.clone() if n == "cache" else a
        for n, a in zip(deepkern.OPS[name].names, args, strict=False)
    )


def run(name: str, args: tuple):
    """The native op's results, or its arguments with the cache that it wrote."""
    args = with_own_cache(name, args)
    got = native.native_op(name)(*deepkern.OPS[name].positional(args))
    return args if got is None else got


def check(name: str, args: tuple) -> None:
    """Compares the native op with the oracle."""
    expected = with_own_cache(name, args)
    want = getattr(deepkern.reference, name)(*expected)
    compare.assert_matches(name, run(name, args), expected if want is None else want)


@contextlib.contextmanager
def any_isa(data):
    """One of this CPU's instruction sets, drawn by hypothesis."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPKERN_CPU_ISA", data.draw(st.sampled_from(cpu_isas()), label="isa"))
        yield


def strided(x: torch.Tensor) -> torch.Tensor:
    """A copy of x within a larger tensor, with gaps between the rows of every dimension."""
    larger = x.new_zeros(*(n + 3 for n in x.shape))
    return larger[tuple(slice(1, n + 1) for n in x.shape)].copy_(x)


# Indices, lengths and offsets: plausible ones and ones far outside of every tensor.
numbers = st.one_of(
    st.integers(-3, 40), st.sampled_from([FAR, -FAR - 1, caches.ABSENT, FAR - 5, 2**30])
)
widths = {"R": st.sampled_from([0, 1, 16, 100, 128, 130, 300]), "D": st.sampled_from([0, 1, 6, 16])}
seeds = st.integers(0, 2**31)
pages = st.sampled_from([1, 2, 7, 64])


def integers(data, *shape: int) -> torch.Tensor:
    """An int32 tensor of `numbers`."""
    count = torch.Size(shape).numel()
    values = data.draw(st.lists(numbers, min_size=count, max_size=count))
    return torch.tensor(values, dtype=torch.int32).view(shape)


@settings(max_examples=30, deadline=None)
@given(
    T=st.integers(0, 20),
    **widths,
    page=pages,
    dtype=st.sampled_from(REAL),
    cache_dtype=st.sampled_from([*REAL, U8]),
    norm=st.booleans(),
    rope=st.booleans(),
    data=st.data(),
    seed=seeds,
)
def test_mla_cache_append(T, R, D, page, dtype, cache_dtype, norm, rope, data, seed):
    generator = torch.Generator().manual_seed(seed)
    args = ops.inputs(
        "mla_cache_append", generator, T, R=R, D=D, page=page, dtype=dtype,
        cache_dtype=cache_dtype, norm=norm, rope=rope and D % 2 == 0,
    )  # fmt: skip
    latent, k_rope, cache, slots, weight, positions, table = args
    hostile = torch.rand(T, generator=generator) < 0.2
    slots = torch.where(hostile, data.draw(st.sampled_from([-1, -(2**63), 2**63 - 1, FAR])), slots)
    with any_isa(data):
        rows = strided(latent), strided(k_rope)
        check("mla_cache_append", (*rows, cache, slots, weight, positions, table))


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 47, 97, 130, 200]), min_size=0, max_size=3),
    Sq=st.integers(0, 3),
    H=st.sampled_from([0, 1, 2, 3, 5, 9, 17, 40]),
    **widths,
    page=pages,
    dtype=st.sampled_from(REAL),
    cache_dtype=st.sampled_from([*REAL, U8]),
    causal=st.booleans(),
    data=st.data(),
    seed=seeds,
)
def test_mla_decode(lengths, Sq, H, R, D, page, dtype, cache_dtype, causal, data, seed):
    assume(R + D > 0)  # the scale of `inputs` is (R + D) ** -0.5
    generator = torch.Generator().manual_seed(seed)
    q, *rest = ops.inputs(
        "mla_decode", generator, lengths, Sq=Sq, H=H, R=R, D=D, page=page, dtype=dtype,
        cache_dtype=cache_dtype, causal=causal,
    )  # fmt: skip
    with any_isa(data):
        check("mla_decode", (strided(q), *rest))


@settings(max_examples=25, deadline=None)
@given(fp8=st.booleans(), causal=st.booleans(), H=st.sampled_from([2, 6]), data=st.data())
def test_mla_decode_with_any_table_and_lengths(fp8, causal, H, data):
    generator = torch.Generator().manual_seed(0)
    kind = caches.FP8 if fp8 else caches.FP32
    q, cache, _, _, scale, _, R = ops.inputs(
        "mla_decode", generator, (21, 20), Sq=2, H=H, R=32, D=16, page=7, **kind
    )
    cache = cache.nan_to_num() if not fp8 else cache.masked_fill(cache == 0xFF, 0)
    table, lengths = integers(data, 2, 3), integers(data, 2)
    with any_isa(data):
        check("mla_decode", (q, cache, table, lengths, scale, causal, R))


@settings(max_examples=30, deadline=None)
@given(
    B=st.integers(0, 2),
    Sq=st.integers(0, 2),
    H=st.sampled_from([1, 3, 7, 20]),
    topk=st.sampled_from([0, 1, 30, 200]),
    **widths,
    dtype=st.sampled_from(REAL),
    cache_dtype=st.sampled_from([*REAL, U8]),
    sink=st.booleans(),
    data=st.data(),
    seed=seeds,
)
def test_mla_sparse_decode(B, Sq, H, topk, R, D, dtype, cache_dtype, sink, data, seed):
    assume(R + D > 0)  # the scale of `inputs` is (R + D) ** -0.5
    generator = torch.Generator().manual_seed(seed)
    q, cache, indices, scale, _, attn_sink, _ = ops.inputs(
        "mla_sparse_decode", generator, B=B, Sq=Sq, H=H, topk=topk, tokens=90, R=R, D=D, page=16,
        dtype=dtype, cache_dtype=cache_dtype, sink=sink,
    )  # fmt: skip
    if topk:
        indices[..., :1] = integers(data, B, Sq, 1).masked_fill_(torch.rand(B, Sq, 1) < 0.5, -1)
        indices[(indices >= 0) & (indices < cache.shape[0] * 16) & (indices > 89)] = -1
    cache = cache.nan_to_num() if cache_dtype != U8 else cache.masked_fill(cache == 0xFF, 0)
    lengths = integers(data, B) if data.draw(st.booleans()) else None
    with any_isa(data):
        check("mla_sparse_decode",
              (strided(q), cache, strided(indices), scale, lengths, attn_sink, R))  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(
    B=st.integers(0, 3),
    **widths,
    cache_dtype=st.sampled_from([*REAL, U8]),
    out_dtype=st.sampled_from(REAL),
    starts=st.booleans(),
    data=st.data(),
    seed=seeds,
)
def test_mla_cache_gather(B, R, D, cache_dtype, out_dtype, starts, data, seed):
    generator = torch.Generator().manual_seed(seed)
    cache = caches.empty_cache(generator, 4, 3, R, D, cache_dtype)
    cache.copy_(torch.randint(0, 256, cache.shape, generator=generator).to(cache_dtype))
    table, offsets = integers(data, B, 4), integers(data, B + 1)
    begin = integers(data, B) if starts else None
    with any_isa(data):
        check("mla_cache_gather", (cache, table, offsets, 31, R, begin, out_dtype))


@settings(max_examples=30, deadline=None)
@given(
    lead=st.sampled_from([(), (2,), (2, 1), (1, 2, 2), (0,)]),
    S=st.integers(0, 4),
    H=st.integers(0, 4),
    D=st.sampled_from([0, 1, 20, 64, 130]),
    dtypes=st.tuples(st.sampled_from(REAL), st.sampled_from(REAL), st.sampled_from(REAL)),
    data=st.data(),
    seed=seeds,
)
def test_merge_states(lead, S, H, D, dtypes, data, seed):
    generator = torch.Generator().manual_seed(seed)
    out_a, lse_a, out_b, lse_b = ops.inputs("merge_states", generator, lead, S, H, D)
    states = (strided(out_a.to(dtypes[0])), strided(lse_a), out_b.to(dtypes[1]), lse_b)
    grads = torch.randn(out_a.shape).to(dtypes[2]), torch.randn(lse_a.shape)
    with any_isa(data):
        check("merge_states", states)
        check("merge_states_backward", (*grads, *states))


@settings(max_examples=30, deadline=None)
@given(
    S=st.integers(0, 11),
    Skv=st.integers(0, 120),
    H=st.sampled_from([0, 1, 5, 17, 64]),
    D=st.sampled_from([0, 1, 32, 128, 200]),
    data=st.data(),
    seed=seeds,
)
def test_mqa_logits(S, Skv, H, D, data, seed):
    generator = torch.Generator().manual_seed(seed)
    q, kv, *rest = ops.inputs("mqa_logits", generator, S, Skv, H=H, D=D, causal=False)[:-2]
    starts, ends = integers(data, S), integers(data, S)
    with any_isa(data):
        check("mqa_logits", (strided(q), strided(kv), *rest, starts, ends))


@settings(max_examples=30, deadline=None)
@given(
    B=st.integers(0, 2),
    next_n=st.integers(0, 3),
    H=st.sampled_from([0, 1, 5, 17, 64]),
    D=st.sampled_from([0, 1, 32, 130]),
    each=st.booleans(),
    data=st.data(),
    seed=seeds,
)
def test_paged_mqa_logits(B, next_n, H, D, each, data, seed):
    generator = torch.Generator().manual_seed(seed)
    q, cache, weights, *_ = ops.inputs(
        "paged_mqa_logits", generator, [20] * B, next_n=next_n, H=H, D=D, page=7
    )
    cache.masked_fill_(cache == 0xFF, 0)
    context = integers(data, B, next_n) if each else integers(data, B)
    table = integers(data, B, 4)
    with any_isa(data):
        check("paged_mqa_logits", (strided(q), cache, weights, context, table, 50))


@settings(max_examples=30, deadline=None)
@given(
    T=st.integers(0, 20),
    D=st.sampled_from([0, 1, 7, 128, 130]),
    page=pages,
    dtype=st.sampled_from(REAL),
    scale_format=st.sampled_from(["fp32", "ue8m0"]),
    data=st.data(),
    seed=seeds,
)
def test_indexer_cache_append(T, D, page, dtype, scale_format, data, seed):
    generator = torch.Generator().manual_seed(seed)
    k, cache, slots = ops.inputs("indexer_cache_append", generator, T, D=D, page=page, dtype=dtype)
    hostile = torch.rand(T, generator=generator) < 0.2
    slots = torch.where(hostile, data.draw(st.sampled_from([-1, -(2**63), 2**63 - 1, FAR])), slots)
    # A clone would lose the gaps between pages.
    wanted = torch.empty_strided(cache.shape, cache.stride(), dtype=U8).copy_(cache)
    with any_isa(data):
        native.native_op("indexer_cache_append")(strided(k), cache, slots, scale_format)
    deepkern.reference.indexer_cache_append(k, wanted, slots, scale_format)
    compare.assert_bitwise(cache, wanted)


# (op, size), with enough work for several tasks.
LARGE = {
    "decode, 1 head": ("mla_decode", {"lengths": (700, 90, 300), "H": 1}),
    "decode, 20 heads, fp8": ("mla_decode", {"lengths": (500, 3, 90), "H": 20, "cache_dtype": U8}),
    "decode, 2 queries of 40": ("mla_decode", {"lengths": (300, 400), "Sq": 2, "H": 40, "R": 64}),
    "sparse decode": ("mla_sparse_decode", {"B": 3, "Sq": 2, "H": 9, "topk": 300, "sink": True}),
    "merge": ("merge_states", {"lead": (3,), "S": 40, "H": 16, "D": 128}),
    "logits": ("mqa_logits", {"S": 30, "Skv": 900}),
    "paged logits": ("paged_mqa_logits", {"lengths": (900, 3, 500), "next_n": 2}),
    "gather": ("mla_cache_gather", {"lengths": (300, 90), "cache_dtype": U8}),
    "append": ("mla_cache_append", {"T": 300, "cache_dtype": U8}),
}


@pytest.mark.parametrize(("name", "size"), LARGE.values(), ids=LARGE)
def test_bits_independent_of_threads(isa, generator, name, size):
    args = ops.inputs(name, generator, **size)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(compare.as_tuple(run(name, args)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            if isinstance(got, torch.Tensor):
                compare.assert_bitwise(got, want)


@pytest.mark.parametrize("H", [1, 3, 16, 70])
def test_decode_bits_independent_of_batch(isa, generator, H):
    lengths = (500, 0, 97, 3)
    q, cache, table, seqlens, *rest = ops.inputs("mla_decode", generator, lengths, H=H, R=64)
    out, lse = run("mla_decode", (q, cache, table, seqlens, *rest))
    for b in range(len(lengths)):
        one = slice(b, b + 1)
        got = run("mla_decode", (q[one], cache, table[one], seqlens[one], *rest))
        compare.assert_bitwise(got[0], out[one])
        compare.assert_bitwise(got[1], lse[one])


@pytest.mark.parametrize("rows", [slice(0, 1), slice(3, 9), slice(29, 30)])
def test_logits_bits_independent_of_queries(isa, generator, rows):
    q, kv, scale, weights, starts, ends = ops.inputs("mqa_logits", generator, 30, 200)
    full = run("mqa_logits", (q, kv, scale, weights, starts, ends))
    part = run("mqa_logits", (q[rows], kv, scale, weights[rows], starts[rows], ends[rows]))
    compare.assert_bitwise(part, full[rows])


def test_every_code_of_the_fp8_cache(isa):
    """Every e4m3 code times scales up to the largest float32, also where the product overflows."""
    scales = torch.tensor([1.0, 2.0**-149, 2.0**118, 2.0**119, 3e38, torch.inf, torch.nan])
    entry = torch.cat((torch.arange(256).to(U8), torch.zeros(8, dtype=U8)))
    cache = entry.repeat(len(scales), 1)
    cache[:, 256:] = scales[:, None].repeat(1, 2).view(U8)
    table = torch.arange(len(scales), dtype=torch.int32)[None]
    offsets = torch.tensor([0, len(scales)], dtype=torch.int32)
    args = cache[:, None, None], table, offsets, len(scales), 256, None, F32
    check("mla_cache_gather", args)


def test_scratch_memory_is_not_shared_between_calls(isa, generator):
    """A large call with NaN tokens, then a small one, in the same thread's scratch memory."""
    args = ops.inputs("mla_decode", generator, (200,), H=20)
    q, cache, *rest = args
    native.native_op("mla_decode")(q, torch.full_like(cache, torch.nan), *rest)
    for H in (1, 3, 5, 20):
        check("mla_decode", ops.inputs("mla_decode", generator, (20,), H=H, R=100, D=6))
