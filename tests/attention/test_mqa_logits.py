"""mqa_logits: the formula in Python, ranges of every kind, NaN outside them, invariance."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import deepkern
from deepkern.runtime import arch
from deepkern.testing import compare, ops

FP8 = torch.float8_e4m3fn
INT32_MAX = 2**31 - 1


def check(args: tuple) -> torch.Tensor:
    """The output of the selected backend, compared with the reference."""
    got = deepkern.mqa_logits(*args)
    compare.assert_matches("mqa_logits", got, deepkern.reference.mqa_logits(*args))
    return got


def reference_in_parts(args: tuple) -> torch.Tensor:
    """The reference for 64 queries at a time: it stores all of their products."""
    q, kv, scale, *per_query = args
    parts = [slice(first, first + 64) for first in range(0, len(q), 64)]
    return torch.cat([
        deepkern.reference.mqa_logits(q[part], kv, scale, *(x[part] for x in per_query))
        for part in parts
    ])  # fmt: skip


def ranges(device, *pairs: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 starts and ends."""
    starts, ends = torch.tensor(pairs, dtype=torch.int32, device=device).T
    return starts.contiguous(), ends.contiguous()


def test_against_the_formula(backend, generator):
    args = ops.inputs("mqa_logits", generator, 3, 50, H=4, D=16)
    q, kv, scale, weights, _, ends = args
    got = deepkern.mqa_logits(*args)
    want = torch.full((3, 50), -math.inf, dtype=torch.float64, device=q.device)
    for s in range(3):
        for n in range(int(ends[s])):
            terms = [
                float(weights[s, h]) * max(float(q[s, h].double() @ kv[n].double()), 0.0)
                for h in range(4)
            ]
            want[s, n] = float(scale[n]) * math.fsum(terms)
    assert [int(row.isneginf().sum()) for row in got] == [2, 1, 0]
    compare.assert_close(got, want, op="mqa_logits")


@pytest.mark.parametrize("H", [1, 2, 9, 63, 128, 300])
@pytest.mark.parametrize("D", [1, 72, 160])
def test_heads_and_widths(kernel_backend, H, D, generator):
    check(ops.inputs("mqa_logits", generator, 3, 40, H=H, D=D))


@pytest.mark.parametrize("Skv", [1, 63, 64, 65, 2048, 2049, 2200])
def test_edges_of_tiles_and_chunks(kernel_backend, Skv, generator):
    args = ops.inputs("mqa_logits", generator, 2, Skv, H=2, D=16)
    check((*args[:4], *ranges(args[0].device, (0, Skv), (Skv - 1, Skv))))


def test_many_queries(kernel_backend, generator):
    check(ops.inputs("mqa_logits", generator, 139, 20, H=3, D=16, causal=False))


def test_hostile_ranges_are_clamped(backend, generator):
    args = ops.inputs("mqa_logits", generator, 8, 70, H=2, D=16)
    hostile = (
        (-5, 3),
        (60, INT32_MAX),
        (-INT32_MAX - 1, INT32_MAX),
        (INT32_MAX, -INT32_MAX - 1),
        (7, 7),
        (9, 4),
        (70, 71),
        (-3, 0),
    )
    got = check((*args[:4], *ranges(args[0].device, *hostile)))
    assert (~got.isneginf()).sum(1).tolist() == [3, 10, 70, 0, 0, 0, 0, 0]


def test_random_ranges(kernel_backend, generator):
    """Values of every magnitude, under the memory-checking interpreter."""
    args = ops.inputs("mqa_logits", generator, 40, 130, H=2, D=16)
    device = args[0].device
    for limit in (200, 2**31 - 1):
        starts, ends = torch.randint(-limit, limit, (2, 40), generator=generator, device=device)
        check((*args[:4], starts.int(), ends.int()))


def test_nan_outside_the_ranges(backend, generator):
    """NaN in keys and scales affects only the queries to which the key is visible."""
    args = ops.inputs("mqa_logits", generator, 4, 200, H=3, D=32)
    q, kv, scale, weights = args[:4]
    starts, ends = ranges(q.device, (70, 80), (75, 130), (72, 72), (90, 100))
    clean = check((q, kv, scale, weights, starts, ends))
    invisible = torch.ones(200, dtype=torch.bool, device=q.device)
    invisible[70:130] = False
    kv, scale = kv.clone(), scale.masked_fill(invisible, math.nan)
    kv.view(torch.uint8)[invisible] = 0x7F
    compare.assert_bitwise(check((q, kv, scale, weights, starts, ends)), clean)
    kv.view(torch.uint8)[78] = 0x7F  # visible to the first two queries only
    got = check((q, kv, scale, weights, starts, ends))
    assert got.isnan().nonzero().tolist() == [[0, 78], [1, 78]]


