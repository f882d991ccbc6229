"""The whole `cuda` backend on CPU tensors: ops.cpp, launchers, kernels in the emulator.

This runs everything except the driver: checks, copies for TMA, tile choice, tensor maps, launch
configuration, kernels. The emulated CUDA runtime rejects what the driver would reject.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import deepkern
from bench import emulator
from bench.emulator import cuda_backend
from deepkern.testing import compare, ops

from .products import PRODUCTS

pytestmark = pytest.mark.slow  # compiles the emulator
OPS = emulator.served()
GROUPED = [name for name in OPS if "grouped" in name]
FP8 = torch.float8_e4m3fn
SIZES = [(1, 8, 128, 1), (40, 100, 257, 3), (200, 136, 256, 5), (3, 9, 100, 9)]  # M, N, K, G


def typical_args(name: str, generator) -> tuple:
    """All arguments of an op, at a typical size."""
    size = {"M": 20, "N": 40, "K": 160} | ({"G": 3} if name in GROUPED else {})
    if name.startswith("mla_"):
        size = {"H": 3} if "sparse" in name else {"lengths": (70,), "H": 3}
    return deepkern.OPS[name].positional(ops.inputs(name, generator, **size))


def check(name: str, args, **how) -> torch.Tensor | tuple:
    """The op's result, after a comparison with the reference: every bit of FP8 products."""
    args = deepkern.OPS[name].positional(args)
    with cuda_backend(**how):
        got = getattr(deepkern, name)(*args)
    if name in PRODUCTS:
        splits = (1, 2, 4, 8) if name == "fp8_gemm_nt" else (1,)
        possible = (PRODUCTS[name](*args, *((s,) if s > 1 else ())) for s in splits)
        assert any(torch.equal(compare.bits(got), compare.bits(want)) for want in possible)
        return got
    want = getattr(deepkern.reference, name)(*args)
    compare.assert_matches(name, got, want, "sm_90")
    return got


@pytest.mark.parametrize("name", OPS)
def test_small_sizes(name, generator):
    for size in ops.sizes(name).small:
        args = ops.inputs(name, generator, **size)
        with cuda_backend():
            try:
                getattr(deepkern, name)(*args)
            except deepkern.BackendError as unsupported:
                assert "it supports" in str(unsupported)
                continue
        check(name, args, seed=generator.initial_seed())


@pytest.mark.parametrize("name", OPS)
def test_runs_the_kernel(name, generator):
    """Without launches nothing is computed: there is no fallback to another backend."""
    args = typical_args(name, generator)
    with cuda_backend(launches=False), pytest.raises(compare.Mismatch):
        got = getattr(deepkern, name)(*args)
        compare.assert_matches(name, got, getattr(deepkern.reference, name)(*args), "sm_90")


@pytest.mark.parametrize("name", OPS)
def test_compiles_with_the_package_schema(name, generator):
    emulator.ops()
    args = typical_args(name, generator)
    fake = torch.ops.deepkern_emulated
    schemas = [getattr(ops, name).default._schema for ops in (fake, torch.ops.deepkern_native)]
    assert str(schemas[0]).split("::")[1] == str(schemas[1]).split("::")[1]
    torch._dynamo.reset()  # else the ops traced before count as recompilations
    with cuda_backend():
        got = torch.compile(getattr(deepkern, name), backend="aot_eager", fullgraph=True)(*args)
    compare.assert_matches(name, got, getattr(deepkern.reference, name)(*args), "sm_90")


