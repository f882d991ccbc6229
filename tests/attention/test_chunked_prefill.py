"""Chunked prefill over the paged cache (the code of docs/attention.md), and several ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import deepkern
from deepkern.testing import caches, compare, ops

PAGE = Path(__file__).parent.parent.parent / "docs/attention.md"
R, D, NOPE, DV, H = 64, 16, 16, 24, 3


@pytest.fixture
def documented() -> dict:
    """The names that the Python code of the page defines."""
    section = PAGE.read_text().split("## Chunked prefill")[1]
    code = section.split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(compile(code, str(PAGE), "exec"), names)
    return names


def causal_attention(q, keys, values, scale):
    """Causal softmax in float64: q [T, H, W], keys [n, H, W], values [n, H, Dv]."""
    T, n = len(q), len(keys)
    scores = torch.einsum("thw,nhw->htn", q.double(), keys.double()) * scale
    future = torch.ones(T, n, device=q.device).triu(n - T + 1).bool()
    scores = scores.masked_fill(future, -torch.inf)
    out = torch.einsum("htn,nhd->thd", scores.softmax(-1), values.double())
    return out, scores.logsumexp(-1)


@pytest.mark.parametrize(
    "cache_dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=["fp32", "bf16", "fp8"]
)
def test_chunks_equal_the_whole_prompt(backend, documented, cache_dtype, generator):
    tokens, chunk, page, scale = 70, 30, 8, 0.15
    device = generator.device
    dtype = torch.float32 if cache_dtype == torch.float32 else torch.bfloat16

    def randn(*shape):
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    latent, k_rope, q = randn(tokens, R), randn(tokens, D), randn(tokens, H, NOPE + D)
    up_k, up_v = randn(H, NOPE, R) / 8, randn(H, DV, R) / 8
    cache = caches.empty_cache(generator, 11, page, R, D, cache_dtype)
    table = torch.randperm(11, generator=generator, device=device).int()[None, :9]
    position = torch.arange(tokens, device=device)
    slots = table[0].long()[position // page] * page + position % page
    deepkern.mla_cache_append(latent, k_rope, cache, slots)
    # Keys and values come from the cache in every chunk, so the expected values do too.
    cached = deepkern.reference.attention.unpack(cache.flatten(0, 1)[slots, 0], R).to(dtype)
    keys = torch.einsum("tr,hdr->thd", cached[:, :R], up_k)
    keys = torch.cat((keys, cached[:, None, R:].expand(tokens, H, D)), -1)
    values = torch.einsum("tr,hdr->thd", cached[:, :R], up_v)

    want, want_lse = causal_attention(q, keys, values, scale)
    for start in range(0, tokens, chunk):
        new = slice(start, min(start + chunk, tokens))
        out, lse = documented["prefill_chunk"](
            q[new], keys[new], values[new], cache, table, start, up_k, up_v, scale, piece=25
        )
        compare.assert_close(lse, want_lse[:, new])
        if dtype == torch.float32:
            compare.assert_close(out, want[new])
        else:  # each partial result is rounded to bf16 before the merge
            assert compare.diff(out, want[new]) < 1e-5
    offsets = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    whole, _ = deepkern.mla_prefill(q, keys, values, offsets, offsets, scale)
    assert compare.diff(whole[new], out) < (1e-9 if dtype == torch.float32 else 1e-5)


@pytest.mark.parametrize("kind", [{}, {"cache_dtype": torch.uint8}], ids=["bf16", "fp8"])
def test_context_on_several_ranks(backend, kind, generator):
    """Each rank has some pages of a sequence, one rank has no page; results are merged in order."""
    q, cache, table, _, scale, _, width = ops.inputs(
        "mla_decode", generator, (96,), H=4, R=64, D=16, page=16, causal=False, **kind
    )
    merged = None
    for first, last in ((0, 2), (2, 2), (2, 5), (5, 6)):
        length = torch.tensor([16 * (last - first)], dtype=torch.int32, device=q.device)
        part = deepkern.mla_decode(q, cache, table[:, first:last], length, scale, False, width)
        merged = part if merged is None else deepkern.merge_states(*merged, *part)
    length = torch.tensor([96], dtype=torch.int32, device=q.device)
    want = deepkern.reference.mla_decode(q.double(), cache, table, length, scale, False, width)
    assert compare.diff(merged[0], want[0]) < 1e-5
    compare.assert_close(merged[1], want[1])
