"""mla_cache_append: the bytes of both formats, norm and rotation, skipped slots."""

from __future__ import annotations

import pytest
import torch

import deepkern
from deepkern.runtime import arch
from deepkern.testing import compare, ops

REAL = [torch.bfloat16, torch.float16, torch.float32]
FAR = 2**31 - 1


def append(args: tuple, **changed) -> torch.Tensor:
    """A copy of the cache after the append; `changed` replaces arguments."""
    names = ("latent", "k_rope", "cache", "slot_mapping", "norm_weight", "positions", "cos_sin")
    given = dict(zip(names, args, strict=True)) | changed
    given["cache"] = given["cache"].clone()
    assert deepkern.mla_cache_append(**given) is None
    return given["cache"]


@pytest.mark.parametrize("cache_dtype", REAL, ids=["bf16", "fp16", "fp32"])
def test_values_of_a_real_cache(backend, cache_dtype, generator):
    """Compared with float64 and complex multiplication, unlike the reference."""
    args = ops.inputs(
        "mla_cache_append",
        generator,
        9,
        R=96,
        D=16,
        page=4,
        dtype=torch.float32,
        cache_dtype=cache_dtype,
    )
    latent, k_rope, _, slots, weight, positions, table = args
    cache = append(args).flatten(0, 1)[:, 0]
    x = latent.double()
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    cos, sin = table.double()[positions].chunk(2, -1)
    pairs = torch.view_as_complex(k_rope.double().unflatten(-1, (-1, 2)))
    rotated = torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            want = torch.cat((normed[token], rotated[token])).to(cache_dtype)
            torch.testing.assert_close(cache[slot], want, rtol=1e-2, atol=1e-6)
            assert compare.diff(cache[slot], want) < 1e-5
    untouched = torch.ones(len(cache), dtype=torch.bool, device=cache.device)
    untouched[slots[slots >= 0]] = False
    assert cache[untouched].isnan().all() and untouched.any()


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_fp8_layout_of_656_bytes(backend, target, generator):
    """The public V3.2 layout: 512 e4m3, 4 fp32 scales, 64 bf16."""
    latent, k_rope, cache, *_ = ops.inputs(
        "mla_cache_append", generator, 3, cache_dtype=torch.uint8
    )
    slots = torch.tensor([5, -1, 0], device=latent.device)
    with arch.compile_for(arch.ARCHS[target]):
        deepkern.mla_cache_append(latent, k_rope, cache, slots)
    assert cache.shape[-1] == 656
    q, scale = deepkern.reference.cast_per_token(latent)
    for token, slot in ((0, 5), (2, 0)):
        entry = cache[0, slot, 0]
        compare.assert_bitwise(entry[:512].view(torch.float8_e4m3fn), q[token])
        compare.assert_bitwise(entry[512:528].contiguous().view(torch.float32), scale[token])
        compare.assert_bitwise(entry[528:].contiguous().view(torch.bfloat16), k_rope[token])
    assert (cache[0, 1:5] == 0xFF).all() and (cache[1:] == 0xFF).all()


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.uint8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("page", [1, 2, 53])
@pytest.mark.parametrize(("R", "D"), [(512, 64), (130, 6), (16, 0)])
def test_widths_and_pages(backend, cache_dtype, page, R, D, generator):
    args = ops.inputs(
        "mla_cache_append", generator, 5, R=R, D=D, page=page, cache_dtype=cache_dtype
    )
    want = args[2].clone()
    deepkern.reference.mla_cache_append(*args[:2], want, *args[3:])
    compare.assert_bitwise(append(args), want)


def test_hostile_slots_and_positions_skip(backend, generator):
    args = ops.inputs("mla_cache_append", generator, 6, R=32, D=8, page=4)
    cache, table = args[2], args[6]
    slots = cache.shape[0] * cache.shape[1]
    hostile = torch.tensor([-1, -(2**63), 2**63 - 1, slots, FAR, -FAR], device=cache.device)
    compare.assert_bitwise(append(args, slot_mapping=hostile), cache)
    positions = torch.tensor([-1, -(2**63), 2**63 - 1, len(table), FAR, -FAR], device=cache.device)
    good = torch.arange(6, device=cache.device)
    compare.assert_bitwise(append(args, slot_mapping=good, positions=positions), cache)


def test_bits_independent_of_other_tokens(backend, generator):
    args = ops.inputs("mla_cache_append", generator, 9, R=160, D=16, cache_dtype=torch.uint8)
    latent, k_rope, cache, slots, weight, positions, table = args
    whole = append(args)
    one_by_one = cache.clone()
    for t in range(9):
        deepkern.mla_cache_append(
            latent[t : t + 1], k_rope[t : t + 1], one_by_one, slots[t : t + 1], weight,
            positions[t : t + 1], table,
        )  # fmt: skip
    compare.assert_bitwise(one_by_one, whole)


def test_nan_stays_in_its_token_and_block(backend, generator):
    args = ops.inputs(
        "mla_cache_append",
        generator,
        2,
        R=256,
        D=8,
        cache_dtype=torch.uint8,
        norm=False,
        rope=False,
    )
    slots = torch.tensor([0, 1], device=args[0].device)
    latent = args[0].clone()
    latent[1, 200] = torch.nan
    clean, got = append(args, slot_mapping=slots), append(args, latent=latent, slot_mapping=slots)
    changed = (clean != got).nonzero()
    assert (changed[:, 1] == 1).all()  # the token
    byte = changed[:, 3]
    assert (((byte >= 128) & (byte < 256)) | ((byte >= 260) & (byte < 264))).all()  # block, scale
    assert got[0, 1, 0, 128:256].view(torch.float8_e4m3fn).float().isnan().all()


def test_debug_errors_name_the_argument(generator, monkeypatch):
    monkeypatch.setenv("DEEPKERN_DEBUG", "1")
    args = ops.inputs("mla_cache_append", generator, 3, R=32, D=8)
    device = args[0].device
    for slots, words in (([0, -2, 1], "slots in"), ([0, 4, 4], "each slot once")):
        with pytest.raises(ValueError, match=f"mla_cache_append: slot_mapping: expected {words}"):
            append(args, slot_mapping=torch.tensor(slots, device=device))
    with pytest.raises(ValueError, match="mla_cache_append: positions: expected positions in"):
        append(args, slot_mapping=torch.arange(3, device=device), positions=args[5] - 1000)


def test_errors(generator):
    args = ops.inputs("mla_cache_append", generator, 3, R=32, D=8)
    with pytest.raises(ValueError, match="mla_cache_append: cache: expected last dimension 40"):
        append(args, cache=args[2][..., :-1])
    with pytest.raises(ValueError, match="mla_cache_append: positions: expected positions and"):
        append(args, positions=None)
    with pytest.raises(ValueError, match="mla_cache_append: cos_sin: expected positions and"):
        append(args, cos_sin=None)