@pytest.mark.parametrize("M", [0, 1, 9, 40, 129, 300])
@pytest.mark.parametrize(
    ("N", "K"), [(0, 128), (7, 0), (5, 1), (40, 100), (129, 257), (264, 384), (72, 1100)]
)
def test_any_shape(M, N, K, generator):
    """Operands with K not a multiple of 16 are copied. The tile depends on M, the bits of a row do
    not, with and without split-K."""
    a, a_scale, b, b_scale = ops.inputs("fp8_gemm_nt", generator, M=M, N=N, K=K)[:4]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        whole = check("fp8_gemm_nt", (a, a_scale, b, b_scale, dtype))
    c = torch.randn(M, N, generator=generator)
    check("fp8_gemm_nt", (a, a_scale, b, b_scale, torch.float32, c))
    if M > 1:
        last = check("fp8_gemm_nt", (a[-1:], a_scale[-1:], b, b_scale, torch.float32))
        compare.assert_bitwise(last, whole[-1:])


@pytest.mark.parametrize("multiprocessors", [1, 3, 78, 132])
@pytest.mark.parametrize("M", [5, 200])
def test_bits_independent_of_number_of_sms(M, multiprocessors, generator):
    args = ops.inputs("fp8_gemm_nt", generator, M=M, N=300, K=1024)
    compare.assert_bitwise(check("fp8_gemm_nt", args, multiprocessors=multiprocessors),
                           check("fp8_gemm_nt", args))  # fmt: skip


def test_any_layout(generator):
    """Transposed and sliced operands, unaligned codes, scales with any strides."""
    a, a_scale, b, b_scale = ops.inputs("fp8_gemm_nt", generator, M=33, N=50, K=144)[:4]
    want = check("fp8_gemm_nt", (a, a_scale, b, b_scale))

    def inside(x, left, right):
        """x as a slice of a wider tensor of NaN."""
        wide = torch.full((x.shape[0], left + x.shape[1] + right), 0x7F, dtype=torch.uint8)
        wide = wide.view(FP8)
        wide[:, left : left + x.shape[1]] = x
        return wide[:, left : left + x.shape[1]]

    layouts = [a.T.contiguous().T, inside(a, 16, 16), inside(a, 3, 1), inside(a, 0, 7)]
    for layout in layouts:
        compare.assert_bitwise(check("fp8_gemm_nt", (layout, a_scale, b, b_scale)), want)
        columns = a_scale.T.contiguous().T
        other = inside(b, 5, 2), b_scale.T.contiguous().T
        compare.assert_bitwise(check("fp8_gemm_nt", (layout, columns, *other)), want)


def test_rows_that_overlap(generator):
    """Stride 0, and rows that overlap: a tensor map does not support such strides."""
    a, a_scale, b, b_scale = ops.inputs("fp8_gemm_nt", generator, M=5, N=40, K=160)[:4]
    check("fp8_gemm_nt", (a[:1].expand(5, -1), a_scale, b, b_scale))
    overlapping = a.flatten().as_strided((5, 160), (16, 1))
    check("fp8_gemm_nt", (overlapping, a_scale, b, b_scale))


def test_c_with_one_row(generator):
    """torch ignores the stride of a dimension of length 1 in is_contiguous()."""
    args = ops.inputs("k_grouped_fp8_gemm_nt", generator, M=1, N=40, K=160, G=3)[:5]
    c = torch.randn(1, 3, 40, generator=generator).transpose(0, 1)
    assert c.is_contiguous() and c.stride(1) == 120
    check("k_grouped_fp8_gemm_nt", (*args, c))


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("size", SIZES)
def test_groups(name, size, generator):
    args = ops.inputs(name, generator, **dict(zip("MNKG", size, strict=True)))
    check(name, args, seed=1)


@pytest.mark.parametrize("kind", [{}, {"cache_dtype": torch.uint8}], ids=["bf16", "fp8"])
@pytest.mark.parametrize("page", [1, 16, 53, 64, 128])
@pytest.mark.parametrize(("Sq", "H"), [(1, 1), (2, 9), (1, 128)])
def test_decode(page, Sq, H, kind, generator):
    size = {"lengths": (20, 0, 140, 577), "Sq": Sq, "H": H, "page": page, **kind}
    check("mla_decode", ops.inputs("mla_decode", generator, **size))


