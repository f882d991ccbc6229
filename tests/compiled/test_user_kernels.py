"""Kernels such as users write, in compiled form: softmax, layer norm, matmul, histogram.

They follow the subjects of Triton's tutorials. test_driver.py has the vector addition.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

import deepkern
from deepkern.runtime.compiled import TARGETS

# Without and with asynchronous bulk copies and wgmma; `make proof` runs the other targets.
COMMON = ("sm_80", "sm_90")
TARGET = [t if t in COMMON else pytest.param(t, marks=pytest.mark.proof) for t in TARGETS]
pytestmark = [pytest.mark.slow, pytest.mark.parametrize("target", TARGET)]


@triton.jit
def softmax_kernel(x_ptr, out_ptr, rows, columns, BLOCK: tl.constexpr):
    """A program takes every num_programs-th row."""
    column = tl.arange(0, BLOCK)
    mask = column < columns
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=3):
        x = tl.load(x_ptr + row * columns + column, mask=mask, other=float("-inf"))
        power = tl.exp(x - tl.max(x, 0))
        tl.store(out_ptr + row * columns + column, power / tl.sum(power, 0), mask=mask)


@triton.jit
def layer_norm_kernel(x_ptr, weight_ptr, bias_ptr, out_ptr, columns, eps, BLOCK: tl.constexpr):
    """Mean and variance in two passes over a row of any length."""
    row = tl.program_id(0).to(tl.int64) * columns
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + row + column, mask=column < columns, other=0.0).to(tl.float32)
    mean = tl.sum(total) / columns
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row + column, mask=column < columns, other=0.0).to(tl.float32)
        squares += tl.where(column < columns, (x - mean) * (x - mean), 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(squares) / columns + eps)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < columns
        x = tl.load(x_ptr + row + column, mask=mask, other=0.0).to(tl.float32)
        weight, bias = (
            tl.load(weight_ptr + column, mask=mask),
            tl.load(bias_ptr + column, mask=mask),
        )
        y = (x - mean) * scale * weight + bias
        tl.store(out_ptr + row + column, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """leaky_relu(a @ b), with tiles in groups of rows for the L2 cache."""
    tile_rows, tile_columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    row_block, column_block = tl.swizzle2d(
        tl.program_id(0) // tile_columns, tl.program_id(0) % tile_columns,
        tile_rows, tile_columns, GROUP,
    )  # fmt: skip
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + (row % M)[:, None] * K + k[None, :]
    b_ptrs = b_ptr + k[:, None] * N + (column % N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(a_ptrs, mask=k[None, :] < K - start, other=0.0)
        b = tl.load(b_ptrs, mask=k[:, None] < K - start, other=0.0)
        acc = tl.dot(a, b, acc)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * N
    acc = tl.where(acc >= 0, acc, 0.01 * acc)
    mask = (row < M)[:, None] & (column < N)[None, :]
    tl.store(c_ptr + row[:, None] * N + column[None, :], acc.to(tl.float16), mask=mask)


@triton.jit
def descriptor_matmul_kernel(
    a_desc, b_desc, c_desc, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """a @ bᵀ by persistent programs, with descriptors that the host made."""
    tile_columns = tl.cdiv(N, BLOCK_N)
    num_tiles = tl.cdiv(M, BLOCK_M) * tile_columns
    for t in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=True):
        row, column = t // tile_columns * BLOCK_M, t % tile_columns * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for block in range(tl.cdiv(K, BLOCK_K)):
            a = a_desc.load([row, block * BLOCK_K])
            b = b_desc.load([column, block * BLOCK_K])
            acc = tl.dot(a, b.T, acc)
        c_desc.store([row, column], acc.to(c_desc.dtype))


@triton.jit
def transposing_kernel(x_ptr, out_ptr, M, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """outᵀ = x, through descriptors that each program makes."""
    x = tl.make_tensor_descriptor(x_ptr, [M, N], [N, 1], [ROWS, COLUMNS])
    out = tl.make_tensor_descriptor(out_ptr, [N, M], [M, 1], [COLUMNS, ROWS])
    row, column = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS
    out.store([column, row], x.load([row, column]).T)


@triton.jit
def histogram_kernel(x_ptr, counts_ptr, last_ptr, n, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """counts[b] += the number of b in x; last[b] = the index of the last one."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    x = tl.load(x_ptr + i, mask=mask, other=0)
    tl.atomic_max(last_ptr + x, i, mask=mask)
    counts = tl.histogram(x, BINS, mask=mask)
    tl.atomic_add(counts_ptr + tl.arange(0, BINS), counts)


