"""The native GEMMs and MoE layer on each instruction set: shapes, strides, bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deepkern
from deepkern.runtime import native
from deepkern.testing import compare, ops
from deepkern.testing.isas import cpu_isas

OPS = (
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_masked",
    "k_grouped_fp8_gemm_nt",
    "moe_forward",
    "moe_forward_backward",
    "gemm_nt",
    "m_grouped_gemm_nt_contiguous",
)
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
HOSTILE = (-1, -(2**31), 2**31 - 1, 10**6)
pytestmark = pytest.mark.skipif(
    native.native_op("fp8_gemm_nt") is None, reason=str(native.missing_reason())
)


def run(op, args):
    """The native op; all arguments with their defaults."""
    return native.native_op(op)(*deepkern.OPS[op].positional(tuple(args), None))


def check(op, args) -> None:
    args = deepkern.OPS[op].positional(tuple(args), None)
    compare.assert_matches(op, run(op, args), getattr(deepkern.reference, op)(*args))


def restride(data, x):
    """The values of x in a tensor with other strides: as given, in a larger tensor, transposed."""
    if not isinstance(x, torch.Tensor) or x.dim() < 2:
        return x
    layout = data.draw(st.sampled_from(["contiguous", "embedded", "transposed"]))
    if layout == "contiguous":
        return x
    if layout == "transposed":
        return x.mT.contiguous().mT
    larger = x.new_empty((*x.shape[:-1], x.shape[-1] + 5), dtype=F32).fill_(torch.nan).to(x.dtype)
    larger[..., 3 : 3 + x.shape[-1]] = x
    return larger[..., 3 : 3 + x.shape[-1]]


def make_hostile(data, x):
    """Replaces one value of an int32 tensor by one that is far outside its range."""
    if x.numel() and data.draw(st.booleans()):
        x = x.clone()
        at = data.draw(st.integers(0, x.numel() - 1))
        x.view(-1)[at] = data.draw(st.sampled_from(HOSTILE))
    return x


sizes = st.sampled_from([0, 1, 2, 3, 5, 13, 31, 33])
columns = st.sampled_from([0, 1, 15, 16, 31, 33, 100, 128, 129, 260])


@settings(max_examples=60, deadline=None)
@given(
    M=sizes,
    N=columns,
    K=columns,
    G=st.integers(0, 4),
    b_rows=st.sampled_from([1, 128]),
    out_dtype=st.sampled_from([BF16, F16, F32]),
    masked=st.booleans(),
    data=st.data(),
    seed=st.integers(0, 2**31),
)
def test_m_grouped(M, N, K, G, b_rows, out_dtype, masked, data, seed):
    op = OPS[masked]
    generator = torch.Generator().manual_seed(seed)
    size = {"M": M, "N": N, "K": K, "G": G, "b_rows": b_rows, "out_dtype": out_dtype}
    *operands, index, dtype = ops.inputs(op, generator, **size)[:6]
    index = make_hostile(data, index)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPKERN_CPU_ISA", data.draw(st.sampled_from(cpu_isas())))
        check(op, [*(restride(data, x) for x in operands), index, dtype])


@settings(max_examples=80, deadline=None)
@given(
    M=sizes | st.sampled_from([12, 14, 200]),
    N=columns,
    K=columns | st.sampled_from([511, 512, 520, 1030]),
    G=st.none() | st.integers(0, 4),
    dtype=st.sampled_from([BF16, F16, F32]),
    out_dtype=st.sampled_from([None, BF16, F16, F32]),
    data=st.data(),
    seed=st.integers(0, 2**31),
)
def test_real_gemm(M, N, K, G, dtype, out_dtype, data, seed):
    """gemm_nt, or with groups m_grouped_gemm_nt_contiguous with a hostile index."""
    generator = torch.Generator().manual_seed(seed)
    size = {"M": M, "N": N, "K": K, "dtype": dtype, "out_dtype": out_dtype}
    op = "gemm_nt" if G is None else "m_grouped_gemm_nt_contiguous"
    a, b, *rest = ops.inputs(op, generator, **size, **({} if G is None else {"G": G}))
    rest = [make_hostile(data, x) if isinstance(x, torch.Tensor) else x for x in rest]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPKERN_CPU_ISA", data.draw(st.sampled_from(cpu_isas())))
        check(op, [restride(data, a), restride(data, b), *rest])


@settings(max_examples=60, deadline=None)
@given(
    M=sizes, N=sizes, K=columns, G=st.integers(0, 4), c=st.booleans(),
    data=st.data(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_k_grouped(M, N, K, G, c, data, seed):
    op = "k_grouped_fp8_gemm_nt"
    generator = torch.Generator().manual_seed(seed)
    *operands, offsets, _ = ops.inputs(op, generator, M=M, N=N, K=K, G=G)
    addend = torch.randn(len(offsets) - 1, M, N, generator=generator) if c else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPKERN_CPU_ISA", data.draw(st.sampled_from(cpu_isas())))
        operands = [restride(data, x) for x in operands]
        check(op, [*operands, make_hostile(data, offsets), addend])


@settings(max_examples=60, deadline=None)
@given(
    T=st.integers(0, 9),
    E=st.integers(1, 6),
    topk=st.integers(0, 4),
    K=st.sampled_from([1, 60, 128, 200]),
    I=st.sampled_from([1, 64, 72, 130]),
    dtype=st.sampled_from([BF16, F16, F32]),
    backward=st.booleans(),
    data=st.data(),
    seed=st.integers(0, 2**31),
)
def test_moe(T, E, topk, K, I, dtype, backward, data, seed):
    op = OPS[3 + backward]
    generator = torch.Generator().manual_seed(seed)
    args = list(ops.inputs(op, generator, T=T, E=E, topk=topk, K=K, I=I, dtype=dtype))
    args[2] = make_hostile(data, args[2])
    if data.draw(st.booleans()):
        args[2] = args[2].clamp(-(2**31), 2**31 - 1).int()
    args[-4:] = [restride(data, x) for x in args[-4:]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPKERN_CPU_ISA", data.draw(st.sampled_from(cpu_isas())))
        check(op, args)


SIZES = {
    OPS[0]: {"M": 300, "N": 100, "K": 200, "G": 3},
    OPS[1]: {"M": 70, "N": 100, "K": 200, "G": 3},
    OPS[2]: {"M": 40, "N": 100, "K": 500, "G": 3},
    OPS[3]: {"T": 40, "E": 6, "topk": 3, "K": 300, "I": 200},
    OPS[4]: {"T": 40, "E": 6, "topk": 3, "K": 300, "I": 200},
    OPS[5]: {"M": 3, "N": 300, "K": 1100, "transposed": True},
    OPS[6]: {"M": 40, "N": 100, "K": 600, "G": 3, "dtype": F32},
}


def outputs(result) -> tuple:
    return result if isinstance(result, (tuple, list)) else (result,)


@pytest.mark.parametrize("op", OPS)
def test_bits_independent_of_threads(isa, op, seed):
    args = ops.inputs(op, torch.Generator().manual_seed(seed), **SIZES[op])
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(outputs(run(op, args)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            compare.assert_bitwise(got, want)


def test_row_bits_independent_of_the_other_rows(isa, seed):
    """Alone, a row has the bits that fp8_gemm_nt gives it."""
    generator = torch.Generator().manual_seed(seed)
    a, a_scale, b, b_scale, group, dtype = ops.inputs(OPS[0], generator, **SIZES[OPS[0]])
    together = run(OPS[0], (a, a_scale, b, b_scale, group, dtype))
    gemm = native.native_op("fp8_gemm_nt")
    for m in range(0, len(a), 7):
        g = int(group[m])
        if g >= 0:
            alone = gemm(a[m : m + 1], a_scale[m : m + 1], b[g], b_scale[g], dtype, None)
            compare.assert_bitwise(alone[0], together[m])


@pytest.mark.parametrize("transposed", [False, True], ids=["nt", "nn"])
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_real_row_bits_independent_of_the_other_rows(isa, seed, dtype, transposed):
    """Each number of rows has its own path through b; all give the bits of a row alone."""
    generator = torch.Generator().manual_seed(seed)
    size = {"M": 400, "N": 70, "K": 1030, "dtype": dtype, "transposed": transposed}
    a, b, _ = ops.inputs("gemm_nt", generator, **size)
    gemm = native.native_op("gemm_nt")
    whole = gemm(a, b, F32)
    for first, count in ((0, 1), (399, 1), (7, 2), (50, 3), (190, 4), (20, 12), (100, 13)):
        compare.assert_bitwise(gemm(a[first : first + count], b, F32), whole[first : first + count])
    group = torch.arange(400, dtype=torch.int32) % 5 - 1
    grouped = native.native_op("m_grouped_gemm_nt_contiguous")
    together = grouped(a, torch.stack([b] * 3), group, F32)
    compare.assert_bitwise(together, torch.where((group % 4 < 3) & (group >= 0), whole.T, 0.0).T)


def test_token_bits_independent_of_the_other_tokens(isa, seed):
    op = "moe_forward"
    args = ops.inputs(op, torch.Generator().manual_seed(seed), **SIZES[op], none=0.0)
    together = run(op, args)
    for t in (0, 7, 39):
        alone = run(op, (*(x[t : t + 1] for x in args[:3]), *args[3:]))
        compare.assert_bitwise(alone[0], together[t])