@pytest.mark.parametrize("kind", [{}, {"cache_dtype": torch.uint8}], ids=["bf16", "fp8"])
def test_decode_with_empty_pages(kind, generator):
    """No token is attended to, for any table and lengths."""
    q, cache, *rest = deepkern.OPS["mla_decode"].positional(
        ops.inputs("mla_decode", generator, lengths=(70, 9), H=3, page=64, **kind)
    )
    out, lse = check("mla_decode", (q, cache[:, :0], *rest))
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_decode_of_strided_arguments(generator):
    """Unaligned rows of q are copied; strided caches and tables are read in place."""
    q, cache, table, lengths, *rest = deepkern.OPS["mla_decode"].positional(
        ops.inputs("mla_decode", generator, lengths=(70, 200), H=5, page=64)
    )
    want = check("mla_decode", (q, cache, table, lengths, *rest))
    odd = torch.full((*q.shape[:-1], q.shape[-1] + 3), torch.nan, dtype=q.dtype)[..., 1:-2]
    odd.copy_(q)
    strided = torch.full((2 * len(cache), *cache.shape[1:]), torch.nan, dtype=cache.dtype)[::2]
    strided.copy_(cache)
    for queries in (odd, q.transpose(1, 2).contiguous().transpose(1, 2)):
        got = check("mla_decode", (queries, strided, table, lengths, *rest))
        for mine, other in zip(got, want, strict=True):
            compare.assert_bitwise(mine, other)


@pytest.mark.parametrize("kind", [{}, {"cache_dtype": torch.uint8}], ids=["bf16", "fp8"])
@pytest.mark.parametrize("page", [1, 64])
@pytest.mark.parametrize(("Sq", "H"), [(2, 9), (1, 128)])
def test_sparse_decode(page, Sq, H, kind, generator):
    for topk, options in ((1, {}), (577, {"lengths": True, "sink": True})):
        size = {"topk": topk, "tokens": 300, "Sq": Sq, "H": H, "page": page, **options, **kind}
        check("mla_sparse_decode", ops.inputs("mla_sparse_decode", generator, **size))


@pytest.mark.parametrize("H", [1, 9, 128])
def test_sparse_prefill(H, generator):
    for topk, options in ((1, {}), (577, {"lengths": True, "sink": True})):
        size = {"S": 3, "Skv": 300, "H": H, "topk": topk, **options}
        check("mla_sparse_prefill", ops.inputs("mla_sparse_prefill", generator, **size))


def test_sparse_attention_of_strided_arguments(generator):
    """Unaligned rows of q are copied; strided caches, keys and indices are read in place."""
    q, cache, indices, *rest = ops.inputs("mla_sparse_decode", generator, Sq=2, H=5, topk=90)
    got = check("mla_sparse_decode", (q, cache, indices, *rest))
    odd = torch.full((*q.shape[:-1], q.shape[-1] + 3), torch.nan, dtype=q.dtype)[..., 1:-2]
    odd.copy_(q)
    apart = torch.full((2 * len(cache), *cache.shape[1:]), torch.nan, dtype=cache.dtype)[::2]
    apart.copy_(cache)
    wide = F.pad(indices, (3, 5), value=-7)[..., 3:-5].transpose(0, 1).clone().transpose(0, 1)
    for mine, other in zip(check("mla_sparse_decode", (odd, apart, wide, *rest)), got, strict=True):
        compare.assert_bitwise(mine, other)
    q, kv, indices, *rest = ops.inputs("mla_sparse_prefill", generator, H=5, topk=90)
    got = check("mla_sparse_prefill", (q, kv, indices, *rest))
    args = (wide_rows(q, 3, 2), torch.cat((torch.full_like(kv, torch.nan), kv), 1)[:, 1:],
            F.pad(indices, (0, 5), value=-7)[..., :-5])  # fmt: skip
    for mine, other in zip(check("mla_sparse_prefill", (*args, *rest)), got, strict=True):
        compare.assert_bitwise(mine, other)