def test_nan_and_inf_do_not_spread(backend, generator):
    q, kv, scale, weights, starts, ends = ops.inputs("mqa_logits", generator, 4, 30, H=3, D=16)
    q.view(torch.uint8)[1, 2, 5] = 0xFF
    weights[2, 0], scale[3] = math.inf, math.inf
    got = deepkern.mqa_logits(q, kv, scale, weights, starts, ends)
    want = deepkern.reference.mqa_logits(q, kv, scale, weights, starts, ends)
    for predicate in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(predicate(got), predicate(want))
    assert got[1, : ends[1]].isnan().all() and not got[0, :3].isnan().any()


def test_query_bits_independent_of_others(backend, generator):
    """The same bits alone, at another position in the tile, and with other ranges."""
    q, kv, scale, weights, starts, ends = ops.inputs(
        "mqa_logits", generator, 7, 90, H=64, D=128, causal=False
    )
    ends = torch.full_like(ends, 90)
    together = deepkern.mqa_logits(q, kv, scale, weights, starts, ends)
    for part in (slice(3, 4), slice(1, 6)):
        alone = deepkern.mqa_logits(q[part], kv, scale, weights[part], starts[part], ends[part])
        compare.assert_bitwise(alone, together[part])


@pytest.mark.parametrize("S", [1, 3])
def test_bits_independent_of_target(S, generator):
    """The order of the sum over heads does not depend on tiles; the products here are exact."""
    args = ops.inputs("mqa_logits", generator, S, 70, H=5, D=32)
    with deepkern.backend("triton"):
        want = check(args)
        for target in ("sm_80", "sm_89", "gfx942", "gfx950"):
            with arch.compile_for(arch.ARCHS[target]):
                compare.assert_bitwise(check(args), want)


def test_strides(backend, generator):
    q, kv, scale, weights, starts, ends = ops.inputs("mqa_logits", generator, 5, 33, H=4, D=32)
    want = deepkern.mqa_logits(q, kv, scale, weights, starts, ends)

    def with_gaps(x):
        wide = torch.cat((x.view(torch.uint8), x.view(torch.uint8)), -1)
        return wide.view(x.dtype)[..., : x.shape[-1]]

    by_head = with_gaps(q).transpose(0, 1).contiguous().transpose(0, 1)
    got = deepkern.mqa_logits(by_head, with_gaps(kv), scale, with_gaps(weights), starts, ends)
    compare.assert_bitwise(got, want)


def test_debug_errors(generator, monkeypatch):
    monkeypatch.setenv("DEEPKERN_DEBUG", "1")
    q, kv, scale, weights, starts, ends = ops.inputs("mqa_logits", generator, 3, 20, H=1, D=16)
    with pytest.raises(ValueError, match="mqa_logits: starts: expected values in"):
        deepkern.mqa_logits(q, kv, scale, weights, starts - 1, ends)
    with pytest.raises(ValueError, match="mqa_logits: ends: expected values in"):
        deepkern.mqa_logits(q, kv, scale, weights, starts, ends + 1)


def test_error_for_distant_heads():
    """Head 2 of each query starts at element 2**31, which 32-bit offsets cannot address."""
    with FakeTensorMode():
        q = torch.empty(3, 2**30, dtype=torch.float8_e4m3fn)[:, :16].unsqueeze(0)
        kv, scale = torch.empty(5, 16, dtype=q.dtype), torch.empty(5)
        ends = torch.empty(1, dtype=torch.int32)
        with pytest.raises(ValueError, match="mqa_logits: q: expected heads within"):
            deepkern.mqa_logits(q, kv, scale, torch.empty(1, 3), ends, ends)


@pytest.mark.gpu
@pytest.mark.parametrize("H", [1, 8, 32, 64, 128])
@pytest.mark.parametrize("D", [32, 64, 128])
@pytest.mark.parametrize("causal", [True, False])
def test_deepgemm_shapes(H, D, causal, generator):
    """Bound 5e-6, as in DeepGEMM's tests: tensor cores sum FP8 products in less than fp32."""
    args = ops.inputs("mqa_logits", generator, 512, 8192, H=H, D=D, causal=causal)
    with deepkern.backend("triton"):
        got = deepkern.mqa_logits(*args)
    compare.assert_close(got, reference_in_parts(args), dtype=torch.bfloat16)
