"""Every op in compiled form: right, and the same bits in every order of warps, blocks and copies.

Results are compared with the reference within the float64 tolerances, casts and permutations bit
for bit. Outputs are NaN before a launch (the fixture poisoned_memory), so that an element left
unwritten shows. The checks of the machine are on: bounds, races, uninitialized reads, barriers.
"""

from __future__ import annotations

import pytest
import torch

import deepkern
from deepkern.testing import compare, ops

OPS = sorted(deepkern.OPS)
# Quick to compile, and of every kind: a cast, a product, attention, a permutation, a selection.
QUICK = ["cast_per_token", "expert_dispatch", "fp8_gemm_nt", "mla_decode", "topk_indices"]
# sm_80 has neither FP8 conversions nor bulk copies; sm_120 has both and mma.sync.
OTHER_TARGETS = [(name, ("sm_80", "sm_120")[i % 2]) for i, name in enumerate(OPS)]
# The second run has another seed: the seed decides who runs next.
SCHEDULES = [("random", 0), ("random", 1), ("earliest", 2), ("latest", 3)]


def small(name: str, generator: torch.Generator, index: int) -> tuple:
    return ops.inputs(name, generator, **ops.sizes(name).small[index])


def call(name: str, args: tuple, target: str, seed: int, order: str) -> tuple:
    """All that the op returned or wrote, called on a copy of its tensors."""
    args = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args)
    with deepkern.backend("triton"), deepkern.compiled(target, seed=seed, order=order):
        got = getattr(torch.ops.deepkern, name)(*args)
    return compare.as_tuple(args if got is None else got)


def oracle(name: str, args: tuple) -> tuple:
    args = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args)
    got = getattr(deepkern.reference, name)(*args)
    return compare.as_tuple(args if got is None else got)


def check(name: str, target: str, args: tuple, seed: int, schedules=SCHEDULES) -> None:
    """The op equals its reference, and every schedule gives the same bits."""
    first, want = None, oracle(name, args)
    for order, offset in schedules:
        got = call(name, args, target, seed + offset, order)
        if first is None:
            compare.assert_matches(name, got, want, target)
            first = got
        for i, (a, b) in enumerate(zip(got, first, strict=True)):
            if isinstance(a, torch.Tensor):
                label = f"{name} output {i}, order {order}, seed {seed + offset}"
                compare.assert_bitwise(a, b, label)


@pytest.mark.parametrize("name", QUICK)
def test_quick_op(name, generator, seed):
    check(name, "sm_90", small(name, generator, 0), seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(OPS) - set(QUICK)))
def test_op_on_sm_90(name, generator, seed):
    check(name, "sm_90", small(name, generator, 0), seed)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "target"), OTHER_TARGETS)
def test_op_on_another_target(name, target, generator, seed):
    check(name, target, small(name, generator, 0), seed, SCHEDULES[-2:])


@pytest.mark.proof
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize("name", OPS)
def test_op_at_every_small_size(name, target, generator, seed):
    for index in range(len(ops.sizes(name).small)):
        check(name, target, small(name, generator, index), seed)


# sm_89 runs the instructions of sm_80 and FP8 conversions, so two sizes of each op suffice there.
@pytest.mark.proof
@pytest.mark.parametrize("target", ["sm_89", "sm_100"])
@pytest.mark.parametrize("name", OPS)
def test_op_at_two_small_sizes(name, target, generator, seed):
    for index in range(min(2, len(ops.sizes(name).small))):
        check(name, target, small(name, generator, index), seed)