def test_softmax(target, generator):
    x = torch.randn(19, 781, generator=generator)
    out = torch.empty_like(x)
    with deepkern.compiled(target):
        softmax_kernel[(4,)](x, out, 19, 781, BLOCK=1024)
    torch.testing.assert_close(out.double(), x.double().softmax(1), rtol=1e-5, atol=1e-9)


def test_layer_norm(target, generator):
    x = torch.randn(5, 1151, generator=generator).half() + 0.5
    weight, bias = torch.randn(2, 1151, generator=generator)
    out = torch.empty_like(x)
    with deepkern.compiled(target):
        layer_norm_kernel[(5,)](x, weight, bias, out, 1151, 1e-5, BLOCK=512)
    want = F.layer_norm(x.double(), (1151,), weight.double(), bias.double(), 1e-5)
    torch.testing.assert_close(out.double(), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("warps", [4, 8])
def test_matmul(target, warps, generator):
    M, N, K = 150, 72, 200
    a = torch.randn(M, K, generator=generator).half()
    b = torch.randn(K, N, generator=generator).half()
    c = torch.empty(M, N, dtype=torch.float16)
    with deepkern.compiled(target):
        matmul_kernel[(3 * 2,)](
            a, b, c, M, N, K, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, GROUP=2,
            num_warps=warps, num_stages=3,
        )  # fmt: skip
    want = F.leaky_relu(a.double() @ b.double())
    torch.testing.assert_close(c.double(), want, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("order", ["earliest", "latest"])
def test_persistent_matmul_with_descriptors(target, order, generator):
    M, N, K = 150, 72, 320
    a = torch.randn(M, K, generator=generator).bfloat16()
    b = torch.randn(N, K, generator=generator).bfloat16()
    c = torch.empty(M, N, dtype=torch.bfloat16)
    a_desc, b_desc, c_desc = (TensorDescriptor.from_tensor(x, [64, 64]) for x in (a, b, c))
    with deepkern.compiled(target, order=order):
        descriptor_matmul_kernel[(2,)](
            a_desc, b_desc, c_desc, M, N, K, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, num_stages=3
        )
    torch.testing.assert_close(c.double(), a.double() @ b.double().T, rtol=1e-2, atol=1e-2)


def test_descriptors_made_by_the_kernel(target, generator):
    x = torch.randn(40, 72, generator=generator)
    out = torch.empty(72, 40)
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8))
    with deepkern.compiled(target):
        transposing_kernel[(2, 3)](x, out, 40, 72, ROWS=32, COLUMNS=32)
    assert torch.equal(out, x.T)


def test_histogram_with_atomics(target, generator):
    x = torch.randint(0, 60, (1000,), generator=generator, dtype=torch.int32)
    counts = torch.zeros(64, dtype=torch.int32)
    last = torch.full((64,), -1, dtype=torch.int32)
    with deepkern.compiled(target):
        histogram_kernel[(4,)](x, counts, last, 1000, BINS=64, BLOCK=256)
    assert torch.equal(counts, torch.bincount(x, minlength=64).int())
    want = [max((i for i, value in enumerate(x.tolist()) if value == b), default=-1)
            for b in range(64)]  # fmt: skip
    assert last.tolist() == want
