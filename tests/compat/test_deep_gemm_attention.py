"""compat.deep_gemm's attention logits, called and checked as in DeepGEMM's tests."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

import deepkern.compat.deep_gemm as deep_gemm
from deepkern.testing import compare, ops

FP8 = torch.float8_e4m3fn


def by_definition(q, keys, weights, starts, ends) -> torch.Tensor:
    """[S, N] in float64 of dequantised keys."""
    products = torch.einsum("mhd,nd->hmn", q.double(), keys.double()).relu()
    logits = torch.einsum("hmn,mh->mn", products, weights.double())
    n = torch.arange(len(keys), device=q.device)
    key_mask = (n >= starts[:, None]) & (n < ends[:, None])
    return logits.masked_fill(~key_mask, -math.inf)


@pytest.mark.parametrize("clean_logits", [True, False])
def test_mqa_logits(backend, clean_logits, generator):
    q, kv, scale, weights, starts, ends = ops.inputs("mqa_logits", generator, 6, 70, H=5, D=32)
    starts[2:4] = 30
    want = by_definition(q, kv.double() * scale.double()[:, None], weights, starts, ends)
    got = deep_gemm.fp8_mqa_logits(q, (kv, scale), weights, starts, ends, clean_logits)
    compare.assert_close(got, want, op="mqa_logits")


def test_compressed_logits(backend, generator):
    q, kv, scale, weights, starts, ends = ops.inputs(
        "mqa_logits", generator, 6, 70, H=2, D=16, causal=False
    )
    starts[0], ends[1] = -3, 500
    whole = deep_gemm.fp8_mqa_logits(q, (kv, scale), weights, starts, ends)
    got = deep_gemm.fp8_mqa_logits(
        q, [kv, scale], weights, cu_seq_len_k_start=starts, cu_seq_len_k_end=ends,
        clean_logits=False, max_seqlen_k=40,
    )  # fmt: skip
    assert got.shape == (6, 40)
    for s in range(6):
        row = whole[s, max(int(starts[s]), 0) :][:40]
        compare.assert_bitwise(got[s, : len(row)], row)
        assert got[s, len(row) :].isneginf().all()
    with pytest.raises(ValueError, match="fp8_mqa_logits: clean_logits: expected False with"):
        deep_gemm.fp8_mqa_logits(q, (kv, scale), weights, starts, ends, max_seqlen_k=40)


@pytest.mark.parametrize("two_dimensional", [True, False])
def test_paged_mqa_logits(backend, two_dimensional, generator):
    """A cache filled as DeepGEMM's test fills it."""
    B, next_n, H, D, page = 3, 2, 4, 32, 8
    device = generator.device
    lengths = [20, 0, 9]
    blocks = torch.randperm(9, generator=generator, device=device).int().view(3, 3)
    keys = torch.randn(9, page, 1, D, generator=generator, device=device)
    scale = keys.abs().amax(3, keepdim=True).clamp(1e-4) / 448.0
    values = (keys * (1.0 / scale)).to(FP8)
    cache = torch.empty(9, page * (D + 4), dtype=torch.uint8, device=device)
    cache[:, : page * D] = values.view(9, page * D).view(torch.uint8)
    cache[:, page * D :] = scale.view(9, page).view(torch.uint8)
    cache = cache.view(9, page, 1, D + 4)
    q = torch.randn(B, next_n, H, D, generator=generator, device=device).to(FP8)
    weights = torch.randn(B * next_n, H, generator=generator, device=device)
    context = torch.tensor(lengths, dtype=torch.int32, device=device)
    each = (context[:, None] - 1 + torch.arange(next_n, device=device)).clamp(0).int()
    context = each if two_dimensional else context
    meta = deep_gemm.get_paged_mqa_logits_metadata(context, page, deep_gemm.get_num_sms())
    assert meta.shape == (deep_gemm.get_num_sms() + 1, 2) and meta.dtype == torch.int32
    got = deep_gemm.fp8_paged_mqa_logits(q, cache, weights, context, blocks, meta, 24)
    dequantised = values.double() * scale.double()
    for b in range(B):
        kv = dequantised[blocks[b].long()].reshape(24, D)
        rows = slice(b * next_n, (b + 1) * next_n)
        want = by_definition(q[b], kv, weights[rows], torch.zeros_like(each[b]), each[b])
        compare.assert_close(got[rows], want, op="mqa_logits")


def test_signatures():
    """As in register_apis of DeepGEMM 2.6.1's csrc/apis/attention.hpp."""
    want = {
        "fp8_mqa_logits": "q kv weights cu_seq_len_k_start cu_seq_len_k_end clean_logits=True "
        "max_seqlen_k=0",
        "get_paged_mqa_logits_metadata": "context_lens block_kv num_sms indices=None",
        "fp8_paged_mqa_logits": "q kv_cache weights context_lens block_table schedule_meta "
        "max_context_len clean_logits=False indices=None",
    }
    for name, parameters in want.items():
        got = inspect.signature(getattr(deep_gemm, name)).parameters.values()
        empty = inspect.Parameter.empty
        words = [p.name + ("" if p.default is empty else f"={p.default}") for p in got]
        assert " ".join(words) == parameters


def test_errors_name_deepgemms_arguments(generator):
    q, kv, scale, weights, starts, ends = ops.inputs("mqa_logits", generator, 2, 9, H=2, D=16)
    with pytest.raises(TypeError, match="fp8_mqa_logits: kv: expected a pair"):
        deep_gemm.fp8_mqa_logits(q, kv, weights, starts, ends)
    with pytest.raises(ValueError, match=r"fp8_mqa_logits: kv\[1\]: expected Skv = 9"):
        deep_gemm.fp8_mqa_logits(q, (kv, scale[:-1]), weights, starts, ends)
    with pytest.raises(TypeError, match="fp8_paged_mqa_logits: kv_cache: expected dtype uint8"):
        deep_gemm.fp8_paged_mqa_logits(q[None], scale, weights, ends, ends[None], None, 9)
