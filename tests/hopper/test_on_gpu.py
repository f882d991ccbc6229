"""The `cuda` backend on a Hopper GPU."""

from __future__ import annotations

import pytest
import torch

import deepkern
from deepkern.runtime import arch, backends
from deepkern.testing import compare, ops

pytestmark = pytest.mark.gpu
GROUPED = ("m_grouped_fp8_gemm_nt_contiguous", "m_grouped_fp8_gemm_nt_masked",
           "k_grouped_fp8_gemm_nt")  # fmt: skip
SHAPES = [(M, N, K) for M in (1, 3, 64, 127, 129, 257, 4096) for N, K in (
    (8, 128), (100, 129), (576, 7168), (2112, 7168), (4096, 512), (129, 100))]  # fmt: skip

caches = pytest.mark.parametrize("kind", [{}, {"cache_dtype": torch.uint8}], ids=["bf16", "fp8"])


@pytest.fixture(autouse=True)
def cuda_backend(device):
    reason = backends.unsupported_reason(deepkern.OPS["k_grouped_fp8_gemm_nt"], "cuda", device)
    if reason and device.type == "cuda" and arch.of(device).name == "sm_90":
        pytest.fail(f"a Hopper GPU without the cuda backend: {reason}")
    if reason:
        pytest.skip(reason)
    with deepkern.backend("cuda"):
        yield


def operands(generator, M, N, K):
    return ops.inputs("fp8_gemm_nt", generator, M=M, N=N, K=K)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_against_the_oracle(shape, dtype, generator):
    a, a_scale, b, b_scale = operands(generator, *shape)[:4]
    got = deepkern.fp8_gemm_nt(a, a_scale, b, b_scale, dtype)
    want = deepkern.reference.fp8_gemm_nt(a, a_scale, b, b_scale, dtype)
    compare.assert_close(got, want, op="fp8_gemm_nt")


def test_adds_c(generator):
    args = operands(generator, 300, 200, 512)[:4]
    c = torch.randn(300, 200, generator=generator, device=generator.device)
    got = deepkern.fp8_gemm_nt(*args, torch.float32, c)
    want = deepkern.reference.fp8_gemm_nt(*args, torch.float32, c)
    compare.assert_close(got, want, op="fp8_gemm_nt")


def test_same_bits_in_every_run_and_row_subset(generator):
    a, a_scale, b, b_scale = operands(generator, 500, 2112, 7168)[:4]
    first = deepkern.fp8_gemm_nt(a, a_scale, b, b_scale)
    for _ in range(100):
        compare.assert_bitwise(deepkern.fp8_gemm_nt(a, a_scale, b, b_scale), first)
    for rows in (slice(3, 4), slice(100, 164), slice(0, 257)):
        part = deepkern.fp8_gemm_nt(a[rows], a_scale[rows], b, b_scale)
        compare.assert_bitwise(part, first[rows])


def test_in_a_graph_and_on_another_stream(generator):
    args = operands(generator, 130, 256, 512)[:4]
    want = deepkern.fp8_gemm_nt(*args)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        compare.assert_bitwise(deepkern.fp8_gemm_nt(*args), want)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        got = deepkern.fp8_gemm_nt(*args)
    got.fill_(torch.nan)
    graph.replay()
    compare.assert_bitwise(got, want)


@pytest.mark.parametrize("b_rows", [128, 1])
@pytest.mark.parametrize("M", [1, 17, 300])
def test_scales_per_row(b_rows, M, generator):
    args = ops.inputs("fp8_gemm_nt", generator, M=M, N=520, K=1024, b_rows=b_rows)
    got = deepkern.fp8_gemm_nt(*args)
    compare.assert_close(got, deepkern.reference.fp8_gemm_nt(*args), op="fp8_gemm_nt")


@pytest.mark.parametrize("op", GROUPED)
@pytest.mark.parametrize("shape", [(1, 64, 128, 1), (37, 100, 400, 5), (700, 576, 1024, 16),
                                   (4096, 4096, 7168, 4), (64, 512, 7168, 256)])  # fmt: skip
def test_groups(op, shape, generator):
    size = dict(zip("MNKG", shape, strict=True))
    args = deepkern.OPS[op].positional(ops.inputs(op, generator, **size))
    got = getattr(deepkern, op)(*args)
    want = getattr(deepkern.reference, op)(*args)
    compare.assert_close(got, want, op=op)
    compare.assert_bitwise(getattr(deepkern, op)(*args), got)


