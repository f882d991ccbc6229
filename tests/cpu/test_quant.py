"""The native casts against the reference: shapes, strides, dtypes, instruction sets, threads."""

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

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
REAL = [BF16, F16, F32]
pytestmark = pytest.mark.skipif(
    native.native_op("cast_per_block") is None, reason=str(native.missing_reason())
)
SIZES = st.integers(0, 40) | st.sampled_from([1, 7, 127, 128, 129, 256, 300])
FORMATS = st.sampled_from(["fp32", "ue8m0"])
LAYOUTS = st.sampled_from(["row", "column"])
dtypes = st.sampled_from(REAL)
seeds = st.integers(0, 2**31)


def check(name: str, args: tuple) -> None:
    """The native op on every instruction set equals the reference."""
    want = getattr(deepkern.reference, name)(*args)
    for isa in cpu_isas():
        with pytest.MonkeyPatch.context() as patch, compare.poison():
            patch.setenv("DEEPKERN_CPU_ISA", isa)
            compare.assert_matches(name, native.native_op(name)(*args), want)


def embed(x: torch.Tensor) -> torch.Tensor:
    """A copy of x within a larger tensor of NaN, so that its rows are strided and not aligned."""
    larger = torch.full((*x.shape[:-1], x.shape[-1] + 7), torch.nan).to(x.dtype)
    return larger[..., 3 : 3 + x.shape[-1]].copy_(x)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_special_values(x: torch.Tensor, seed: int) -> torch.Tensor:
    """Some elements replaced by NaN, infinities, zeros and values at the ends of the range."""
    if x.numel():
        at = torch.randint(x.numel(), (3,), generator=generator(seed))
        special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 3e38, 1e-40])
        choice = torch.randint(len(special), (3,), generator=generator(seed + 1))
        x.view(-1)[at] = special[choice].to(x.dtype)
    return x


@settings(max_examples=25, deadline=None)
@given(SIZES, SIZES, st.sampled_from([None, 0, 2]), dtypes, FORMATS, st.booleans(), seeds)
def test_cast_per_block(N, K, G, dtype, scale_format, special, seed):
    shape = (N, K) if G is None else (G, N, K)
    x = values(generator(seed), *shape, dtype=dtype)
    check("cast_per_block", (embed(with_special_values(x, seed) if special else x), scale_format))


@settings(max_examples=30, deadline=None)
@given(
    SIZES, SIZES, dtypes, FORMATS, st.booleans(), LAYOUTS,
    st.none() | st.lists(st.integers(-50, 400) | st.sampled_from([-(2**31), 2**31 - 1]),
                         min_size=1, max_size=5),
    seeds,
)  # fmt: skip
def test_cast_per_channel(M, K, dtype, scale_format, transpose, layout, offsets, seed):
    """Hostile group offsets: out of range and descending."""
    x = with_special_values(values(generator(seed), M, K, dtype=dtype), seed)
    offsets = None if offsets is None else torch.tensor(offsets, dtype=torch.int32)
    check("cast_per_channel", (embed(x), scale_format, offsets, transpose, layout))


@settings(max_examples=25, deadline=None)
@given(
    SIZES, SIZES, st.sampled_from([(), (2,), (2, 3), (0,)]),
    st.integers(1, 200), st.sampled_from([1, 3, 16, 128, 200, 2**62]), dtypes, seeds,
)  # fmt: skip
def test_cast_back(N, K, lead, rows, cols, out_dtype, seed):
    codes = torch.randint(256, (*lead, N, K), generator=generator(seed)).to(torch.uint8)
    scale = torch.rand(*lead, -(-K // cols), -(-N // rows), generator=generator(seed)).mT
    q = embed(codes.view(torch.float8_e4m3fn))
    check("cast_back", (q, scale, [rows, cols], out_dtype))


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([(), (3,), (2, 3), (0,)]), st.integers(0, 11), dtypes, FORMATS, seeds)
def test_hadamard(lead, log_n, dtype, scale_format, seed):
    x = embed(values(generator(seed), *lead, 1 << log_n, dtype=dtype))
    check("hadamard_transform", (x, 0.3))
    check("hadamard_cast", (x, 0.3, scale_format))


@pytest.mark.parametrize("N", [0, 4096, 32768])
def test_hadamard_transform_of_long_rows(N):
    check("hadamard_transform", (values(generator(N), 2, N), N**-0.5 if N else 1.0))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 9), SIZES | st.sampled_from([8192, 8200, 9000]), dtypes, dtypes, st.booleans(),
    FORMATS, LAYOUTS, st.booleans(), seeds,
)  # fmt: skip
def test_rmsnorm_cast(M, K, dtype, weight_dtype, residual, scale_format, layout, special, seed):
    x, weight, eps, added, *rest = ops.inputs(
        "rmsnorm_cast", generator(seed), M=M, K=K, dtype=dtype, weight_dtype=weight_dtype,
        residual=residual, scale_format=scale_format, scale_layout=layout,
    )  # fmt: skip
    x = embed(with_special_values(x, seed) if special else x)
    check("rmsnorm_cast", (x, weight, eps, None if added is None else embed(added), *rest))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 9), SIZES, dtypes, st.booleans(), seeds)