def wide_rows(x: torch.Tensor, left: int, right: int) -> torch.Tensor:
    """x [rows, heads, dim] as a part of wider heads, with NaN between them."""
    heads = torch.full((*x.shape[:2], left + x.shape[2] + right), torch.nan, dtype=x.dtype)
    heads[..., left : left + x.shape[2]] = x
    return heads[..., left : left + x.shape[2]]


def prefill_args(generator, lengths, keys, **size) -> tuple[tuple, tuple]:
    """Arguments of mla_prefill and of its gradients."""
    q, k, v, *rest = ops.inputs("mla_prefill", generator, lengths, keys, **size)
    out, lse = deepkern.reference.mla_prefill(q, k, v, *rest)
    grad_out = torch.randn(out.shape, generator=generator).bfloat16()
    grad_lse = torch.randn(lse.shape, generator=generator)
    backward = (grad_out, q, k, v, out.bfloat16(), lse.float(), *rest, grad_lse)
    return (q, k, v, *rest), backward


def test_prefill_of_strided_arguments(generator):
    """Rows that are not aligned, heads before rows, heads that overlap: copied for TMA."""
    forward, backward = prefill_args(generator, (70,), (90,), H=2)
    out, grads = check("mla_prefill", forward), check("mla_prefill_backward", backward)
    layouts = (lambda x: wide_rows(x, 8, 0), lambda x: wide_rows(x, 3, 2),
               lambda x: x.transpose(0, 1).contiguous().transpose(0, 1))  # fmt: skip
    for layout in layouts:
        other = (*map(layout, forward[:3]), *forward[3:])
        for mine, want in zip(check("mla_prefill", other), out, strict=True):
            compare.assert_bitwise(mine, want)
        lse, grad_lse = (F.pad(x, (0, 5))[:, :-5] for x in (backward[5], backward[-1]))
        other = (*map(layout, backward[:5]), lse, *backward[6:-1], grad_lse)
        for mine, want in zip(check("mla_prefill_backward", other), grads, strict=True):
            compare.assert_bitwise(mine, want)
    q, k, v, *rest = forward
    check("mla_prefill", (q, k[:, :1].expand(-1, 2, -1), v[:, :1].expand(-1, 2, -1), *rest))


@pytest.mark.parametrize(
    ("lengths", "keys", "size"),
    [((3,), (0,), {"H": 2}), ((0,), (3,), {"H": 2}), ((1,), (1,), {"H": 1}),
     ((3,), (3,), {"H": 0, "Hk": 2}), ((), (), {"H": 1, "unused": 2})],
)  # fmt: skip
def test_prefill_without_keys_queries_or_heads(lengths, keys, size, generator):
    """With one key the gradient of the score is grad_lse: a bf16 value, so that its one rounding,
    which no other would average out, changes nothing."""
    forward, (*backward, grad_lse) = prefill_args(generator, lengths, keys, **size)
    check("mla_prefill", forward)
    check("mla_prefill_backward", (*backward, grad_lse.bfloat16().float()))


def test_cuda_error_is_raised(generator):
    library, args = emulator.ops(), typical_args("fp8_gemm_nt", generator)
    library.emulate_refusal(1)
    try:
        with (
            cuda_backend(),
            pytest.raises(RuntimeError, match="fp8_gemm_nt: backend cuda: refused"),
        ):
            deepkern.fp8_gemm_nt(*args)
    finally:
        library.emulate_refusal(0)
    check("fp8_gemm_nt", args)


def test_every_op_has_a_gpu_test():
    """bench.verify lets `auto` use a kernel after the GPU tests, so each op must be in them."""
    text = (Path(__file__).parent / "test_on_gpu.py").read_text()
    missing = [name for name in OPS if f"deepkern.{name}(" not in text and f'"{name}"' not in text]
    assert not missing