@pytest.mark.parametrize("op", GROUPED)
@pytest.mark.parametrize("value", [-(2**31), -1, 3, 2**31 - 1])
def test_hostile_sizes(op, value, generator):
    """Results match the oracle. Run with compute-sanitizer to check the accesses."""
    args = list(deepkern.OPS[op].positional(ops.inputs(op, generator, M=70, N=96, K=256, G=3)))
    args[4] = args[4].clone()
    args[4][::2] = value
    got, want = getattr(deepkern, op)(*args), getattr(deepkern.reference, op)(*args)
    compare.assert_close(got, want, op=op)


def decode_operands(generator, **size):
    return deepkern.OPS["mla_decode"].positional(ops.inputs("mla_decode", generator, **size))


def check_decode(args) -> tuple:
    got, want = deepkern.mla_decode(*args), deepkern.reference.mla_decode(*args)
    for mine, exact in zip(got, want, strict=True):
        compare.assert_close(mine, exact)
    return got


@caches
@pytest.mark.parametrize("page", [1, 2, 16, 53, 64, 576])
@pytest.mark.parametrize("H", [1, 3, 9, 16, 63, 64, 126, 128])
@pytest.mark.parametrize("Sq", [1, 2, 4])
def test_decode(Sq, H, page, kind, generator):
    """FlashMLA's lengths, half of them zero, in poisoned caches and tables."""
    for causal in (True, False):
        lengths = (20, 0, 140, 0, 4096, 0, 63, 0, 577, 0)
        check_decode(decode_operands(generator, lengths=lengths, Sq=Sq, H=H, page=page,
                                     causal=causal, **kind))  # fmt: skip


@caches
@pytest.mark.parametrize("page", [64, 53])
def test_decode_bits_independent_of_batch(page, kind, generator):
    lengths = torch.randint(0, 9000, (64,), generator=torch.Generator().manual_seed(3)).tolist()
    q, cache, table, seqlens, *rest = decode_operands(
        generator, lengths=lengths, H=128, page=page, **kind
    )
    out, lse = deepkern.mla_decode(q, cache, table, seqlens, *rest)
    for _ in range(100):
        again = deepkern.mla_decode(q, cache, table, seqlens, *rest)
        compare.assert_bitwise(again[0], out)
        compare.assert_bitwise(again[1], lse)
    for i in (0, 17, 63):
        one = slice(i, i + 1)
        alone = deepkern.mla_decode(q[one], cache, table[one], seqlens[one], *rest)
        compare.assert_bitwise(alone[0], out[one])
        compare.assert_bitwise(alone[1], lse[one])


@caches
def test_decode_in_a_graph_with_other_lengths(kind, generator):
    """A graph uses the lengths in memory when it runs."""
    q, cache, table, seqlens, *rest = decode_operands(
        generator, lengths=(3000, 700, 64), H=16, **kind
    )
    want = deepkern.mla_decode(q, cache, table, seqlens, *rest)
    full, graph = seqlens.clone(), torch.cuda.CUDAGraph()
    seqlens.zero_()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        got = deepkern.mla_decode(q, cache, table, seqlens, *rest)
    seqlens.copy_(full)
    graph.replay()
    for mine, other in zip(got, want, strict=True):
        compare.assert_bitwise(mine, other)


@caches
@pytest.mark.parametrize("value", [-(2**31), -1, 2147480000, 2**31 - 1])
def test_decode_with_hostile_contents(value, kind, generator):
    q, cache, table, seqlens, *rest = decode_operands(
        generator, lengths=(700, 200, 200), H=3, **kind
    )
    table[:, ::2] = value
    check_decode((q, cache, table, seqlens, *rest))
    seqlens[1] = value if value < 0 else 199
    check_decode((q, cache, table, seqlens, *rest))


def test_decode_of_fp8_cache_with_any_scales(generator):
    """The same as in the emulator, with the GPU's arithmetic on subnormal numbers."""
    q, cache, *rest = decode_operands(
        generator, lengths=(130, 65), Sq=2, H=3, cache_dtype=torch.uint8
    )
    used = ~(cache == 0xFF).all(-1, keepdim=True)
    scale = cache[..., 512:528].view(torch.float32)
    for extreme in (0.0, 1e-40, 1e-30, 1e4, -3e-3):
        for block in range(4):
            scale[:, block::5, :, block] = extreme
        cache[:, ::3, :, :128] = 0x7E  # 448
        check_decode((q, cache.masked_fill(~used, 0xFF), *rest))


