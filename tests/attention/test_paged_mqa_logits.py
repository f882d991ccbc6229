"""paged_mqa_logits: against mqa_logits over gathered keys, pages and lengths of every kind.

Tokens of the cache outside all sequences are NaN, and unused table entries are 2147480000.
"""

from __future__ import annotations

import math

import pytest
import torch

import deepkern
from deepkern.runtime import arch
from deepkern.testing import caches, compare, ops

FP8 = torch.float8_e4m3fn
INT32_MAX = 2**31 - 1


def check(args: tuple) -> torch.Tensor:
    """The output of the selected backend, compared with the reference."""
    got = deepkern.paged_mqa_logits(*args)
    compare.assert_matches("paged_mqa_logits", got, deepkern.reference.paged_mqa_logits(*args))
    return got


@pytest.mark.parametrize("each", [False, True])
def test_against_the_formula(backend, each, generator):
    """Keys and scales are read from the bytes of their page."""
    args = ops.inputs(
        "paged_mqa_logits", generator, (11, 5), next_n=2, H=3, D=16, page=4, width=3, each=each
    )
    q, cache, weights, lengths, table, width = args
    want = torch.full((4, width), -math.inf, dtype=torch.float64, device=q.device)
    for b in range(2):
        for j in range(2):
            limit = int(lengths[b, j] if each else lengths[b] - 1 + j)
            for n in range(limit):
                page = cache[int(table[b, n // 4])].flatten()
                key = page[n % 4 * 16 : n % 4 * 16 + 16].view(FP8).double()
                scale = page[64 + n % 4 * 4 : 68 + n % 4 * 4].view(torch.float32).double()
                products = (q[b, j].double() @ key).clamp(min=0)
                want[b * 2 + j, n] = scale * (weights[b * 2 + j].double() @ products)
    compare.assert_close(deepkern.paged_mqa_logits(*args), want, op="paged_mqa_logits")


@pytest.mark.parametrize("page", [1, 2, 16, 53, 64, 576])
@pytest.mark.parametrize("next_n", [1, 2, 3])
def test_pages_and_new_queries(kernel_backend, page, next_n, generator):
    check(ops.inputs("paged_mqa_logits", generator, (0, 20, 140), next_n, H=3, D=32, page=page))


@pytest.mark.parametrize("H", [1, 9, 64, 130])
@pytest.mark.parametrize("D", [1, 128, 130])
def test_heads_and_widths(kernel_backend, H, D, generator):
    check(ops.inputs("paged_mqa_logits", generator, (70, 3), 2, H=H, D=D, page=16))


@pytest.mark.parametrize("length", [511, 512, 513, 600])
def test_edges_of_chunks(kernel_backend, length, generator):
    check(ops.inputs("paged_mqa_logits", generator, (length,), H=2, D=16, width=700))


def test_fewer_columns_than_tokens(backend, generator):
    *args, width = ops.inputs("paged_mqa_logits", generator, (90, 30), 2, H=2, D=16, page=16)
    all_columns = check((*args, width))
    for width in (0, 1, 64, 89):
        compare.assert_bitwise(check((*args, width)), all_columns[:, :width])


def test_more_new_queries_than_tokens(backend, generator):
    args = ops.inputs("paged_mqa_logits", generator, (2, 0), 4, H=3, D=16, page=16)
    num_visible = (~check(args).isneginf()).sum(1)
    assert num_visible.tolist() == [0, 0, 1, 2, 0, 0, 0, 0]


@pytest.mark.parametrize("hostile", [-1, -INT32_MAX - 1, INT32_MAX, "num_pages", caches.ABSENT])
def test_hostile_pages_are_not_visible(backend, hostile, generator):
    args = ops.inputs("paged_mqa_logits", generator, (60, 9), H=2, D=16, page=16)
    q, cache, weights, lengths, table, width = args
    want = check(args)
    hostile_table = table.clone()
    hostile_table[0, 1] = cache.shape[0] if hostile == "num_pages" else hostile
    got = check((q, cache, weights, lengths, hostile_table, width))
    want[0, 16:32] = -math.inf
    compare.assert_bitwise(got, want)


@pytest.mark.parametrize("each", [False, True])
def test_hostile_lengths_are_clamped(backend, each, generator):
    q, cache, weights, lengths, table, _ = ops.inputs(
        "paged_mqa_logits", generator, (32, 32, 32), 2, H=2, D=16, page=16, each=each
    )
    table = table[:, :2]  # 32 tokens
    hostile = torch.tensor([-5, INT32_MAX, -INT32_MAX - 1], dtype=torch.int32, device=q.device)
    clamped = hostile.clamp(0, 32)
    if each:
        hostile, clamped = hostile[:, None].expand(3, 2).clone(), clamped[:, None].expand(3, 2)
    got = check((q, cache, weights, hostile, table, 40))
    want = deepkern.paged_mqa_logits(q, cache, weights, clamped.contiguous(), table, 40)
    compare.assert_bitwise(got, want)


def test_random_tables_and_lengths(kernel_backend, generator):
    """Values of every magnitude, under the memory-checking interpreter."""
    q, cache, weights, lengths, table, _ = ops.inputs(
        "paged_mqa_logits", generator, (40,) * 6, 2, H=2, D=16, page=8
    )
    for limit in (50, 2**31 - 1):
        for x in (lengths, table):
            random = torch.randint(-limit, limit, x.shape, generator=generator, device=x.device)
            x.copy_(random)
        check((q, cache, weights, lengths, table, 70))


def test_sequence_bits_independent_of_batch(backend, generator):
    args = ops.inputs("paged_mqa_logits", generator, (600, 3, 77), 2, H=64, D=128)
    q, cache, weights, lengths, table, width = args
    together = deepkern.paged_mqa_logits(*args)
    for b in range(3):
        one, rows = slice(b, b + 1), slice(2 * b, 2 * b + 2)
        alone = deepkern.paged_mqa_logits(
            q[one], cache, weights[rows], lengths[one], table[one], width
        )
        compare.assert_bitwise(alone, together[rows])


def test_same_bits_as_mqa_logits(backend, generator):
    """For one sequence with consecutive pages."""
    kv = torch.randn(128, 32, generator=generator, device=generator.device)
    cache = caches.empty_indexer_cache(generator, 2, 64, 32)
    slots = torch.arange(128, device=kv.device)
    deepkern.indexer_cache_append(kv, cache, slots)
    q, _, weights, *_ = ops.inputs("paged_mqa_logits", generator, (5,), 2, H=4, D=32)
    lengths, table = torch.tensor([128]).int().to(kv.device), torch.tensor([[0, 1]]).int()
    got = deepkern.paged_mqa_logits(q, cache, weights, lengths, table.to(kv.device), 128)
    kv8, scale = deepkern.reference.cast_per_token(kv)
    ends = torch.tensor([127, 128], dtype=torch.int32, device=kv.device)
    want = deepkern.mqa_logits(q[0], kv8, scale[:, 0], weights, ends - ends, ends)
    compare.assert_bitwise(got, want)


def test_targets_without_native_fp8(generator):
    args = ops.inputs("paged_mqa_logits", generator, (70,), 2, H=3, D=32, page=16)
    for target in ("sm_80", "gfx942"):
        with arch.compile_for(arch.ARCHS[target]), deepkern.backend("triton"):
            check(args)


def test_errors(generator, monkeypatch):
    args = ops.inputs("paged_mqa_logits", generator, (30,), 2, H=1, D=16, page=16)
    q, cache, weights, lengths, table, width = args
    name = "paged_mqa_logits"
    for argument, expected, changed in (
        ("cache", "last dimension 20", (q, cache[..., :-1], weights, lengths, table, width)),
        ("weights", "B \\* next_n = 2 rows", (q, cache, weights[:1], lengths, table, width)),
        ("context_lens", "shape", (q, cache, weights, lengths[:, None], table, width)),
        ("max_context_len", "a number from 0", (q, cache, weights, lengths, table, -1)),
    ):
        with pytest.raises(ValueError, match=f"{name}: {argument}: expected {expected}"):
            deepkern.paged_mqa_logits(*changed)
    monkeypatch.setenv("DEEPKERN_DEBUG", "1")
    with pytest.raises(ValueError, match=f"{name}: context_lens: expected lengths in"):
        deepkern.paged_mqa_logits(q, cache, weights, lengths + 64, table, width)
    with pytest.raises(ValueError, match=f"{name}: block_table: expected pages in"):
        deepkern.paged_mqa_logits(q, cache, weights, lengths, table - 100, width)


@pytest.mark.gpu
@pytest.mark.parametrize("H", [1, 8, 32, 64, 128])
@pytest.mark.parametrize("page", [1, 16, 53, 64, 576])
@pytest.mark.parametrize("next_n", [1, 2, 4])
def test_big_batches(H, page, next_n, generator):
    """Bound 5e-6, as in DeepGEMM's tests: tensor cores sum FP8 products in less than fp32."""
    lengths = [n * (i % 2) for n in (20, 140, 8192) for i in range(4)]
    args = ops.inputs("paged_mqa_logits", generator, lengths, next_n, H=H, page=page)
    with deepkern.backend("triton"):
        got = deepkern.paged_mqa_logits(*args)
    want = deepkern.reference.paged_mqa_logits(*args)
    compare.assert_close(got, want, dtype=torch.bfloat16)
