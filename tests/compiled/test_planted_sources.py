"""Bugs planted in the source of small Triton kernels are found; without the bug they pass."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl

import deepkern

pytestmark = pytest.mark.proof
ORDERS = ("random", "earliest", "latest")
SEEDS = 4


@triton.jit
def add(x, y, out, n, BUG: tl.constexpr, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    if BUG == "no mask of the store":
        tl.store(out + i, tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n))
    elif BUG == "no mask of the load":
        tl.store(out + i, tl.load(x + i) + tl.load(y + i), mask=i < n)
    elif BUG == "mask with <=":
        tl.store(out + i, tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n), mask=i <= n)
    elif BUG == "programs overlap":
        j = tl.program_id(0) * (B // 2) + tl.arange(0, B)
        tl.store(out + j, tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n), mask=j < n)
    else:
        tl.store(out + i, tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n), mask=i < n)


def run_add(generator: torch.Generator, bug: str) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = (torch.randn(500, generator=generator) for _ in range(2))
    out = torch.full((500,), torch.nan)
    add[(2,)](x, y, out, 500, BUG=bug, B=256)
    return out, x + y


@triton.jit
def total(x, out, n, BUG: tl.constexpr, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    part = tl.sum(tl.load(x + i, mask=i < n, other=0.0), axis=0)
    if BUG == "no atomic":
        tl.store(out, tl.load(out) + part)
    else:
        tl.atomic_add(out, part)


def run_total(generator: torch.Generator, bug: str) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randint(-9, 9, (500,), generator=generator).float()
    out = torch.zeros(1)
    total[(4,)](x, out, 500, BUG=bug, B=128)
    return out, x.sum()[None]


@triton.jit
def reverse(x, scratch, out, BUG: tl.constexpr, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(scratch + i, tl.load(x + i))
    if BUG != "no debug_barrier":
        tl.debug_barrier()
    tl.store(out + i, tl.load(scratch + B - 1 - i))


def run_reverse(generator: torch.Generator, bug: str) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(256, generator=generator)
    scratch, out = torch.full((256,), torch.nan), torch.full((256,), torch.nan)
    reverse[(1,)](x, scratch, out, BUG=bug, B=256)
    return out, x.flip(0)


@triton.jit
def hand_over(x, data, flag, out, BUG: tl.constexpr, B: tl.constexpr):
    i = tl.arange(0, B)
    if tl.program_id(0) == 0:
        tl.store(data + i, tl.load(x + i) * 2)
        tl.debug_barrier()
        if BUG == "relaxed release":
            tl.atomic_xchg(flag, 1, sem="relaxed")
        else:
            tl.atomic_xchg(flag, 1, sem="release")
    else:
        if BUG == "relaxed acquire":
            while tl.atomic_add(flag, 0, sem="relaxed") == 0:
                pass
        elif BUG != "no wait for the flag":
            while tl.atomic_add(flag, 0, sem="acquire") == 0:
                pass
        tl.debug_barrier()
        tl.store(out + i, tl.load(data + i))


def run_hand_over(generator: torch.Generator, bug: str) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(128, generator=generator)
    data, out = torch.full((128,), torch.nan), torch.full((128,), torch.nan)
    hand_over[(2,)](x, data, torch.zeros(1, dtype=torch.int32), out, BUG=bug, B=128)
    return out, x * 2


@triton.jit
def matmul(
    a, b, c, M, N, K, BUG: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    group = 2 * columns
    first = tl.program_id(0) // group * 2
    height = min(rows - first, 2)
    if BUG == "swizzle without the last group's height":
        height = 2
    m = first + tl.program_id(0) % group % height
    n = tl.program_id(0) % group // height
    i, j = m * BM + tl.arange(0, BM), n * BN + tl.arange(0, BN)
    stride = N if BUG == "wrong stride" else K
    end = K - BK if BUG == "K loop ends early" else K
    if BUG == "K loop ends late":
        end = K + BK
    accumulator = tl.zeros((BM, BN), tl.float32)
    for k in range(0, end, BK):
        l = k + tl.arange(0, BK)
        x = tl.load(a + i[:, None] * stride + l[None, :], mask=i[:, None] < M, other=0.0)
        y = tl.load(b + l[:, None] * N + j[None, :], mask=j[None, :] < N, other=0.0)
        accumulator = tl.dot(x, y, accumulator)
    tl.store(c + i[:, None] * N + j, accumulator, mask=(i[:, None] < M) & (j[None, :] < N))


def run_matmul(generator: torch.Generator, bug: str) -> tuple[torch.Tensor, torch.Tensor]:
    M, N, K = 48, 32, 64
    a = torch.randint(-4, 4, (M, K), generator=generator).bfloat16()
    b = torch.randint(-4, 4, (K, N), generator=generator).bfloat16()
    c = torch.full((M, N), torch.nan)
    matmul[(6,)](a, b, c, M, N, K, BUG=bug, BM=16, BN=16, BK=32)
    return c, a.float() @ b.float()


BOUNDS, RACE, VALUE = "out of bounds", "race: ", "wrong value"
Run = Callable[[torch.Generator, str], tuple[torch.Tensor, torch.Tensor]]
BUGS: list[tuple[Run, str, str]] = [
    (run_add, "no mask of the store", BOUNDS),
    (run_add, "no mask of the load", BOUNDS),
    (run_add, "mask with <=", BOUNDS),
    (run_add, "programs overlap", RACE),
    (run_total, "no atomic", RACE),
    (run_reverse, "no debug_barrier", RACE),
    (run_hand_over, "relaxed release", RACE),
    (run_hand_over, "relaxed acquire", RACE),
    (run_hand_over, "no wait for the flag", RACE),
    (run_matmul, "wrong stride", f"{VALUE}|{BOUNDS}"),
    (run_matmul, "K loop ends early", VALUE),
    (run_matmul, "K loop ends late", f"{VALUE}|{BOUNDS}"),
    (run_matmul, "swizzle without the last group's height", f"{VALUE}|{RACE}|{BOUNDS}"),
]
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120")


def search(run: Run, bug: str, target: str, seed: int) -> str | None:
    """The first fault over some seeds and all orders, or None."""
    for s in range(seed, seed + SEEDS):
        for order in ORDERS:
            generator = torch.Generator().manual_seed(s)
            try:
                with deepkern.compiled(target, seed=s, order=order, max_instructions=10**6):
                    got, want = run(generator, bug)
            except deepkern.KernelFailure as failure:
                return str(failure)
            if not torch.equal(got, want):
                return VALUE
    return None


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("run", "bug", "report"), BUGS, ids=[bug for _, bug, _ in BUGS])
def test_planted_bug_is_found(run: Run, bug: str, report: str, target: str, seed: int):
    fault = search(run, bug, target, seed)
    assert fault is not None, "nothing reports the bug"
    assert re.search(report, fault), fault


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("run", list(dict.fromkeys(run for run, _, _ in BUGS)))
def test_kernel_without_the_bug_passes_the_search(run: Run, target: str, seed: int):
    assert search(run, "", target, seed) is None