def sparse_operands(generator, name: str, **size) -> tuple:
    return deepkern.OPS[name].positional(ops.inputs(name, generator, **size))


def check_sparse(name: str, args) -> tuple:
    got = getattr(deepkern, name)(*args)
    compare.assert_matches(name, got, getattr(deepkern.reference, name)(*args))
    return got


@caches
@pytest.mark.parametrize("page", [1, 53, 64])
@pytest.mark.parametrize("H", [1, 3, 16, 63, 64, 128])
@pytest.mark.parametrize("topk", [1, 63, 64, 65, 577, 2048])
def test_sparse_decode(topk, H, page, kind, generator):
    size = {"B": 3, "Sq": 2, "H": H, "topk": topk, "tokens": 5000, "page": page, **kind}
    check_sparse("mla_sparse_decode", sparse_operands(generator, "mla_sparse_decode", **size))
    size |= {"lengths": True, "sink": True}
    check_sparse("mla_sparse_decode", sparse_operands(generator, "mla_sparse_decode", **size))


@caches
def test_sparse_decode_bits_independent_of_batch_and_run(kind, generator):
    size = {"B": 64, "Sq": 2, "H": 128, "topk": 2048, "tokens": 32768, "sink": True, **kind}
    q, cache, indices, *rest = sparse_operands(generator, "mla_sparse_decode", **size)
    out, lse = deepkern.mla_sparse_decode(q, cache, indices, *rest)
    for _ in range(100):
        for mine, other in zip(deepkern.mla_sparse_decode(q, cache, indices, *rest), (out, lse),
                               strict=True):  # fmt: skip
            compare.assert_bitwise(mine, other)
    for b in (0, 17, 63):
        one = slice(b, b + 1)
        alone = deepkern.mla_sparse_decode(q[one], cache, indices[one], *rest)
        compare.assert_bitwise(alone[0], out[one])
        compare.assert_bitwise(alone[1], lse[one])


@caches
@pytest.mark.parametrize("value", [-(2**31), -1, 2147480000, 2**31 - 1])
def test_sparse_decode_with_hostile_indices(value, kind, generator):
    size = {"B": 3, "H": 3, "topk": 700, "tokens": 300, **kind}
    q, cache, indices, *rest = sparse_operands(generator, "mla_sparse_decode", **size)
    indices[..., ::2] = value
    check_sparse("mla_sparse_decode", (q, cache, indices, *rest))
    indices[1] = value
    out, lse = check_sparse("mla_sparse_decode", (q, cache, indices, *rest))
    assert (out[1] == 0).all() and (lse[1] == -torch.inf).all()


@pytest.mark.parametrize("H", [1, 16, 64, 128])
@pytest.mark.parametrize("topk", [1, 65, 2048])
def test_sparse_prefill(topk, H, generator):
    size = {"S": 20, "Skv": 5000, "H": H, "topk": topk, "lengths": True, "sink": True}
    args = sparse_operands(generator, "mla_sparse_prefill", **size)
    got = check_sparse("mla_sparse_prefill", args)
    for mine, other in zip(deepkern.mla_sparse_prefill(*args), got, strict=True):
        compare.assert_bitwise(mine, other)


def test_decode_unsupported_arguments(generator):
    few = decode_operands(generator, lengths=(9,), cache_dtype=torch.uint8)
    odd = torch.nn.functional.pad(few[1], (0, 8))[..., :656]  # tokens 664 bytes apart
    cases = [(few[0], odd, *few[2:])]
    for size in ({"dtype": torch.float16}, {"cache_dtype": torch.float16}, {"R": 128}):
        cases.append(decode_operands(generator, lengths=(9,), **size))
    for args in cases:
        with pytest.raises(deepkern.BackendError, match="mla_decode: .* it takes"):
            deepkern.mla_decode(*args)
        native = torch.ops.deepkern_native.mla_decode
        with pytest.raises(RuntimeError, match="expected, on backend cuda"):
            native(*args)


