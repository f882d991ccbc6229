"""mqa_logits: a formula written out head by head, ranges of every kind, poison, invariance."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import deepkern
from deepkern.runtime import arch
from deepkern.testing import compare, ops

FP8 = torch.float8_e4m3fn
FAR = 2**31 - 1


def check(args: tuple) -> torch.Tensor:
    got = deepkern.mqa_logits(*args)
    compare.assert_matches("mqa_logits", got, deepkern.reference.mqa_logits(*args))
    return got


def oracle(args: tuple, first: int) -> torch.Tensor:
    """64 queries at a time: the oracle holds every product of theirs."""
    q, kv, scale, *rest = args
    part = slice(first, first + 64)
    return deepkern.reference.mqa_logits(q[part], kv, scale, *(x[part] for x in rest))


def ranges(device, *pairs: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    starts, ends = torch.tensor(pairs, dtype=torch.int32, device=device).T
    return starts.contiguous(), ends.contiguous()


def test_the_formula_key_by_key(backend, generator):
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
    compare.assert_close(got, want)


@pytest.mark.parametrize("H", [1, 2, 9, 63, 128, 300])
@pytest.mark.parametrize("D", [1, 72, 160])
def test_any_heads_and_widths(backend, H, D, generator):
    check(ops.inputs("mqa_logits", generator, 3, 40, H=H, D=D))


@pytest.mark.parametrize("Skv", [1, 63, 64, 65, 2048, 2049, 2200])
def test_edges_of_tiles_and_chunks(backend, Skv, generator):
    args = ops.inputs("mqa_logits", generator, 2, Skv, H=2, D=16)
    check((*args[:4], *ranges(args[0].device, (0, Skv), (Skv - 1, Skv))))


def test_many_queries(backend, generator):
    check(ops.inputs("mqa_logits", generator, 139, 20, H=3, D=16, causal=False))


def test_hostile_ranges_are_clamped(backend, generator):
    args = ops.inputs("mqa_logits", generator, 8, 70, H=2, D=16)
    hostile = (
        (-5, 3),
        (60, FAR),
        (-FAR - 1, FAR),
        (FAR, -FAR - 1),
        (7, 7),
        (9, 4),
        (70, 71),
        (-3, 0),
    )
    got = check((*args[:4], *ranges(args[0].device, *hostile)))
    assert (~got.isneginf()).sum(1).tolist() == [3, 10, 70, 0, 0, 0, 0, 0]


def test_random_ranges(backend, generator):
    """Contents of every size, under the memory-checking interpreter."""
    args = ops.inputs("mqa_logits", generator, 40, 130, H=2, D=16)
    device = args[0].device
    for reach in (200, 2**31 - 1):
        starts, ends = torch.randint(-reach, reach, (2, 40), generator=generator, device=device)
        check((*args[:4], starts.int(), ends.int()))


def test_poison_outside_the_ranges(backend, generator):
    """NaN in keys and scales that no query sees reaches no result, nor do the ranges of others."""
    args = ops.inputs("mqa_logits", generator, 4, 200, H=3, D=32)
    q, kv, scale, weights = args[:4]
    starts, ends = ranges(q.device, (70, 80), (75, 130), (72, 72), (90, 100))
    clean = check((q, kv, scale, weights, starts, ends))
    unseen = torch.ones(200, dtype=torch.bool, device=q.device)
    unseen[70:130] = False
    kv, scale = kv.clone(), scale.masked_fill(unseen, math.nan)
    kv.view(torch.uint8)[unseen] = 0x7F
    compare.assert_bitwise(check((q, kv, scale, weights, starts, ends)), clean)
    kv.view(torch.uint8)[78] = 0x7F  # seen by the first two queries only
    got = check((q, kv, scale, weights, starts, ends))
    assert got.isnan().nonzero().tolist() == [[0, 78], [1, 78]]


def test_nan_and_inf_stay_where_they_are(backend, generator):
    q, kv, scale, weights, starts, ends = ops.inputs("mqa_logits", generator, 4, 30, H=3, D=16)
    q.view(torch.uint8)[1, 2, 5] = 0xFF
    weights[2, 0], scale[3] = math.inf, math.inf
    got = deepkern.mqa_logits(q, kv, scale, weights, starts, ends)
    want = deepkern.reference.mqa_logits(q, kv, scale, weights, starts, ends)
    for what in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(what(got), what(want))
    assert got[1, : ends[1]].isnan().all() and not got[0, :3].isnan().any()


def test_a_query_does_not_see_the_others(backend, generator):
    """Alone, at another place of the tile, beside other ranges: the same bits."""
    q, kv, scale, weights, starts, ends = ops.inputs(
        "mqa_logits", generator, 7, 90, H=64, D=128, causal=False
    )
    ends = torch.full_like(ends, 90)
    whole = deepkern.mqa_logits(q, kv, scale, weights, starts, ends)
    for first, last in ((3, 4), (1, 6)):
        part = slice(first, last)
        alone = deepkern.mqa_logits(q[part], kv, scale, weights[part], starts[part], ends[part])
        compare.assert_bitwise(alone, whole[part])


@pytest.mark.parametrize("S", [1, 3])
def test_every_target_gives_the_same_bits_of_a_sum(S, generator):
    """The order of the heads is no matter of tiles: e4m3 products of few bits sum exactly alike."""
    args = ops.inputs("mqa_logits", generator, S, 70, H=5, D=32)
    with deepkern.backend("triton"):
        want = check(args)
        for target in ("sm_80", "sm_89", "gfx942", "gfx950"):
            with arch.compile_for(arch.ARCHS[target]):
                compare.assert_bitwise(check(args), want)


def test_strides(backend, generator):
    q, kv, scale, weights, starts, ends = ops.inputs("mqa_logits", generator, 5, 33, H=4, D=32)
    want = deepkern.mqa_logits(q, kv, scale, weights, starts, ends)

    def apart(x):
        wide = torch.cat((x.view(torch.uint8), x.view(torch.uint8)), -1)
        return wide.view(x.dtype)[..., : x.shape[-1]]

    by_head = apart(q).transpose(0, 1).contiguous().transpose(0, 1)
    got = deepkern.mqa_logits(by_head, apart(kv), scale, apart(weights), starts, ends)
    compare.assert_bitwise(got, want)


def test_debug_names_what_is_wrong(generator, monkeypatch):
    monkeypatch.setenv("DEEPKERN_DEBUG", "1")
    q, kv, scale, weights, starts, ends = ops.inputs("mqa_logits", generator, 3, 20, H=1, D=16)
    with pytest.raises(ValueError, match="mqa_logits: starts: expected values in"):
        deepkern.mqa_logits(q, kv, scale, weights, starts - 1, ends)
    with pytest.raises(ValueError, match="mqa_logits: ends: expected values in"):
        deepkern.mqa_logits(q, kv, scale, weights, starts, ends + 1)


def test_refuses_heads_out_of_reach():
    """Head 2 of each query would begin 2**31 elements away, past what 32-bit offsets reach."""
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
def test_deepgemms_grid(H, D, causal, generator):
    """A tensor core adds up FP8 products in fewer bits than fp32: DeepGEMM's own bound, 5e-6."""
    args = ops.inputs("mqa_logits", generator, 512, 8192, H=H, D=D, causal=causal)
    with deepkern.backend("triton"):
        got = deepkern.mqa_logits(*args)
    want = torch.cat([oracle(args, s) for s in range(0, 512, 64)])
    compare.assert_close(got, want, dtype=torch.bfloat16)
