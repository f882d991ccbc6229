"""topk_indices: against torch.topk and sorted pairs; ties, special values, one or more programs."""

from __future__ import annotations

import math

import pytest
import torch

import deepkern
from deepkern.attention.topk_indices import topk_indices_maxima_kernel
from deepkern.runtime import native
from deepkern.testing import compare, ops

INT32_MAX = 2**31 - 1


@pytest.fixture(params=["torch", "triton", "cpu"])
def backend(request, device):
    """Each backend in turn, including native CPU code."""
    if request.param == "cpu" and device.type != "cpu":
        pytest.skip("the cpu backend needs CPU tensors")
    if request.param == "cpu" and native.native_op("topk_indices") is None:
        pytest.skip(native.missing_reason() or "deepkern._C was built without topk_indices")
    with deepkern.backend(request.param):
        yield request.param


def check(logits, k, lengths=None) -> torch.Tensor:
    """The output of the selected backend, compared with the reference."""
    got = deepkern.topk_indices(logits, k, lengths)
    compare.assert_bitwise(got, deepkern.reference.topk_indices(logits, k, lengths))
    return got


def by_sorted_pairs(row: list[float], k: int) -> list[int]:
    """The indices by Python's order of (value, -index), NaN as -inf."""
    pairs = sorted((-math.inf if x != x else x, -n) for n, x in enumerate(row))
    best = sorted(-n for _, n in pairs[::-1][:k])
    return best + [-1] * (k - len(best))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 7, 40, 64])
def test_against_sorted_pairs(backend, dtype, k, generator):
    logits, _, lengths = ops.inputs("topk_indices", generator, 6, 50, k, dtype, ragged=True)
    logits[1, ::3], logits[2, ::2], logits[3, 5:9] = math.nan, -math.inf, math.inf
    got = check(logits, k, lengths)
    for row, length, indices in zip(logits.tolist(), lengths.tolist(), got.tolist(), strict=True):
        assert indices == by_sorted_pairs(row[:length], k)


@pytest.mark.parametrize(
    ("N", "k"),
    [(1000, 64), (4096, 4096), (4097, 4096), (5000, 2048), (8192, 1), (20000, 100), (140000, 2048)],
)
def test_against_torch_topk(backend, N, k, generator):
    """One program per row, or several: up to 4096 values and more, one or two chunks each."""
    logits = torch.randn(2, N, generator=generator, device=generator.device)
    got = check(logits, k).long()
    want = logits.topk(k).values
    assert torch.equal(logits.gather(1, got).sort(1, descending=True).values, want)


def test_ties_select_the_lower_index(backend, generator):
    N, k = 40000, 3000
    logits = torch.zeros(4, N, device=generator.device)
    logits[1] = 5.5  # all equal
    logits[2, ::3] = -0.0  # equal to 0.0
    logits[3, 17000:] = 1.0  # ties in several chunks
    logits[3, 39999] = 2.0
    got = check(logits, k)
    first = torch.arange(k, dtype=torch.int32, device=logits.device)
    for row in range(3):
        assert torch.equal(got[row], first)
    assert torch.equal(got[3, :-1], 17000 + first[:-1]) and got[3, -1] == 39999


def test_ties_at_the_edges_of_chunks(backend, device):
    """Chunks have 4096 values. Of equal values on both sides of an edge the first are selected."""
    edges = torch.tensor([0, 4095, 4096, 8191, 8192, 12287, 12288, 12292], device=device)
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.full((1, 12293), -1.0, device=device, dtype=dtype)
        logits[0, edges] = 0.5
        for k in range(1, 9):
            assert torch.equal(check(logits, k)[0], edges[:k].int())
        logits[0, 4096], logits[0, 12288] = 0.75, 1.0
        assert check(logits, 3).tolist() == [[0, 4096, 12288]]
        assert check(logits, 9).tolist() == [[0, 1, *edges[1:].tolist()]]  # and the first -1