def prefill_operands(generator, lengths, keys, **size) -> tuple:
    inputs = ops.inputs("mla_prefill", generator, lengths, keys, **size)
    return deepkern.OPS["mla_prefill"].positional(inputs)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("H", "Hk"), [(1, 1), (16, 2), (128, 128)])
def test_prefill(H, Hk, causal, generator):
    """Ragged sequences, without queries or keys, NaN in the rows of no sequence."""
    lengths, keys = (1, 127, 128, 129, 0, 64, 2000), (1, 140, 128, 20, 7, 0, 2500)
    args = prefill_operands(generator, lengths, keys, H=H, Hk=Hk, causal=causal, unused=2)
    compare.assert_matches(
        "mla_prefill", deepkern.mla_prefill(*args), deepkern.reference.mla_prefill(*args)
    )


def test_prefill_bits_independent_of_batch_and_run(generator):
    q, k, v, cu_q, cu_k, *rest = prefill_operands(generator, (3000, 700, 64), None, H=128)
    out, lse = deepkern.mla_prefill(q, k, v, cu_q, cu_k, *rest)
    for _ in range(50):
        again = deepkern.mla_prefill(q, k, v, cu_q, cu_k, *rest)
        compare.assert_bitwise(again[0], out)
        compare.assert_bitwise(again[1], lse)
    for first, end in ((0, 3000), (3000, 3700), (3700, 3764)):
        rows = slice(first, end)
        bounds = torch.tensor([0, end - first], dtype=torch.int32, device=q.device)
        alone = deepkern.mla_prefill(q[rows], k[rows], v[rows], bounds, bounds, *rest)
        compare.assert_bitwise(alone[0], out[rows])
        compare.assert_bitwise(alone[1], lse[:, rows])


def test_prefill_in_a_graph_with_other_boundaries(generator):
    q, k, v, cu_q, cu_k, *rest = prefill_operands(generator, (1000, 300), None, H=16)
    want = deepkern.mla_prefill(q, k, v, cu_q, cu_k, *rest)
    bounds, graph = cu_q.clone(), torch.cuda.CUDAGraph()
    cu_q.zero_(), cu_k.zero_()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        got = deepkern.mla_prefill(q, k, v, cu_q, cu_k, *rest)
    cu_q.copy_(bounds), cu_k.copy_(bounds)
    graph.replay()
    for mine, other in zip(got, want, strict=True):
        compare.assert_bitwise(mine, other)


def backward_operands(generator, lengths, keys, **size) -> tuple:
    q, k, v, *rest = prefill_operands(generator, lengths, keys, **size)
    out, lse = deepkern.mla_prefill(q, k, v, *rest)
    grad_out = torch.randn(out.shape, generator=generator, device=q.device).bfloat16()
    grad_lse = torch.randn(lse.shape, generator=generator, device=q.device)
    return grad_out, q, k, v, out, lse, *rest, grad_lse


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("H", "Hk"), [(1, 1), (16, 2), (128, 128)])
def test_prefill_backward(H, Hk, causal, generator):
    lengths, keys = (1, 127, 129, 0, 64, 1000), (3, 200, 64, 7, 0, 1300)
    args = backward_operands(generator, lengths, keys, H=H, Hk=Hk, causal=causal, unused=2)
    want = deepkern.reference.mla_prefill_backward(*args)
    compare.assert_matches("mla_prefill_backward", deepkern.mla_prefill_backward(*args), want)


def test_prefill_backward_bits_independent_of_run(generator):
    args = backward_operands(generator, (3000, 700, 64), None, H=128)
    first = deepkern.mla_prefill_backward(*args)
    for _ in range(50):
        for mine, other in zip(deepkern.mla_prefill_backward(*args), first, strict=True):
            compare.assert_bitwise(mine, other)


@pytest.mark.parametrize(("lengths", "keys"), [((300,), (0,)), ((0,), (300,)), ((5, 40), (2, 30))])
def test_prefill_with_few_keys_or_queries(lengths, keys, generator):
    """Also a tensor without rows, and queries that no key is visible to."""
    args = prefill_operands(generator, lengths, keys, H=2)
    want = deepkern.reference.mla_prefill(*args)
    compare.assert_matches("mla_prefill", deepkern.mla_prefill(*args), want)
    args = backward_operands(generator, lengths, keys, H=2)
    want = deepkern.reference.mla_prefill_backward(*args)
    compare.assert_matches("mla_prefill_backward", deepkern.mla_prefill_backward(*args), want)
