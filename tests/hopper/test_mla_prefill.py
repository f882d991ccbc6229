"""csrc/sm90/mla_prefill.cuh in the emulator against float64."""

from __future__ import annotations

import pytest
import torch

import deepkern
from bench.emulator import ORDERS, build, sources
from deepkern.testing import compare

from .prefill import PrefillFunction, operands, prefill_of

pytestmark = pytest.mark.slow  # compiles the emulator
causals = pytest.mark.parametrize("causal", [True, False], ids=["causal", "all keys"])


@pytest.fixture(scope="session")
def prefill() -> PrefillFunction:
    return prefill_of(build(sources()))


def check(prefill: PrefillFunction, args: tuple, **how) -> tuple[torch.Tensor, torch.Tensor]:
    got, want = prefill(*args, **how), deepkern.reference.mla_prefill(*args)
    compare.assert_matches("mla_prefill", got, want)
    return got


def assert_same(got: tuple, want: tuple, label: str) -> None:
    for mine, other, name in zip(got, want, ("out", "lse"), strict=True):
        compare.assert_bitwise(mine, other, f"{name} {label}")


@causals
@pytest.mark.parametrize("seed", range(2))
def test_lengths_around_a_tile(prefill, causal, seed, generator):
    """Sequences that end before, at and after a tile; without queries, without keys; queries that
    see no key; NaN in the rows outside all sequences."""
    lengths, keys = (1, 127, 128, 129, 0, 64, 300), (1, 140, 128, 20, 7, 0, 300)
    if seed:
        lengths, keys = (257, 3, 200), (513, 260, 65)
    args = operands(generator, lengths, keys, causal=causal, unused=2)
    check(prefill, args, seed=generator.seed())


@pytest.mark.parametrize(("H", "Hk"), [(1, 1), (6, 2), (5, 1)])
@pytest.mark.parametrize("heads_per_group", [1, 4])
def test_heads_and_their_order(prefill, H, Hk, heads_per_group, generator):
    """Groups of heads do not change a result; the last group has fewer heads."""
    args = operands(generator, (150, 70), H=H, Hk=Hk)
    got = check(prefill, args, heads_per_group=heads_per_group, blocks=4)
    assert_same(prefill(*args, heads_per_group=H, blocks=1), got, "one block")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("seeds", [2, pytest.param(50, marks=pytest.mark.proof)])
def test_same_bits_for_any_schedule(prefill, order, seeds, generator):
    args = operands(generator, (300, 20), (450, 30), H=1)
    first = check(prefill, args, order=order)
    for seed in range(1, seeds if order == "random" else min(seeds, 3)):
        assert_same(prefill(*args, order=order, seed=seed, blocks=1 + seed % 3), first, f"{seed}")


@causals
def test_bits_independent_of_other_sequences(prefill, causal, generator):
    q, k, v, cu_q, cu_k, *rest = operands(generator, (37, 200, 5), (50, 270, 3), causal=causal)
    out, lse = prefill(q, k, v, cu_q, cu_k, *rest)
    for b in range(3):
        rows, keys = slice(*cu_q[b : b + 2].tolist()), slice(*cu_k[b : b + 2].tolist())
        ends = [torch.tensor([0, len(x)], dtype=torch.int32) for x in (q[rows], k[keys])]
        got = prefill(q[rows], k[keys], v[keys], *ends, *rest)
        assert_same(got, (out[rows], lse[:, rows]), f"sequence {b}")


def test_hostile_boundaries(prefill, generator):
    """Descending, negative and huge boundaries, and more than 32 of them."""
    q, k, v, _, _, *rest = operands(generator, (300,), (280,), H=1)
    for case in ([5, 2, 100, 400], [-7, 2**31 - 1, -(2**31), 9], [300, 0, 0, 300], [0], [50, 250]):
        other = [*case[1:], case[0]]
        cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in (case, other))
        check(prefill, (q, k, v, cu_q, cu_k, *rest))
    many = torch.randint(-5, 320, (100,), generator=generator, dtype=torch.int32)
    check(prefill, (q, k, v, many.sort().values, many[torch.randperm(100)], *rest))


def test_strides(prefill, generator):
    """Heads that are parts of wider rows."""
    q, k, v, *rest = operands(generator, (150,), H=3)
    wide = []
    for x in (q, k, v):
        heads = torch.full((150, 4, x.shape[2] + 8), torch.nan, dtype=torch.bfloat16)
        heads[:, :3, 8:] = x
        wide.append(heads[:, :3, 8:])
    got = check(prefill, (*wide, *rest))
    assert_same(got, prefill(q, k, v, *rest), "of contiguous tensors")


def test_scores_of_any_size(prefill, generator):
    q, k, v, cu_q, cu_k, _, causal = operands(generator, (200, 90), H=1)
    for scale in (0.0, 0.07, 30.0):
        check(prefill, (q, k, v, cu_q, cu_k, scale, causal))


@pytest.mark.parametrize("special", [torch.nan, torch.inf])
def test_nan_and_inf_do_not_spread(prefill, special, generator):
    """A query affects its row, a key and a value their sequence, which shares tiles with others."""
    q, k, v, *rest = operands(generator, (150, 90), H=1)
    want = check(prefill, (q, k, v, *rest))
    bad = q.clone()
    bad[7, 0, 3] = special
    out, lse = check(prefill, (bad, k, v, *rest))
    assert out[7].isnan().all() and lse[0, 7].isnan()
    for x in (k, v):
        bad = x.clone()
        bad[150:] = special
        out, lse = prefill(q, *((bad, v) if x is k else (k, bad)), *rest)
        assert_same((out[:150], lse[:, :150]), (want[0][:150], want[1][:, :150]), "sequence 0")
        assert out[150:].isfinite().sum() == 0


def test_error_at_most_twice_plain_pytorch(prefill, generator):
    """Plain PyTorch: scores and softmax in fp32, P in bf16."""
    args = operands(generator, (400,), H=2, causal=False)
    q, k, v, *_, scale, _ = args
    heads = [x.transpose(0, 1).float() for x in (q, k, v)]
    p = (heads[0] @ heads[1].mT * scale).softmax(-1).bfloat16().float()
    plain = (p @ heads[2]).transpose(0, 1).bfloat16()
    exact = deepkern.reference.mla_prefill(*args)[0]
    assert compare.diff(prefill(*args)[0], exact) <= 2 * compare.diff(plain, exact)