def group_of(column: torch.Tensor) -> torch.Tensor:
    """The kernel's group of a column: of 1024, in another place of each 1024 columns."""
    return (column - column // 1024 * 256) % 1024


def test_maxima_of_groups(generator):
    """A row with period 1024: the largest values are in all groups, not in a few."""
    N, device = 9 * 1024 + 300, generator.device
    logits = torch.randn(1024, generator=generator, device=device).repeat(10)[None, :N]
    maxima = torch.empty(1, 1024, dtype=torch.int64, device=device)
    num_candidates = torch.ones(1, dtype=torch.int32, device=device)
    topk_indices_maxima_kernel[(4,)](
        logits, None, N, N, maxima, num_candidates, GROUPS=1024, GROUPS_PER_PROGRAM=256
    )
    group = group_of(torch.arange(N, device=device))
    want = torch.full((1024,), -math.inf, device=device).scatter_reduce(0, group, logits[0], "amax")
    column = 2**30 - 1 - maxima[0] % 2**30
    assert torch.equal(group_of(column), torch.arange(1024, device=device))
    assert torch.equal(logits[0, column], want)
    assert (want[:256] == want.view(4, 256)).all()
    assert num_candidates.item() == 0


@pytest.mark.parametrize("ties", [False, True])
def test_list_longer_than_the_registers(backend, ties, generator):
    """The kernel's worst case: the values of k of its 1024 groups are above the bound of the list.

    In row 0 one of these groups has only 1, so the bound is at most 1. In row 1 they start with the
    largest values.
    """
    N, k, device = 20000, 500, generator.device
    logits = torch.randn(2, N, generator=generator, device=device) - 100
    group = group_of(torch.arange(N, device=device))
    strong = group < k
    values = torch.rand(2, N, generator=generator, device=device) + 1.0
    logits[:, strong] = (values.mul(3).round() if ties else values)[:, strong]
    logits[:, group == 7] = 1.0
    logits[1, :1024][strong[:1024]] = 5.0
    check(logits, k)
    check(logits, k, torch.tensor([19000, 9000], dtype=torch.int32, device=device))


def test_sorted_rows(backend, generator):
    """The largest values are the last or the first members of all groups."""
    ascending = torch.randn(1, 20000, generator=generator, device=generator.device).sort().values
    check(torch.cat([ascending, ascending.flip(1)]), 100)


@pytest.mark.parametrize("order", ["reverse", "random:3"])
def test_any_order_of_programs(order, generator, monkeypatch):
    """The order of the list depends on that of the programs; the result does not."""
    logits, k, lengths = ops.inputs("topk_indices", generator, 2, 20000, 900, ragged=True)
    with deepkern.backend("triton"):
        want = check(logits, k, lengths)
        monkeypatch.setenv("DEEPKERN_INTERPRETER_ORDER", order)
        compare.assert_bitwise(check(logits, k, lengths), want)


@pytest.mark.parametrize("N", [3000, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_bits(backend, dtype, N, generator):
    """Values of every magnitude and sign, with subnormals, NaN and inf."""
    bits = torch.randint(-(2**31), 2**31, (3, N), generator=generator, device=generator.device)
    logits = bits.int().view(dtype)[:, :N]
    for k in (1, 100, 2999):
        check(logits, k)
    check(-logits.abs(), 100)
    small = (bits % 7).int().view(torch.float32)  # subnormal, and many equal
    check(small.to(dtype), 100)


def test_special_rows(backend, generator):
    device = generator.device
    logits = torch.tensor([math.nan, -math.inf, -1.0, math.inf, 0.0], device=device)
    assert check(logits[None], 3).tolist() == [[2, 3, 4]]
    assert check(logits[None], 4).tolist() == [[0, 2, 3, 4]]  # NaN and -inf tie
    all_neg_inf = torch.full((2, 20000), -math.inf, device=device)
    assert torch.equal(check(all_neg_inf, 5), torch.arange(5, device=device).int().expand(2, 5))
    assert check(logits[None], 7).tolist() == [[0, 1, 2, 3, 4, -1, -1]]


def test_hostile_lengths_are_clamped(backend, generator):
    logits = torch.randn(6, 17000, generator=generator, device=generator.device)
    lengths = torch.tensor([-1, -INT32_MAX - 1, 0, 3, 17001, INT32_MAX], dtype=torch.int32).to(
        logits.device
    )
    logits[3, 3:] = math.nan  # past the length
    got = check(logits, 50, lengths)
    assert (got[:3] == -1).all() and (got[4:] >= 0).all()
    assert got[3].tolist() == [0, 1, 2] + [-1] * 47


def test_values_past_the_length_are_ignored(backend, generator):
    logits = torch.randn(2, 40000, generator=generator, device=generator.device)
    lengths = torch.tensor([100, 30000], dtype=torch.int32, device=logits.device)
    clean = check(logits, 2048, lengths)
    for row, length in enumerate(lengths.tolist()):
        logits[row, length:] = math.inf
    compare.assert_bitwise(check(logits, 2048, lengths), clean)


@pytest.mark.parametrize("N", [3000, 9000])
def test_row_bits_independent_of_others(backend, N, generator):
    logits, k, lengths = ops.inputs("topk_indices", generator, 5, N, 300, ragged=True)
    together = deepkern.topk_indices(logits, k, lengths)
    for s in range(5):
        alone = deepkern.topk_indices(logits[s : s + 1], k, lengths[s : s + 1])
        compare.assert_bitwise(alone[0], together[s])


def test_strides(backend, generator):
    wide = torch.randn(3, 70, generator=generator, device=generator.device)
    check(wide[:, 5:60], 9)
    check(wide[:, :1].expand(3, 1), 2)


def test_errors(generator, monkeypatch):
    logits, k, lengths = ops.inputs("topk_indices", generator, 3, 20, 4, ragged=True)
    for wrong in (-1, 4097):
        with pytest.raises(ValueError, match="topk_indices: k: expected a number from 0 to 4096"):
            deepkern.topk_indices(logits, wrong)
    monkeypatch.setenv("DEEPKERN_DEBUG", "1")
    with pytest.raises(ValueError, match="topk_indices: lengths: expected lengths in"):
        deepkern.topk_indices(logits, k, lengths + 21)


@pytest.fixture
def native_op(isa):
    """The native op without dispatch, under each instruction set."""
    op = native.native_op("topk_indices")
    if op is None:
        pytest.skip("deepkern._C was built without topk_indices")
    return op


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "k"), [(31, 5), (4096, 1), (5000, 64), (30000, 300), (60000, 2048)])
def test_native_code(native_op, dtype, N, k, seed):
    """Rows longer and shorter than the sample, ragged, sorted or not."""
    generator = torch.Generator().manual_seed(seed)
    logits, _, lengths = ops.inputs("topk_indices", generator, 4, N, k, dtype, ragged=True)
    logits[1], logits[2, ::5] = logits[1].sort().values, math.nan
    for row_lengths in (None, lengths):
        want = deepkern.reference.topk_indices(logits, k, row_lengths)
        compare.assert_bitwise(native_op(logits, k, row_lengths), want)


def test_native_code_with_a_biased_sample(native_op, seed):
    """The sample holds the largest values, fewer than k, so all values are collected again."""
    N, k, random, sampled = 131072, 2048, 1, []
    for i in range(1024):
        random = (random * 1664525 + 1013904223) % 2**32
        sampled.append(i * (N // 1024) + (random >> 8) % (N // 1024))
    logits = torch.randn(1, N, generator=torch.Generator().manual_seed(seed))
    logits[0, sampled] += 100.0
    want = deepkern.reference.topk_indices(logits, k)
    compare.assert_bitwise(native_op(logits, k, None), want)
    logits[0, sampled] -= 200.0  # now the smallest values: nearly all values are collected
    want = deepkern.reference.topk_indices(logits, k)
    compare.assert_bitwise(native_op(logits, k, None), want)


@pytest.mark.gpu
@pytest.mark.parametrize("N", [1, 2048, 16384, 16385, 131072, 2**20, 2**21 + 7])
@pytest.mark.parametrize("S", [1, 3, 64])
@pytest.mark.parametrize("k", [1, 512, 2048, 4096])
def test_long_rows(S, N, k, generator):
    logits = torch.randn(S, N, generator=generator, device=generator.device)
    with deepkern.backend("triton"):
        got = deepkern.topk_indices(logits, k)
    count = min(k, N)
    indices = got[:, :count].long()
    assert (indices.diff(dim=1) > 0).all() and (got[:, count:] == -1).all()
    values = logits.gather(1, indices).sort(1, descending=True).values
    assert torch.equal(values, logits.topk(count).values)