def test_swiglu(M, I, dtype, special, seed):
    x = values(generator(seed), M, 2 * I, dtype=dtype)
    check("swiglu", (embed(with_special_values(x, seed) if special else x),))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 9), SIZES, dtypes, st.booleans(), st.sampled_from([None, 0.0, 1.5, torch.inf]),
    FORMATS, LAYOUTS, st.booleans(), seeds,
)  # fmt: skip
def test_swiglu_cast(M, I, dtype, weighted, limit, scale_format, layout, special, seed):
    gate_up, *rest = ops.inputs(
        "swiglu_cast", generator(seed), M=M, I=I, dtype=dtype, weighted=weighted, limit=limit,
        scale_format=scale_format, scale_layout=layout,
    )  # fmt: skip
    gate_up = embed(with_special_values(gate_up, seed) if special else gate_up)
    if special and weighted and M:
        rest[0][0] = torch.inf
    check("swiglu_cast", (gate_up, *rest))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 9), SIZES, dtypes, st.booleans(), st.booleans(),
    st.sampled_from([None, 0.0, 1.5]), seeds,
)  # fmt: skip
def test_swiglu_cast_backward(M, I, dtype, fp8, weighted, limit, seed):
    grad, gate_up, scale, weights, limit = ops.inputs(
        "swiglu_cast_backward", generator(seed), M=M, I=I, dtype=dtype, fp8=fp8,
        weighted=weighted, limit=limit,
    )  # fmt: skip
    scale = None if scale is None else scale.mT.contiguous().mT
    check("swiglu_cast_backward", (embed(grad), embed(gate_up), scale, weights, limit))


# Sizes with several rows, enough of them for two threads.
LARGE = {
    "rmsnorm_cast": {"M": 70, "K": 1100, "residual": True},
    "swiglu": {"M": 70, "I": 1100},
    "swiglu_cast": {"M": 70, "I": 1100, "weighted": True},
    "swiglu_cast_backward": {"M": 70, "I": 1100, "weighted": True},
    "cast_per_block": {"N": 300, "K": 1100},
    "cast_per_channel": {"M": 700, "K": 300, "G": 3, "transpose": True},
    "cast_back": {"N": 70, "K": 1100},
    "hadamard_transform": {"M": 300, "N": 256},
    "hadamard_cast": {"M": 300, "N": 256},
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


@pytest.mark.parametrize(
    "name", ["rmsnorm_cast", "swiglu", "swiglu_cast", "swiglu_cast_backward", "hadamard_cast"]
)
def test_bits_independent_of_other_rows(name, isa):
    args = ops.inputs(name, generator(2), **LARGE[name])
    M = args[0].shape[0]
    whole = compare.as_tuple(native.native_op(name)(*args))
    for first, last in ((0, 1), (17, 20), (69, 70)):
        rows = [
            a[first:last] if isinstance(a, torch.Tensor) and a.shape[0] == M else a for a in args
        ]
        part = compare.as_tuple(native.native_op(name)(*rows))
        for got, want in zip(part, whole, strict=True):
            compare.assert_bitwise(got, want[first:last])


def bad_calls() -> dict[str, tuple]:
    """By message: (op, arguments), each of which the Python contract rejects, too."""
    x = torch.ones(4, 256)
    q, scale = deepkern.reference.cast_per_token(x)
    return {
        "cast_per_block: x: expected rank": ("cast_per_block", (x[0],)),
        "cast_per_block: x: expected stride": ("cast_per_block", (x[:, ::2],)),
        "cast_per_block: scale_format": ("cast_per_block", (x, "fp16")),
        "cast_per_channel: group_offsets: expected dtype": (
            "cast_per_channel", (x, "fp32", torch.zeros(2).long())),
        "cast_per_channel: group_offsets: expected at least": (
            "cast_per_channel", (x, "fp32", torch.zeros(0).int())),
        "cast_back: block": ("cast_back", (q, scale, [1], F32)),
        "cast_back: scale: expected one per block": ("cast_back", (q, scale[:3], [1, 128], F32)),
        "cast_back: scale: expected the rank": ("cast_back", (q, scale[0], [1, 128], F32)),
        "cast_back: out_dtype": ("cast_back", (q, scale, [1, 128], torch.float64)),
        "hadamard_transform: x: expected a power": ("hadamard_transform", (x[:, :3],)),
        "hadamard_cast: x: expected a power": ("hadamard_cast", (torch.ones(1, 4096),)),
        "rmsnorm_cast: weight": ("rmsnorm_cast", (x, torch.ones(255))),
        "rmsnorm_cast: residual: expected dtype": (
            "rmsnorm_cast", (x, x[0], 1e-6, x.bfloat16())),
        "rmsnorm_cast: scale_layout": ("rmsnorm_cast", (x, x[0], 1e-6, None, "fp32", "rows")),
        "swiglu: gate_up: expected an even": ("swiglu", (x[:, :255],)),
        "swiglu_cast: gate_up: expected an even": ("swiglu_cast", (x[:, :255],)),
        "swiglu_cast: limit": ("swiglu_cast", (x, None, -1.0)),
        "swiglu_cast: weights": ("swiglu_cast", (x, torch.ones(3))),
        "swiglu_cast_backward: gate_up_scale: expected a scale": (
            "swiglu_cast_backward", (x[:, :128], q)),
        "swiglu_cast_backward: gate_up_scale: expected None": (
            "swiglu_cast_backward", (x[:, :128], x, scale)),
        "swiglu_cast_backward: gate_up: expected size": ("swiglu_cast_backward", (x, x)),
    }  # fmt: skip


def test_bad_arguments_raise():
    for message, (name, args) in bad_calls().items():
        with pytest.raises(RuntimeError, match=message):
            native.native_op(name)(*args)
        with pytest.raises((TypeError, ValueError)), deepkern.backend("torch"):
            getattr(deepkern, name)(*args)
