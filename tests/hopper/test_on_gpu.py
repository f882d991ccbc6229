"""The `cuda` backend on a Hopper GPU."""

from __future__ import annotations

import pytest
import torch

import deepkern
from deepkern.runtime import arch, backends
from deepkern.testing import compare, inputs

pytestmark = pytest.mark.gpu
SHAPES = [(M, N, K) for M in (1, 3, 64, 127, 129, 257, 4096) for N, K in (
    (8, 128), (100, 129), (576, 7168), (2112, 7168), (4096, 512), (129, 100))]  # fmt: skip


@pytest.fixture(autouse=True)
def cuda_backend(device):
    reason = backends.why_not(deepkern.OPS["fp8_gemm_nt"], "cuda", device)
    if reason and device.type == "cuda" and arch.of(device).name == "sm_90":
        pytest.fail(f"a Hopper GPU without the cuda backend: {reason}")
    if reason:
        pytest.skip(reason)
    with deepkern.backend("cuda"):
        yield


def operands(generator, M, N, K):
    return inputs.make("fp8_gemm_nt", generator, M=M, N=N, K=K)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_against_the_oracle(shape, dtype, generator):
    a, a_scale, b, b_scale = operands(generator, *shape)[:4]
    got = deepkern.fp8_gemm_nt(a, a_scale, b, b_scale, dtype)
    want = deepkern.reference.fp8_gemm_nt(a, a_scale, b, b_scale, dtype)
    # The tensor core keeps some 14 bits of a sum: docs/matmul.md, Accumulation.
    compare.assert_close(got, want, dtype=torch.bfloat16)


def test_adds_c(generator):
    args = operands(generator, 300, 200, 512)[:4]
    c = torch.randn(300, 200, generator=generator, device=generator.device)
    got = deepkern.fp8_gemm_nt(*args, torch.float32, c)
    want = deepkern.reference.fp8_gemm_nt(*args, torch.float32, c)
    compare.assert_close(got, want, dtype=torch.bfloat16)


def test_the_same_bits_a_hundred_times_and_for_a_row_alone(generator):
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


def test_refuses_a_scale_per_row(generator):
    a, a_scale, b, _ = operands(generator, 4, 256, 256)[:4]
    scale = torch.ones(256, 2, device=a.device)
    with pytest.raises(RuntimeError, match="fp8_gemm_nt: b_scale: expected, on backend cuda"):
        deepkern.fp8_gemm_nt(a, a_scale, b, scale)
