"""csrc/sm90/mla_prefill_dq.cuh and mla_prefill_dkv.cuh in the emulator against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import deepkern
from bench.emulator import ORDERS, build, sources
from deepkern.testing import compare

from .prefill import backward_of, backward_operands

pytestmark = pytest.mark.slow  # compiles the emulator
GRADIENTS = ("grad_q", "grad_k", "grad_v")


@pytest.fixture(scope="session")
def backward() -> Callable:
    return backward_of(build(sources()))


def check(backward: Callable, args: tuple, **how) -> tuple[torch.Tensor, ...]:
    got, want = backward(*args, **how), deepkern.reference.mla_prefill_backward(*args)
    compare.assert_matches("mla_prefill_backward", got, want)
    return got


def assert_same(got: tuple, want: tuple, label: str) -> None:
    for mine, other, name in zip(got, want, GRADIENTS, strict=True):
        compare.assert_bitwise(mine, other, f"{name} {label}")


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all keys"])
def test_lengths_around_a_tile(backward, causal, generator):
    """Ends before, at and after a tile; without queries or keys; NaN outside all sequences."""
    args = backward_operands(
        generator, (1, 127, 129, 0, 64, 20), (3, 200, 64, 7, 0, 330), with_lse=causal,
        H=1, causal=causal, unused=2,
    )  # fmt: skip
    check(backward, args, seed=generator.seed())


@pytest.mark.parametrize(("H", "Hk"), [(3, 3), (4, 2)])
def test_heads_and_their_order(backward, H, Hk, generator):
    """Queries of several heads add to one key; groups of heads do not change a result."""
    args = backward_operands(generator, (150, 70), H=H, Hk=Hk)
    got = check(backward, args, heads_per_group=1, blocks=4)
    assert_same(backward(*args, blocks=1), got, "one block")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("seeds", [2, pytest.param(50, marks=pytest.mark.proof)])
def test_same_bits_for_any_schedule(backward, order, seeds, generator):
    args = backward_operands(generator, (140, 20), (260, 30), H=1)
    first = check(backward, args, order=order)
    for seed in range(1, seeds if order == "random" else 2):
        assert_same(backward(*args, order=order, seed=seed, blocks=1 + seed % 3), first, f"{seed}")


def test_bits_independent_of_other_sequences(backward, generator):
    grad_out, q, k, v, out, lse, cu_q, cu_k, *rest = backward_operands(
        generator, (37, 200, 5), (50, 270, 3), H=1
    )
    grads = backward(grad_out, q, k, v, out, lse, cu_q, cu_k, *rest)
    for b in range(3):
        rows, keys = slice(*cu_q[b : b + 2].tolist()), slice(*cu_k[b : b + 2].tolist())
        ends = [torch.tensor([0, len(x)], dtype=torch.int32) for x in (q[rows], k[keys])]
        got = backward(grad_out[rows], q[rows], k[keys], v[keys], out[rows],
                       lse[:, rows].contiguous(), *ends, *rest)  # fmt: skip
        assert_same(got, (grads[0][rows], grads[1][keys], grads[2][keys]), f"sequence {b}")


def test_strides(backward, generator):
    """Heads that are parts of wider rows."""
    grad_out, q, k, v, out, *rest = backward_operands(generator, (150,), H=2)
    wide = []
    for x in (grad_out, q, k, v, out):
        heads = torch.full((150, 3, x.shape[2] + 8), torch.nan, dtype=torch.bfloat16)
        heads[:, :2, 8:] = x
        wide.append(heads[:, :2, 8:])
    got = check(backward, (*wide, *rest))
    assert_same(got, backward(grad_out, q, k, v, out, *rest), "of contiguous tensors")


def test_values_of_the_next_sequence_do_not_spread(backward, generator):
    grad_out, q, k, v, *rest = backward_operands(generator, (150, 90), H=1)
    want = backward(grad_out, q, k, v, *rest)
    bad = [x.clone() for x in (grad_out, q, k, v)]
    for x in bad:
        x[150:] = torch.nan
    got = backward(*bad, *rest)
    assert_same([x[:150] for x in got], [x[:150] for x in want], "sequence 0")
